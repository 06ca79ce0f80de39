package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
)

// goal is a figure of an agent with the most it may be.
type goal struct {
	op, field  string
	what, unit string
	most       float64
	stretch    bool // nice to have, no miss
	worst      bool // of several rounds: the worst instead of the median
}

// agentGoals are the figures of agent.sh, in the order of its table.
var agentGoals = []goal{
	{op: "fanout", field: "p50_ms", what: "entry changed at the server to all 200 streams updated, p50", unit: "ms", most: 100},
	{op: "fanout", field: "p99_ms", what: "the same, p99", unit: "ms", most: 100, worst: true},
	{op: "fanout", field: "max_ms", what: "the same, max", unit: "ms", worst: true},
	{op: "held: start", field: "ms", what: "start to 10,000 SVIDs held", unit: "ms", most: 2000},
	{op: "held: idle", field: "anon_agent", what: "holding 10,000 SVIDs, anonymous", unit: "MiB", most: 40},
	{op: "held: idle", field: "hwm_agent", what: "the same, most ever resident", unit: "MiB"},
	{op: "many: idle", field: "idle_cpu_pct_agent", what: "authorised for 100,000 entries, nothing happening", unit: "% of a core", most: .2},
	{op: "many: idle", field: "anon_agent", what: "the same, anonymous", unit: "MiB", most: 60},
	{op: "streams", field: "streams", what: "how many of them", unit: "streams"},
	{op: "streams", field: "anon_kib_per_stream_agent", what: "streams held, a connection each (as many as there may be files): anonymous, each", unit: "KiB", most: 28},
	{op: "streams", field: "anon_kib_per_stream_agent", what: "the same, stretch", unit: "KiB", most: 16, stretch: true},
	{op: "streams", field: "idle_cpu_pct_agent", what: "the same, CPU while nothing happens", unit: "% of a core"},
	{op: "away: restart", field: "ms", what: "restart with no server reachable: start to first SVID served", unit: "ms", most: 1000, worst: true},
	{op: "away: restart, 10,000 SVIDs kept", field: "ms", what: "the same with 10,000 SVIDs kept", unit: "ms", most: 1000, worst: true},
	{op: "attest unix", field: "p50_ms", what: "a new process (unix): first question to first SVID, p50", unit: "ms"},
	{op: "attest unix", field: "p99_ms", what: "the same, p99", unit: "ms", most: 100},
	{op: "attest systemd", field: "p50_ms", what: "a new process of a unit (systemd), p50", unit: "ms"},
	{op: "attest systemd", field: "p99_ms", what: "the same, p99", unit: "ms", most: 100},
	{op: "attest docker", field: "p50_ms", what: "a new container (docker), p50", unit: "ms"},
	{op: "attest docker", field: "p99_ms", what: "the same, p99", unit: "ms", most: 100},
	{op: "attest k8s", field: "p50_ms", what: "a new pod (k8s), SPIRE's keys alone, p50", unit: "ms"},
	{op: "attest k8s", field: "p99_ms", what: "the same, p99", unit: "ms"},
	{op: "attest k8s cri", field: "p50_ms", what: "a new pod (k8s), with cri_socket_path, p50", unit: "ms"},
	{op: "attest k8s cri", field: "p99_ms", what: "the same, p99", unit: "ms", most: 100},
	{op: "idle, all attestors", field: "anon_agent", what: "idle with all attestors on, anonymous", unit: "MiB", most: 5},
	{op: "idle, all attestors", field: "rss_agent", what: "the same, RSS", unit: "MiB", most: 15},
	{op: "agent binary", field: "size_mib", what: "the agent's binary", unit: "MiB", most: 12},
}

// goals prints what a run of agent.sh found: the first label beside the
// second, and whether the second has arrived.
func goals(files []string, w io.Writer) error {
	found := map[string][]row{} // by op
	var labels []string
	busy := 0.0
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		for sc := bufio.NewScanner(f); sc.Scan(); {
			r := row{}
			if json.Unmarshal(sc.Bytes(), &r) != nil {
				continue
			}
			op, _ := r["op"].(string)
			label, _ := r["label"].(string)
			found[op] = append(found[op], r)
			if !slices.Contains(labels, label) {
				labels = append(labels, label)
			}
			if b, ok := r["cpu_others_pct"].(float64); ok {
				busy = max(busy, b)
			}
		}
		f.Close()
	}
	if len(labels) != 2 {
		return fmt.Errorf("goals: want rows of two labels, found %v", labels)
	}
	fmt.Fprintf(w, "| work | %s | %s | ratio | reach |  |\n|---|---:|---:|---:|---:|---|\n", labels[0], labels[1])
	for _, g := range agentGoals {
		theirs, a, _ := g.of(found[g.op], labels[0])
		ours, b, ok := g.of(found[g.op], labels[1])
		ratio, reach, verdict := "-", "", ""
		if a > 0 && b > 0 {
			ratio = fmt.Sprintf("%.3g", b/a)
		}
		if g.most > 0 {
			reach = fmt.Sprintf("≤ %v", g.most)
			switch {
			case !ok:
				verdict = "not measured"
			case b <= g.most:
				verdict = "there"
			case !g.stretch:
				verdict = "MISSED"
			}
		}
		fmt.Fprintf(w, "| %s, %s | %s | %s | %s | %s | %s |\n", g.what, g.unit, theirs, ours, ratio, reach, verdict)
	}
	fmt.Fprintf(w, "\nOthers took at most %.0f %% of the machine during a row.\n", busy)
	return nil
}

// of is the figure of a label as it is printed, and its value if it has one.
func (g goal) of(rows []row, label string) (string, float64, bool) {
	var vals []float64
	text := "-"
	for _, r := range rows {
		if r["label"] != label {
			continue
		}
		if v, ok := r[g.field].(float64); ok {
			vals = append(vals, v)
		} else if e, ok := r["error"].(string); ok {
			text = e
		}
	}
	if len(vals) == 0 {
		return text, 0, false
	}
	v := median(vals)
	if g.worst {
		v = slices.Max(vals)
	}
	return show(v), v, true
}
