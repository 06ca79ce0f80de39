#!/usr/bin/env bash
# Measures one Finial server under a fleet of agents, all on this machine and on SQLite:
#
#   bench/fleet.sh [options of the program, such as --agents 10000 --idle 30 --csrs 100000 --batch 500]
#
# `bench/fleet` says what it simulates. PROFILE=dev takes the debug build: for trying it out, not for figures.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${FINIAL_CACHE:-$HOME/.cache/finial}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$cache/target}
profile=${PROFILE:-release}
cargo build --profile "$profile" -p finial -p fleet
[[ $profile == dev ]] && folder=debug || folder=$profile
bin=$CARGO_TARGET_DIR/$folder
ulimit -n "$(ulimit -Hn)"
dir=$(mktemp -d)
cat >"$dir/server.conf" <<CONF
server {
    bind_address = "127.0.0.1"
    bind_port = "18181"
    socket_path = "$dir/api.sock"
    trust_domain = "fleet.test"
    data_dir = "$dir"
    log_level = "WARN"
    ratelimit {
        attestation = false
        signing = false
    }
}
plugins {
    DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = "$dir/datastore.sqlite3" } }
    KeyManager "memory" { plugin_data {} }
    NodeAttestor "join_token" { plugin_data {} }
}
CONF
"$bin/finial" server run -config "$dir/server.conf" >"$dir/server.log" 2>&1 &
pid=$!
trap 'kill $pid 2>/dev/null; wait $pid 2>/dev/null; rm -rf "$dir"' EXIT
for _ in {1..100}; do [[ -S $dir/api.sock ]] && break; sleep .1; done
[[ -S $dir/api.sock ]] || { cat "$dir/server.log" >&2; exit 1; }
"$bin/fleet" --address 127.0.0.1:18181 --socket "$dir/api.sock" --trust-domain fleet.test --pid "$pid" "$@" || { tail "$dir/server.log" >&2; exit 1; }
