#!/bin/bash
# A Ray cluster of this machine alone that outlives single commands (without it, each `dbtrain train` starts its own).
#
#   source launchers/local/cluster.sh up       # sets this shell up; then: dbtrain train CONFIG --address auto
#   source launchers/local/cluster.sh down     # all of Ray on this machine, clusters of other commands too (ray stop)
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# as in coordinator/ray_settings.py: both ends of a connection must know them
export RAY_grpc_client_keepalive_time_ms=5000 RAY_grpc_client_keepalive_timeout_ms=5000
export RAY_gcs_rpc_server_reconnect_timeout_s=5
# the switch with which Ray listens on 127.0.0.1 and nowhere else
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
case ${1:-} in
  up)
    ray get-auth-token --generate >/dev/null && ray start --head --port 6379 --dashboard-host 127.0.0.1 --disable-usage-stats
    ;;
  down) ray stop ;;
  *) echo "usage: source ${BASH_SOURCE[0]} up|down" >&2 ;;
esac
