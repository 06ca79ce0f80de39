# What the load runs share: servers and agents of each implementation, started and ended by their own pids. To be sourced by a
# script that sets: servers agents labels (arrays, one of each an implementation), load (the generator), port, seconds, results
# (the file that gets the rows), and run_dir once there is something to start. OUT/... of a phase is run_dir/LABEL.
n=${#labels[@]}
td=bench.test
run_dir=''
profile=${profile:-}
agent_keys=''         # more lines for the agent's `agent { }`
agent_experimental='' # and for its `experimental { }`
more_keys=''          # and for the file itself

say() { echo "[$(date +%T)] $*" >&2; }
dir() { echo "$run_dir/${labels[$1]}"; }
pid_of() { cat "$(dir "$1")/$2.pid" 2>/dev/null || true; }

# stop IDX server|agent [SIGNAL]: ends the process this script started, by its pid.
stop() {
	local pid; pid=$(pid_of "$1" "$2")
	[[ -n $pid ]] || return 0
	rm -f "$(dir "$1")/$2.pid"
	kill -"${3:-TERM}" "$pid" 2>/dev/null || return 0
	for _ in {1..150}; do kill -0 "$pid" 2>/dev/null || return 0; sleep .1; done
	kill -9 "$pid" 2>/dev/null || true
}
stop_all() { for ((j = 0; j < n; j++)); do stop $j agent; stop $j server; done; }
trap '[[ -z $run_dir ]] || stop_all' EXIT

# L IDX AS COMMAND [FLAGS...]: one load; its JSON line goes to the results.
L() {
	local i=$1 as=$2 cmd=$3 d pids=() p; shift 3
	d=$(dir "$i")
	for p in server agent; do [[ -z $(pid_of "$i" $p) ]] || pids+=(-pid "$p=$(pid_of "$i" $p)"); done
	"$load" "$cmd" -label "${labels[$i]}" -as "$as" -td $td -server "127.0.0.1:$((port + i * 10))" \
		-admin "$d/server.sock" -wl "$d/public/agent.sock" -agent-admin "$d/admin/admin.sock" -identity "$d/identity.pem" \
		-metrics "127.0.0.1:$((port + i * 10 + 3))" "${pids[@]}" -d "${seconds}s" "$@" | tee -a "$results" >&2 ||
		say "${labels[$i]} $as failed"
}

write_server_conf() {
	local d=$1 i=$2 prof=''
	[[ -z $profile ]] || prof="profiling_enabled = true
  profiling_port = $((port + i * 10 + 1))"
	cat >"$d/server.conf" <<-EOF
	server {
	  bind_address = "127.0.0.1"
	  bind_port = "$((port + i * 10))"
	  socket_path = "$d/server.sock"
	  trust_domain = "$td"
	  data_dir = "$d/data-server"
	  log_level = "INFO"
	  ca_key_type = "ec-p256"
	  jwt_key_type = "ec-p256"
	  default_x509_svid_ttl = "1h"
	  ratelimit { attestation = false signing = false }
	  $prof
	}
	plugins {
	  DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = "$d/data-server/datastore.sqlite3" } }
	  KeyManager "disk" { plugin_data { keys_path = "$d/data-server/keys.json" } }
	  NodeAttestor "join_token" { plugin_data {} }
	}
	EOF
}
write_agent_conf() {
	local d=$1 i=$2 token=$3 cache=$4 prof='' size=''
	[[ -z $profile ]] || prof="profiling_enabled = true
  profiling_port = $((port + i * 10 + 2))"
	[[ -z $cache ]] || size="x509_svid_cache_max_size = $cache"
	cat >"$d/agent.conf" <<-EOF
	agent {
	  data_dir = "$d/data-agent"
	  log_level = "INFO"
	  server_address = "127.0.0.1"
	  server_port = "$((port + i * 10))"
	  socket_path = "$d/public/agent.sock"
	  admin_socket_path = "$d/admin/admin.sock"
	  insecure_bootstrap = true
	  trust_domain = "$td"
	  join_token = "$token"
	  $size
	  $prof
	  $agent_keys
	  experimental { $agent_experimental }
	}
	plugins {
	  NodeAttestor "join_token" { plugin_data {} }
	  KeyManager "disk" { plugin_data { directory = "$d/data-agent" } }
	  WorkloadAttestor "unix" { plugin_data {} }
	}
	$more_keys
	EOF
}

start_server() { # IDX AS
	local d; d=$(dir "$1")
	L "$1" "$2" start -ready server -log "$d/server.log" -pidfile "$d/server.pid" -settle 5s -- \
		"${servers[$1]}" run -config "$d/server.conf"
}
start_agent() { # IDX AS [FLAGS of start...]
	local i=$1 as=$2 d; shift 2
	d=$(dir "$i")
	L "$i" "$as" start -ready agent -log "$d/agent.log" -pidfile "$d/agent.pid" -settle 5s "$@" -- \
		"${agents[$i]}" run -config "$d/agent.conf"
}

# new_agent IDX CACHE: the configuration of an agent that has never run, with a token of its own and nothing on disk.
new_agent() {
	local d token; d=$(dir "$1")
	rm -rf "$d/data-agent"; mkdir -p "$d/data-agent" "$d/admin" "$d/public"
	token=$("$load" token -td $td -admin "$d/server.sock" | sed -n 's/.*"token":"\([^"]*\)".*/\1/p')
	write_agent_conf "$d" "$1" "$token" "$2"
}

# fresh_server IDX AS-PREFIX: a new trust domain with a running server and one entry that matches this user.
fresh_server() {
	local i=$1 as=$2 d; d=$(dir "$i")
	rm -rf "$d"; mkdir -p "$d/data-server"
	write_server_conf "$d" "$i"
	start_server "$i" "${as}server start (new)"
	L "$i" "${as}setup" entries-create -uid -1 >/dev/null 2>&1
}

# fresh IDX AS-PREFIX CACHE: the same with an agent.
fresh() {
	fresh_server "$1" "$2"
	new_agent "$1" "$3"
	sleep 6 # the server may serve agents from a cache reloaded every 5 s
	start_agent "$1" "${2}agent start (new)"
}
