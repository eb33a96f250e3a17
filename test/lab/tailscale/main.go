// Tailscale's own writer of netfilter, called as its router calls it when tailscaled starts (wgengine/router/osrouter):
// tailscaled itself writes nothing before somebody has logged in.
package main

import (
	"log"

	"tailscale.com/util/linuxfw"
)

const tun = "tailscale0"

func main() {
	runner, err := linuxfw.New(log.Printf, "iptables")
	if err != nil {
		log.Fatal(err)
	}
	// What an earlier run has left, if it has.
	for _, remove := range []func() error{
		func() error { return runner.DelHooks(log.Printf) },
		runner.DelBase,
		runner.DelChains,
		runner.DelConnmarkSaveRule,
	} {
		if err := remove(); err != nil {
			log.Print(err)
		}
	}
	for _, add := range []func() error{
		runner.AddChains,
		runner.AddHooks,
		func() error { return runner.AddBase(tun) },
		func() error { return runner.AddExternalCGNATRules(linuxfw.CGNATModeDrop, tun) },
		runner.AddSNATRule,
		func() error { return runner.AddStatefulRule(tun) },
		runner.AddConnmarkSaveRule,
	} {
		if err := add(); err != nil {
			log.Fatal(err)
		}
	}
}
