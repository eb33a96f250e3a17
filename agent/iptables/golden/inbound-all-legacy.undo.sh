#!/bin/sh
# vmmesh: takes the rules of this generation out again. Needs no Node.
here=$(cd "$(dirname "$0")" && pwd -P)
rules=$(dirname "$here")
mode="$1"
if [ "$mode" = after ]; then
  exec </dev/null >>"$here/undo.log" 2>&1
  sleep "$2"
fi
wait="-w $2"
[ "$mode" != after ] || wait=-w
iptables-legacy $wait -t nat -S OUTPUT >/dev/null || [ $? -ne 4 ] || exit 4
if [ "$mode" != now ]; then
  # Until the last program of this script has ended: who applies, repairs or cleans up waits for it.
  # A directory can be locked on a full disk, too.
  exec 9<"$rules"
  flock -w 60 9
  [ "$(readlink "$rules/trial")" = "$(basename "$here")" ] || exit 0
  mv -fT "$rules/trial" "$rules/undone" || exit 0
  # Claimed: now it has to be done, however long it takes.
  wait=-w
fi
failed=0
[ ! -e "$here/made.address" ] || ip -6 addr del ::6/128 dev lo || true
text=$(
  echo '*nat'
  echo ':ISTIO_REDIRECT - [0:0]'
  echo ':ISTIO_IN_REDIRECT - [0:0]'
  echo ':ISTIO_INBOUND - [0:0]'
  echo ':ISTIO_OUTPUT - [0:0]'
  echo ':ISTIO_OUTPUT_DNS - [0:0]'
  iptables-legacy $wait -t nat -S PREROUTING | sed -n 's/^-A \(.* -j \(ISTIO_REDIRECT\|ISTIO_IN_REDIRECT\|ISTIO_INBOUND\|ISTIO_OUTPUT\|ISTIO_OUTPUT_DNS\)\)$/-D \1/p'
  iptables-legacy $wait -t nat -S OUTPUT | sed -n 's/^-A \(.* -j \(ISTIO_REDIRECT\|ISTIO_IN_REDIRECT\|ISTIO_INBOUND\|ISTIO_OUTPUT\|ISTIO_OUTPUT_DNS\)\)$/-D \1/p'
  echo '-X ISTIO_REDIRECT'
  echo '-X ISTIO_IN_REDIRECT'
  echo '-X ISTIO_INBOUND'
  echo '-X ISTIO_OUTPUT'
  echo '-X ISTIO_OUTPUT_DNS'
  echo COMMIT
)
printf '%s\n' "$text" | iptables-legacy-restore --noflush $wait || failed=1
text=$(
  echo '*mangle'
  echo ':VMMESH_LEASE - [0:0]'
  iptables-legacy $wait -t mangle -S PREROUTING | sed -n 's/^-A \(.* -j \(VMMESH_LEASE\)\)$/-D \1/p'
  iptables-legacy $wait -t mangle -S OUTPUT | sed -n 's/^-A \(.* -j \(VMMESH_LEASE\)\)$/-D \1/p'
  echo '-X VMMESH_LEASE'
  echo COMMIT
)
printf '%s\n' "$text" | iptables-legacy-restore --noflush $wait || failed=1
text=$(
  echo '*raw'
  echo ':ISTIO_OUTPUT_DNS - [0:0]'
  echo ':ISTIO_INBOUND - [0:0]'
  iptables-legacy $wait -t raw -S PREROUTING | sed -n 's/^-A \(.* -j \(ISTIO_OUTPUT_DNS\|ISTIO_INBOUND\)\)$/-D \1/p'
  iptables-legacy $wait -t raw -S OUTPUT | sed -n 's/^-A \(.* -j \(ISTIO_OUTPUT_DNS\|ISTIO_INBOUND\)\)$/-D \1/p'
  echo '-X ISTIO_OUTPUT_DNS'
  echo '-X ISTIO_INBOUND'
  echo COMMIT
)
printf '%s\n' "$text" | iptables-legacy-restore --noflush $wait || failed=1
text=$(
  echo '*nat'
  echo ':ISTIO_REDIRECT - [0:0]'
  echo ':ISTIO_IN_REDIRECT - [0:0]'
  echo ':ISTIO_INBOUND - [0:0]'
  echo ':ISTIO_OUTPUT - [0:0]'
  echo ':ISTIO_OUTPUT_DNS - [0:0]'
  ip6tables-legacy $wait -t nat -S PREROUTING | sed -n 's/^-A \(.* -j \(ISTIO_REDIRECT\|ISTIO_IN_REDIRECT\|ISTIO_INBOUND\|ISTIO_OUTPUT\|ISTIO_OUTPUT_DNS\)\)$/-D \1/p'
  ip6tables-legacy $wait -t nat -S OUTPUT | sed -n 's/^-A \(.* -j \(ISTIO_REDIRECT\|ISTIO_IN_REDIRECT\|ISTIO_INBOUND\|ISTIO_OUTPUT\|ISTIO_OUTPUT_DNS\)\)$/-D \1/p'
  echo '-X ISTIO_REDIRECT'
  echo '-X ISTIO_IN_REDIRECT'
  echo '-X ISTIO_INBOUND'
  echo '-X ISTIO_OUTPUT'
  echo '-X ISTIO_OUTPUT_DNS'
  echo COMMIT
)
printf '%s\n' "$text" | ip6tables-legacy-restore --noflush $wait || failed=1
text=$(
  echo '*mangle'
  echo ':VMMESH_LEASE - [0:0]'
  ip6tables-legacy $wait -t mangle -S PREROUTING | sed -n 's/^-A \(.* -j \(VMMESH_LEASE\)\)$/-D \1/p'
  ip6tables-legacy $wait -t mangle -S OUTPUT | sed -n 's/^-A \(.* -j \(VMMESH_LEASE\)\)$/-D \1/p'
  echo '-X VMMESH_LEASE'
  echo COMMIT
)
printf '%s\n' "$text" | ip6tables-legacy-restore --noflush $wait || failed=1
text=$(
  echo '*raw'
  echo ':ISTIO_OUTPUT_DNS - [0:0]'
  echo ':ISTIO_INBOUND - [0:0]'
  ip6tables-legacy $wait -t raw -S PREROUTING | sed -n 's/^-A \(.* -j \(ISTIO_OUTPUT_DNS\|ISTIO_INBOUND\)\)$/-D \1/p'
  ip6tables-legacy $wait -t raw -S OUTPUT | sed -n 's/^-A \(.* -j \(ISTIO_OUTPUT_DNS\|ISTIO_INBOUND\)\)$/-D \1/p'
  echo '-X ISTIO_OUTPUT_DNS'
  echo '-X ISTIO_INBOUND'
  echo COMMIT
)
printf '%s\n' "$text" | ip6tables-legacy-restore --noflush $wait || failed=1
if [ "$mode" != now ] && [ -e "$rules/confirmed" ]; then
  [ ! -e "$rules/confirmed/load.sh" ] || sh "$rules/confirmed/load.sh" || failed=1
  [ ! -e "$rules/confirmed/boot.nft" ] || nft -f "$rules/confirmed/boot.nft" || failed=1
  [ ! -e "$rules/confirmed/routing.sh" ] || sh "$rules/confirmed/routing.sh" || failed=1
fi
exit $failed
