// Calico's own keeper of its place in netfilter: Felix's iptables tables in insert mode, driven as Felix's main loop drives
// them (dataplane/linux/int_dataplane.go), with the chains that Felix writes on a machine without host endpoints
// (rules/static.go). Felix itself wants Calico's datastore before it writes anything.
package main

import (
	"log"
	"os"
	"sync"
	"time"

	"github.com/projectcalico/calico/felix/environment"
	"github.com/projectcalico/calico/felix/iptables"
	"github.com/projectcalico/calico/felix/logutils"
)

const (
	prefix = "cali-"
	accept = 0x10000
	marks  = 0xf0000
	// Felix's default (config/config_params.go: IptablesPostWriteCheckIntervalSecs); it doubles after each look.
	postWrite = 5 * time.Second
)

func jump(to string) iptables.Rule {
	return iptables.Rule{Action: iptables.JumpAction{Target: prefix + to}}
}

func chain(name string, rules ...iptables.Rule) *iptables.Chain {
	return &iptables.Chain{Name: prefix + name, Rules: rules}
}

// A floating address leads to a workload, as with OpenStack; without one the chain is empty.
func natChains(floating, workload string) []*iptables.Chain {
	dnat := chain("fip-dnat")
	if floating != "" {
		dnat.Rules = []iptables.Rule{{
			Match:  iptables.Match().DestNet(floating + "/32"),
			Action: iptables.DNATAction{DestAddr: workload},
		}}
	}
	return []*iptables.Chain{
		chain("PREROUTING", jump("fip-dnat")),
		chain("OUTPUT", jump("fip-dnat")),
		chain("POSTROUTING", jump("fip-snat"), jump("nat-outgoing")),
		dnat,
		chain("fip-snat"),
		chain("nat-outgoing"),
	}
}

func rawChains() []*iptables.Chain {
	clear := iptables.Rule{Action: iptables.ClearMarkAction{Mark: marks}}
	done := iptables.Rule{Match: iptables.Match().MarkSingleBitSet(accept), Action: iptables.AcceptAction{}}
	return []*iptables.Chain{
		chain("PREROUTING", clear, jump("from-host-endpoint"), done),
		chain("OUTPUT", clear, jump("to-host-endpoint"), done),
		chain("from-host-endpoint"),
		chain("to-host-endpoint"),
	}
}

func main() {
	if len(os.Args) != 2 && len(os.Args) != 4 {
		log.Fatal("usage: keeper REFRESH [FLOATING WORKLOAD]")
	}
	refresh, err := time.ParseDuration(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	floating, workload := "", ""
	if len(os.Args) == 4 {
		floating, workload = os.Args[2], os.Args[3]
	}
	table := func(name string) *iptables.Table {
		return iptables.NewTable(name, 4, "cali:", &sync.Mutex{}, environment.NewFeatureDetector(nil), iptables.TableOptions{
			HistoricChainPrefixes: []string{prefix},
			BackendMode:           "nft",
			InsertMode:            "insert",
			RefreshInterval:       refresh,
			PostWriteInterval:     postWrite,
			LockProbeInterval:     50 * time.Millisecond,
			OpRecorder:            logutils.NewSummarizer("keeper"),
		})
	}
	nat, raw := table("nat"), table("raw")
	nat.UpdateChains(natChains(floating, workload))
	for _, hook := range []string{"PREROUTING", "OUTPUT", "POSTROUTING"} {
		nat.InsertOrAppendRules(hook, []iptables.Rule{jump(hook)})
	}
	raw.UpdateChains(rawChains())
	for _, hook := range []string{"PREROUTING", "OUTPUT"} {
		raw.InsertOrAppendRules(hook, []iptables.Rule{jump(hook)})
	}
	for {
		after := nat.Apply()
		if again := raw.Apply(); again > 0 && (after <= 0 || again < after) {
			after = again
		}
		time.Sleep(max(after, time.Millisecond))
	}
}
