#!/usr/bin/env bash
# Prometheus beside the server, without containers:
#   deploy/observe.sh HOST:PORT COMMAND...
# COMMAND starts the server; it is not run when something answers at HOST:PORT already. Both end together.
set -euo pipefail
target=$1
shift
listen=127.0.0.1:${PROMETHEUS_PORT:-9090}
root=$(cd "$(dirname "$0")/.." && pwd)
files=$root/build/prometheus

command -v prometheus >/dev/null || { echo "prometheus is not installed (Debian: apt-get install prometheus)" >&2; exit 1; }
mkdir -p "$files/etc/targets"
cp "$root/deploy/prometheus/"{prometheus,alerts}.yml "$files/etc/"
echo "- targets: [\"$target\"]" >"$files/etc/targets/server.yml"

prometheus --config.file="$files/etc/prometheus.yml" --storage.tsdb.path="$files/data" --web.listen-address="$listen" \
  --log.level=warn &
prometheus=$!
trap 'kill $prometheus 2>/dev/null || true' EXIT

cat <<TEXT

  alerts     http://$listen/alerts
  graph      http://$listen/graph?g0.expr=sum%20by%20(policy)%20(rate(ladimo_generation_tokens_total%5B1m%5D))&g0.tab=0
  page       http://$target/
  dashboards deploy/grafana/dashboards/*.json, for a Grafana whose Prometheus is http://$listen

TEXT
if (exec 3<>"/dev/tcp/${target%:*}/${target##*:}") 2>/dev/null; then
  wait "$prometheus"
else
  "$@"
fi
