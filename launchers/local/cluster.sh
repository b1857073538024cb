#!/bin/bash
# A Ray cluster of this machine alone that outlives single commands (without it, each `dbtrain train` starts its own).
#
#   source launchers/local/cluster.sh up       # sets this shell up; then: dbtrain train CONFIG --address auto
#   source launchers/local/cluster.sh down     # ends what `up` started, after a broken `up` too, and nothing else of Ray
#
# Variables: DBTRAIN_PORT (6379; another one for a second cluster), DBTRAIN_HEAD_OPTIONS (of `ray start`).
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# as in coordinator/ray/settings.py: both ends of a connection must know them
export RAY_grpc_client_keepalive_time_ms=5000 RAY_grpc_client_keepalive_timeout_ms=5000
export RAY_gcs_rpc_server_reconnect_timeout_s=5
# the switch with which Ray listens on 127.0.0.1 and nowhere else
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
# in parentheses, so that the shell that sources this keeps its umask and its variables
(
  port=${DBTRAIN_PORT:-6379} here=$(dirname "${BASH_SOURCE[0]:-$0}") token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
  ray=$(command -v ray) || { echo "no ray on the PATH: activate its environment" >&2; exit 1; }
  case ${1:-} in
    up)
      if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        echo "something listens at 127.0.0.1:$port already: use it (--address auto), say down first, or set DBTRAIN_PORT" >&2
        exit 1
      fi
      # Ray would write the token for everybody to read
      if [ ! -s "$token" ]; then
        (umask 077; mkdir -p "$(dirname "$token")"; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token") || exit
      fi
      [ ! -O "$token" ] || chmod 600 "$token"
      # what Ray says of itself names its own way down, which ends all of Ray on this machine
      said=$(mktemp)
      trap 'rm -f "$said"' EXIT
      DBTRAIN_CLUSTER=127.0.0.1:$port ray start --head --port "$port" --dashboard-host 127.0.0.1 --disable-usage-stats \
        ${DBTRAIN_HEAD_OPTIONS:-} >"$said" 2>&1 || { cat "$said" >&2; exit 1; }
      echo "a cluster at 127.0.0.1:$port: dbtrain train CONFIG --address auto; source ${BASH_SOURCE[0]:-$0} down ends it"
      ;;
    down)
      python=$(dirname "$ray")/python
      [ -x "$python" ] || python=python3
      "$python" "$here/../end.py" "127.0.0.1:$port"
      ;;
    *) echo "usage: source launchers/local/cluster.sh up|down" >&2; exit 2 ;;
  esac
)
