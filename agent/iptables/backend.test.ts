import { describe, expect, test } from "vitest";
import { type BackendEvidence, nftRulesMatter, settleBackend } from "./backend.ts";

const none: BackendEvidence = { installed: true, rules: 0, natRules: 0, kubernetes: false };
const absent: BackendEvidence = { ...none, installed: false };

describe("the backend that the machine really uses", () => {
  test.for([
    { name: "only nft", nft: none, legacy: absent, plain: "nft", want: "nft" },
    { name: "only legacy", nft: absent, legacy: none, plain: "legacy", want: "legacy" },
    { name: "no iptables at all", nft: absent, legacy: absent, plain: undefined, want: undefined },
    {
      name: "kubelet's hint wins over the number of rules",
      nft: { ...none, rules: 50 },
      legacy: { ...none, rules: 1, kubernetes: true },
      plain: "nft",
      want: "legacy",
    },
    {
      name: "nat rules in both: nft, because the guard is ahead of both",
      nft: { ...none, rules: 1, natRules: 1 },
      legacy: { ...none, rules: 9, natRules: 9 },
      plain: "legacy",
      want: "nft",
    },
    { name: "the one that is used", nft: none, legacy: { ...none, rules: 3 }, plain: "nft", want: "legacy" },
    // Somebody's detector had asked legacy for its nat table: registered, empty, and Istio's own detection flipped to it.
    {
      name: "registered but empty legacy tables do not count",
      nft: none,
      legacy: none,
      plain: "nft",
      want: "nft",
    },
  ] as const)("$name", ({ nft, legacy, plain, want }) => {
    const chosen = (of: BackendEvidence) =>
      settleBackend("auto", { nft: of, legacy, plainIs: plain, nftables: true }).backend;
    expect(chosen(nft)).toBe(want);
    if (nftRulesMatter(legacy, plain)) return;
    for (const rules of [0, 1, 50_000])
      for (const kubernetes of [true, false])
        expect(chosen({ ...nft, rules, natRules: rules, kubernetes })).toBe(want);
  });

  test("nft's rules are read where legacy holds something, or is what `iptables` means", () => {
    expect(nftRulesMatter(none, "nft")).toBe(false);
    expect(nftRulesMatter(absent, "nft")).toBe(false);
    expect(nftRulesMatter(none, "legacy")).toBe(true);
    expect(nftRulesMatter({ ...none, rules: 1 }, "nft")).toBe(true);
    expect(nftRulesMatter({ ...none, kubernetes: true }, "nft")).toBe(true);
  });
});

describe("a backend that somebody asked for", () => {
  const facts = { nft: { ...none, rules: 9 }, legacy: none, plainIs: "nft", nftables: true } as const;
  test.for([
    { wished: "legacy", backend: "legacy" },
    { wished: "nft", backend: "nft" },
    { wished: "nftables", backend: undefined },
  ] as const)("$wished is taken, whatever the machine uses", ({ wished, backend }) => {
    expect(settleBackend(wished, facts)).toEqual({ backend, why: "it was asked for" });
  });

  const noModule =
    "iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Operation not supported";
  test.for([
    {
      name: "legacy without its program",
      wished: "legacy",
      facts: { ...facts, legacy: absent },
      says: "there is no program `iptables-legacy`",
      next: "Install the package `iptables`",
    },
    {
      name: "nft on a kernel without nf_tables",
      wished: "nft",
      facts: { ...facts, nft: { ...absent, fault: noModule } },
      says: "`iptables-nft` cannot use this kernel",
      next: "Load the kernel modules",
    },
    {
      name: "nftables without nft",
      wished: "nftables",
      facts: { ...facts, nftables: false },
      says: "there is no program `nft`",
      next: "Install the package `nftables`",
    },
    {
      name: "nftables on a kernel that lacks a part of it",
      wished: "nftables",
      facts: { ...facts, nftables: false, fault: "Error: Could not process rule: No such file or directory" },
      says: "`nft` cannot use this kernel",
      next: "--backend auto",
    },
  ] as const)("$name is refused with the next step", ({ wished, facts: found, says, next }) => {
    expect(() => settleBackend(wished, found)).toThrow(
      expect.objectContaining({
        code: "RULES_REJECTED",
        message: expect.stringContaining(says),
        next: expect.stringContaining(next),
      }),
    );
  });
});
