#!/bin/sh
# vmmesh: what the application answers to a client's address comes back to Envoy (TPROXY).
lay() { echo "$1"; shift; [ "$mode" = check ] || "$@"; }
mode=$1
ip -N -4 rule show | grep -q '^133:.* lookup 133 proto 133 *$' ||
  lay "the IPv4 rule for Istio's mark was missing" ip -4 rule add priority 133 fwmark 0x539/0xfff lookup 133 protocol 133 || exit 1
ip -4 route show table 133 2>/dev/null | grep -q '^local default dev lo ' ||
  lay "the IPv4 route in table 133 was missing" ip -4 route add local default dev lo table 133 proto 133 || exit 1
ip -N -6 rule show | grep -q '^133:.* lookup 133 proto 133 *$' ||
  lay "the IPv6 rule for Istio's mark was missing" ip -6 rule add priority 133 fwmark 0x539/0xfff lookup 133 protocol 133 || exit 1
ip -6 route show table 133 2>/dev/null | grep -q '^local default dev lo ' ||
  lay "the IPv6 route in table 133 was missing" ip -6 route add local default dev lo table 133 proto 133 || exit 1
exit 0
