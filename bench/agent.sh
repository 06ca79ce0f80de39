#!/usr/bin/env bash
# Measures our agent beside the real SPIRE's in one run, each below a server of its own kind, and prints one table: what an agent
# needs, what its workloads wait for, and what was to be reached.
#
#   bench/agent.sh [--only "fanout streams held many away attest"] [--bin DIR] [--out DIR]
#                  [--reps N] [--held N] [--many N] [--streams N] [--times N] [--pods N] [--port N]
#
# Builds what it needs (--bin takes finial, finial-agent, spireload and attestation from a folder instead). Loopback and unix sockets only. Takes
# about 20 minutes; wants root (dockerd, kubelet) and, for 10,000 streams, a hard limit of 41,000 open files.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${FINIAL_CACHE:-$HOME/.cache/finial}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$cache/target}
only='fanout streams held many away attest' bin='' out=$cache/bench/agent reps=100 held=10000 many=100000 streams='' times=100 pods=40 port=18280
while (($#)); do
	case $1 in
	--only) only=$2 ;;
	--bin) bin=$(realpath "$2") ;;
	--out) out=$2 ;;
	--reps | --held | --many | --streams | --times | --pods | --port) declare "${1#--}=$2" ;;
	*) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
	esac
	shift 2
done
wanted() { [[ " $only " == *" $1 "* ]]; }

tests/real-spire/build.sh
if [[ -z $bin ]]; then
	bin=$cache/bench/agent-bin
	mkdir -p "$bin"
	cargo build --release --locked -p finial -p finial-agent-bin
	cargo build --locked -p testkit --example attestation
	cp "$CARGO_TARGET_DIR"/release/{finial,finial-agent} "$CARGO_TARGET_DIR/debug/examples/attestation" "$bin"
	# Static: it is the workload in containers.
	(cd bench/spireload && CGO_ENABLED=0 GOFLAGS=-mod=mod go build -o "$bin/spireload" .)
fi
! wanted attest || tests/real-kube/build.sh
mkdir -p "$out" "$bin/names"
out=$(cd "$out" && pwd)
ln -f "$bin/finial" "$bin/names/spire-server" # called as the server, it is that program
spire=$cache/spire-1.15.3
labels=(spire finial) servers=("$spire/spire-server" "$bin/names/spire-server") agents=("$spire/spire-agent" "$bin/finial-agent")
load=$bin/spireload seconds=5 results=$out/results.jsonl
: >"$results"
ulimit -n "$(ulimit -Hn)"
# An agent has three files open for a connection, and lets one user have three quarters of what fits.
fits=$((($(ulimit -n) - 200) / 3 * 3 / 4))
streams=${streams:-$((fits < 10000 ? fits : 10000))}
. bench/common.sh
# A path of our own for sockets: those may have at most 107 bytes.
short=$(mktemp -d /tmp/fab.XXXXXX)
driver=''
# Whatever ends this script ends what it started; the driver ends what is its own when its standard input ends.
over() {
	[[ -z $run_dir ]] || stop_all
	[[ -z $driver ]] || { exec {to_driver}>&-; tail --pid="$driver" -f /dev/null; }
	rm -rf "$short"
}
trap over EXIT
trap 'exit 1' INT TERM
both() { for i in 0 1; do "$@"; done; }
stop_both() { both eval 'stop $i agent; stop $i server'; }

for i in 0 1; do
	echo "{\"op\":\"agent binary\",\"label\":\"${labels[i]}\",\"size_mib\":$(stat -Lc %s "${agents[i]}" | awk '{printf "%.2f", $1 / 1048576}')}" >>"$results"
done

if wanted fanout || wanted streams; then
	run_dir=$short/few
	both eval 'fresh $i "few: " ""'
	! wanted streams || both eval 'L $i streams wl-x509-hold -n "$streams" -settle 10s -d 10s'
	if wanted fanout; then
		for round in 1 2; do
			say "fanout, round $round"
			L 0 fanout rotation-fanout -n 200 -reps $(((reps + 19) / 20)) # takes seconds each time
			L 1 fanout rotation-fanout -n 200 -reps $(((reps + 1) / 2))
		done
	fi
	stop_both
fi

# What is kept on disk of ours, for a restart without a server.
keep() { # IDX
	((i == 1)) || return 0
	head -c 4096 /dev/zero | tr '\0' k >"$short/host.key"
	chmod 400 "$short/host.key"
	agent_experimental="offline_cache = \"host_key\" offline_cache_host_key_path = \"$short/host.key\""
}
# away AS: kills the agent while no server is there and starts it again.
away() {
	sleep 3 # what is held is on disk by then
	stop "$i" server
	for _ in 1 2 3 4 5; do
		stop "$i" agent KILL
		start_agent "$i" "$1" -settle 0s -limit 20s
		((i == 1)) || break # it will not be otherwise at the next time
	done
}

if wanted held; then
	run_dir=$short/held
	for i in 0 1; do
		fresh_server "$i" 'held: '
		L "$i" 'held: setup' entries-create -n "$held" -fan 100 -batch 500 -c 1 -prefix /bench/h -uid 300000
		sleep 6
		# Three times how long it takes, each time with nothing on disk; then what it needs, without an endpoint for metrics.
		for _ in 1 2 3; do
			more_keys="telemetry { Prometheus { host = \"127.0.0.1\" port = $((port + i * 10 + 3)) } }"
			new_agent "$i" 100000
			start_agent "$i" 'held: start' -ready cached -n "$held" -settle 0s
			more_keys=''
			stop "$i" agent
		done
		keep
		new_agent "$i" 100000
		start_agent "$i" 'held: agent start'
		L "$i" 'held: cached' agent-wait -n $((held + 1))
		L "$i" 'held: idle' sample -settle 10s -d 5s
		! wanted away || away 'away: restart, 10,000 SVIDs kept'
		agent_experimental=''
		stop "$i" agent
		stop "$i" server
	done
fi

if wanted away; then
	run_dir=$short/away
	for i in 0 1; do
		keep
		fresh "$i" 'away: ' ''
		away 'away: restart'
		agent_experimental=''
		stop "$i" agent
	done
fi

if wanted many; then
	run_dir=$short/many
	for i in 0 1; do
		fresh_server "$i" 'many: '
		L "$i" 'many: setup' entries-create -n "$many" -fan 100 -batch 500 -c 1 -prefix /bench/m -uid 300000
		new_agent "$i" ''
		sleep 6
		start_agent "$i" 'many: agent start' -settle 0s
		L "$i" 'many: cached' agent-wait -n 1000
		L "$i" 'many: idle' sample -settle 20s -d 40s
		stop "$i" agent
		stop "$i" server
	done
fi

run_dir=''
if wanted attest; then
	say 'attestation, with a dockerd, a kubelet and a bus'
	export FINIAL_BIN=$bin/finial
	exec {to_driver}> >(exec setsid "$bin/attestation" "$load" "${agents[1]}" "${agents[0]}" "$times" "$pods" >>"$results")
	driver=$!
	tail --pid="$driver" -f /dev/null
	driver=''
fi

"$load" goals "$results" | tee "$out/table.md"
say "rows: $results"
