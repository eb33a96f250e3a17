#!/bin/sh
# vmmesh: takes the rules of this generation out again. Needs no Node.
here=$(cd "$(dirname "$0")" && pwd -P)
rules=$(dirname "$here")
mode="$1"
if [ "$mode" = after ]; then
  exec </dev/null >>"$here/undo.log" 2>&1
  sleep "$2"
fi
if [ "$mode" != now ]; then
  # Until the last program of this script has ended: who applies, repairs or cleans up waits for it.
  # A directory can be locked on a full disk, too.
  exec 9<"$rules"
  flock -w 60 9
  [ "$(readlink "$rules/trial")" = "$(basename "$here")" ] || exit 0
  mv -fT "$rules/trial" "$rules/undone" || exit 0
fi
failed=0
# Guard and fence of a former generation come back in the transaction that takes these out: nothing slips between.
former=/dev/null
[ "$mode" = now ] || [ ! -e "$rules/confirmed/boot.nft" ] || former="$rules/confirmed/boot.nft"
{
  cat <<'END'
add table ip vmmesh
delete table ip vmmesh
add table ip6 vmmesh
delete table ip6 vmmesh
add table inet vmmesh-fence
delete table inet vmmesh-fence
END
  cat "$former"
} | if [ "$mode" != now ] && [ -e "$rules/confirmed/scope.sh" ]; then
  sh "$rules/confirmed/scope.sh" load
else
  nft -f -
fi || failed=1
[ ! -e "$here/made.address" ] || ip -6 addr del ::6/128 dev lo || true
text=$(
  echo '*nat'
  echo ':ISTIO_REDIRECT - [0:0]'
  echo ':ISTIO_IN_REDIRECT - [0:0]'
  echo ':ISTIO_INBOUND - [0:0]'
  echo ':ISTIO_OUTPUT - [0:0]'
  echo ':ISTIO_OUTPUT_DNS - [0:0]'
  iptables-nft -t nat -S PREROUTING | sed -n 's/^-A \(.* -j \(ISTIO_REDIRECT\|ISTIO_IN_REDIRECT\|ISTIO_INBOUND\|ISTIO_OUTPUT\|ISTIO_OUTPUT_DNS\)\)$/-D \1/p'
  iptables-nft -t nat -S OUTPUT | sed -n 's/^-A \(.* -j \(ISTIO_REDIRECT\|ISTIO_IN_REDIRECT\|ISTIO_INBOUND\|ISTIO_OUTPUT\|ISTIO_OUTPUT_DNS\)\)$/-D \1/p'
  echo '-X ISTIO_REDIRECT'
  echo '-X ISTIO_IN_REDIRECT'
  echo '-X ISTIO_INBOUND'
  echo '-X ISTIO_OUTPUT'
  echo '-X ISTIO_OUTPUT_DNS'
  echo COMMIT
)
printf '%s\n' "$text" | iptables-nft-restore --noflush || failed=1
# The table was not there before us: it goes if nobody else has put anything into it.
if [ -e "$here/made.ip.nat" ] && ! iptables-nft-save -t nat | grep -q '^-A\|^:[^ ]* - \|incompatible'; then
  nft delete table ip nat
fi
text=$(
  echo '*mangle'
  echo ':VMMESH_LEASE - [0:0]'
  iptables-nft -t mangle -S PREROUTING | sed -n 's/^-A \(.* -j \(VMMESH_LEASE\)\)$/-D \1/p'
  iptables-nft -t mangle -S OUTPUT | sed -n 's/^-A \(.* -j \(VMMESH_LEASE\)\)$/-D \1/p'
  echo '-X VMMESH_LEASE'
  echo COMMIT
)
printf '%s\n' "$text" | iptables-nft-restore --noflush || failed=1
# The table was not there before us: it goes if nobody else has put anything into it.
if [ -e "$here/made.ip.mangle" ] && ! iptables-nft-save -t mangle | grep -q '^-A\|^:[^ ]* - \|incompatible'; then
  nft delete table ip mangle
