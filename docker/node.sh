#!/bin/bash
# A container's part in a Ray cluster: `dbtrain-node head`, `dbtrain-node worker`, or `dbtrain-node run COMMAND ...`,
# which joins without CPUs and runs a command of dbtrain's there.
set -euo pipefail
part=$1
shift
token=${DBTRAIN_TOKEN_FILE:-/run/dbtrain/token}
if [ "$part" = head ] && [ ! -s "$token" ]; then
  (umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32))' >"$token.new" && mv "$token.new" "$token")
fi
# read from the file by Ray itself: the token is in no environment, command line or log
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token
# a node that was cut off ends its workers before their replacements start
export RAY_grpc_client_keepalive_time_ms=5000 RAY_grpc_client_keepalive_timeout_ms=5000
export RAY_gcs_rpc_server_reconnect_timeout_s=5
head=${DBTRAIN_HEAD:-head}
mine=$(hostname -i | awk '{print $1}')
options=(--node-ip-address "$mine" --disable-usage-stats --object-store-memory "${DBTRAIN_OBJECT_STORE:-100000000}")
case $part in
  head) exec ray start --head --block --port 6379 --num-cpus 0 --dashboard-host 127.0.0.1 "${options[@]}" ;;
  worker) exec ray start --block --address "$head:6379" ${DBTRAIN_CPUS:+--num-cpus "$DBTRAIN_CPUS"} "${options[@]}" ;;
  run)
    ray start --address "$head:6379" --num-cpus 0 --num-gpus 0 "${options[@]}" >/dev/null
    # the head, this container, and one worker at least: blocks wait for further ones
    dbtrain doctor --address auto --storage "${DBTRAIN_STORAGE:-/runs}" --nodes "${DBTRAIN_NODES:-3}"
    exec "$@" ;;
  *) echo "dbtrain-node: $part is no part: head, worker or run" >&2; exit 2 ;;
esac
