#!/usr/bin/env bash
# How long a Finial server with very many entries takes to start, and what it then holds in memory. SQLite, no agents.
#
#   bench/million.sh [ENTRIES, 1000000]
set -euo pipefail
cd "$(dirname "$0")/.."
entries=${1:-1000000}
cache=${FINIAL_CACHE:-$HOME/.cache/finial}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$cache/target}
cargo build --release --locked -p finial
mkdir -p "$cache/bench"
(cd bench/spireload && GOFLAGS=-mod=mod go build -o "$cache/bench/spireload" .)
dir=$(mktemp -d)
stop() { [[ ! -s $dir/pid ]] || { kill "$(cat "$dir/pid")" 2>/dev/null; tail --pid="$(cat "$dir/pid")" -f /dev/null; }; }
trap 'stop; rm -rf "$dir"' EXIT
cat >"$dir/server.conf" <<CONF
server {
    bind_address = "127.0.0.1"
    bind_port = "18191"
    socket_path = "$dir/api.sock"
    trust_domain = "bench.test"
    data_dir = "$dir"
    log_level = "WARN"
}
plugins {
    DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = "$dir/datastore.sqlite3" } }
    KeyManager "memory" { plugin_data {} }
    NodeAttestor "join_token" { plugin_data {} }
}
CONF
load() { "$cache/bench/spireload" "$1" -label finial -td bench.test -admin "$dir/api.sock" "${@:2}"; }
start() {
    load start -as "start with $1" -ready server -log "$dir/log" -pidfile "$dir/pid" -settle 10s -- \
        "$CARGO_TARGET_DIR/release/finial" server run -config "$dir/server.conf"
}
start "no entries"
load entries-create -pid server="$(cat "$dir/pid")" -n "$entries" -fan 100 -batch 500 -c 1 -prefix /bench/m -uid 300000
stop
start "$entries entries"
load sample -as "idle with $entries entries" -pid server="$(cat "$dir/pid")" -settle 5s -d 20s
ls -l "$dir/datastore.sqlite3"