fi
text=$(
  echo '*raw'
  echo ':ISTIO_OUTPUT_DNS - [0:0]'
  echo ':ISTIO_INBOUND - [0:0]'
  iptables-nft -t raw -S PREROUTING | sed -n 's/^-A \(.* -j \(ISTIO_OUTPUT_DNS\|ISTIO_INBOUND\)\)$/-D \1/p'
  iptables-nft -t raw -S OUTPUT | sed -n 's/^-A \(.* -j \(ISTIO_OUTPUT_DNS\|ISTIO_INBOUND\)\)$/-D \1/p'
  echo '-X ISTIO_OUTPUT_DNS'
  echo '-X ISTIO_INBOUND'
  echo COMMIT
)
printf '%s\n' "$text" | iptables-nft-restore --noflush || failed=1
# The table was not there before us: it goes if nobody else has put anything into it.
if [ -e "$here/made.ip.raw" ] && ! iptables-nft-save -t raw | grep -q '^-A\|^:[^ ]* - \|incompatible'; then
  nft delete table ip raw
fi
text=$(
  echo '*nat'
  echo ':ISTIO_REDIRECT - [0:0]'
  echo ':ISTIO_IN_REDIRECT - [0:0]'
  echo ':ISTIO_INBOUND - [0:0]'
  echo ':ISTIO_OUTPUT - [0:0]'
  echo ':ISTIO_OUTPUT_DNS - [0:0]'
  ip6tables-nft -t nat -S PREROUTING | sed -n 's/^-A \(.* -j \(ISTIO_REDIRECT\|ISTIO_IN_REDIRECT\|ISTIO_INBOUND\|ISTIO_OUTPUT\|ISTIO_OUTPUT_DNS\)\)$/-D \1/p'
  ip6tables-nft -t nat -S OUTPUT | sed -n 's/^-A \(.* -j \(ISTIO_REDIRECT\|ISTIO_IN_REDIRECT\|ISTIO_INBOUND\|ISTIO_OUTPUT\|ISTIO_OUTPUT_DNS\)\)$/-D \1/p'
  echo '-X ISTIO_REDIRECT'
  echo '-X ISTIO_IN_REDIRECT'
  echo '-X ISTIO_INBOUND'
  echo '-X ISTIO_OUTPUT'
  echo '-X ISTIO_OUTPUT_DNS'
  echo COMMIT
)
printf '%s\n' "$text" | ip6tables-nft-restore --noflush || failed=1
# The table was not there before us: it goes if nobody else has put anything into it.
if [ -e "$here/made.ip6.nat" ] && ! ip6tables-nft-save -t nat | grep -q '^-A\|^:[^ ]* - \|incompatible'; then
  nft delete table ip6 nat
fi
text=$(
  echo '*mangle'
  echo ':VMMESH_LEASE - [0:0]'
  ip6tables-nft -t mangle -S PREROUTING | sed -n 's/^-A \(.* -j \(VMMESH_LEASE\)\)$/-D \1/p'
  ip6tables-nft -t mangle -S OUTPUT | sed -n 's/^-A \(.* -j \(VMMESH_LEASE\)\)$/-D \1/p'
  echo '-X VMMESH_LEASE'
  echo COMMIT
)
printf '%s\n' "$text" | ip6tables-nft-restore --noflush || failed=1
# The table was not there before us: it goes if nobody else has put anything into it.
if [ -e "$here/made.ip6.mangle" ] && ! ip6tables-nft-save -t mangle | grep -q '^-A\|^:[^ ]* - \|incompatible'; then
  nft delete table ip6 mangle
fi
text=$(
  echo '*raw'
  echo ':ISTIO_OUTPUT_DNS - [0:0]'
  echo ':ISTIO_INBOUND - [0:0]'
  ip6tables-nft -t raw -S PREROUTING | sed -n 's/^-A \(.* -j \(ISTIO_OUTPUT_DNS\|ISTIO_INBOUND\)\)$/-D \1/p'
  ip6tables-nft -t raw -S OUTPUT | sed -n 's/^-A \(.* -j \(ISTIO_OUTPUT_DNS\|ISTIO_INBOUND\)\)$/-D \1/p'
  echo '-X ISTIO_OUTPUT_DNS'
  echo '-X ISTIO_INBOUND'
  echo COMMIT
)
printf '%s\n' "$text" | ip6tables-nft-restore --noflush || failed=1
# The table was not there before us: it goes if nobody else has put anything into it.
if [ -e "$here/made.ip6.raw" ] && ! ip6tables-nft-save -t raw | grep -q '^-A\|^:[^ ]* - \|incompatible'; then
  nft delete table ip6 raw
fi
if [ "$mode" != now ] && [ -e "$rules/confirmed" ]; then
  [ ! -e "$rules/confirmed/load.sh" ] || sh "$rules/confirmed/load.sh" || failed=1
  [ ! -e "$rules/confirmed/routing.sh" ] || sh "$rules/confirmed/routing.sh" || failed=1
fi
exit $failed
