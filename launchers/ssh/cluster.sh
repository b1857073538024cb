#!/bin/bash
# A Ray cluster on hosts that you reach by SSH, with the lines that you could also type on each by hand.
#
#   launchers/ssh/cluster.sh up   HEAD WORKER ...     # then, on HEAD: dbtrain doctor --address HEAD:6379
#   launchers/ssh/cluster.sh join HEAD WORKER ...     # more workers, at any time
#   launchers/ssh/cluster.sh down HEAD WORKER ...     # ends what `up` and `join` started, and nothing else of Ray
#
# Hosts are names or addresses, also user@host. All have the same Python, Ray, PyTorch and DeepSpeed (scripts/install.sh)
# in the folder that has `ray` here, or DBTRAIN_BIN. Variables: DBTRAIN_SSH (ssh), DBTRAIN_HEAD_OPTIONS and
# DBTRAIN_WORKER_OPTIONS (of `ray start`), DBTRAIN_PORT (6379).
set -euo pipefail
usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
part=$1 head=$2
shift 2
ssh=${DBTRAIN_SSH:-ssh}
port=${DBTRAIN_PORT:-6379}
bin=${DBTRAIN_BIN:-$(ray=$(command -v ray) && dirname "$ray")} || { echo "no ray on the PATH: activate its environment" >&2; exit 1; }
token=${DBTRAIN_TOKEN_FILE:-$HOME/.ray/auth_token}
here=$(dirname "$0")
address() { getent ahostsv4 "${1#*@}" | awk 'NR == 1 {print $1}'; }

# Run lines on a host; the token goes in by standard input, so that no command line shows it, and first into a file of its
# own: one that is there may be readable by others, or be the very file that is read here where hosts share a home.
on() {
  local host=$1
  shift
  $ssh "$host" "umask 077; mkdir -p ~/.ray && new=\$(mktemp ~/.ray/token.XXXXXX) && cat >\$new \
&& mv -f \$new ~/.ray/auth_token || exit; PATH=$bin:\$PATH; $*" <"$token" || { echo "$host: failed: $*" >&2; return 1; }
}
# A node that was cut off ends its workers before their replacements start.
settings="export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_grpc_client_keepalive_time_ms=5000 \
RAY_grpc_client_keepalive_timeout_ms=5000 RAY_gcs_rpc_server_reconnect_timeout_s=5;"
cluster=$(address "$head"):$port || { echo "$head: no address is known of it" >&2; exit 1; }
start="$settings DBTRAIN_CLUSTER=$cluster ray start"

start_workers() {
  local host pids=() failed=0
  for host in "$@"; do
    on "$host" "$start --address $cluster --node-ip-address $(address "$host")" \
      "${DBTRAIN_WORKER_OPTIONS:-}" >/dev/null & pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return $failed
}

case $part in
  up)
    if [ ! -s "$token" ]; then
      (umask 077; mkdir -p "$(dirname "$token")"; "$bin/python" -c 'import secrets; print(secrets.token_hex(32))' >"$token")
    fi
    [ ! -O "$token" ] || chmod 600 "$token"
    on "$head" "$start --head --port $port --node-ip-address $(address "$head")" \
      "--include-dashboard false ${DBTRAIN_HEAD_OPTIONS:-}" >/dev/null
    start_workers "$@"
    echo "a cluster of $(($# + 1)); on $head:"
    echo "  export RAY_AUTH_MODE=token; dbtrain doctor --address $cluster --nodes $(($# + 1)) --storage ..." ;;
  join)
    start_workers "$@"
    echo "$# more" ;;
  down)
    failed=0
    for host in "$@" "$head"; do
      said=$($ssh "$host" "$bin/python - $cluster" <"$here/../end.py") && echo "$host: $said" \
        || { echo "$host: failed: is it up?" >&2; failed=1; }
    done
    exit $failed ;;
  *) usage ;;
esac
