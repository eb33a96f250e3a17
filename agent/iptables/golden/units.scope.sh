#!/bin/sh
# vmmesh: keeps the cgroups of chosen units in the sets of guard and fence. Needs no Node.
exec 9>/run/vmmesh-scope.lock
flock 9
unit_0() {
  [ -d '/sys/fs/cgroup/system.slice/app.service' ] || return 0
  echo 'add element ip vmmesh units_only_2 { "system.slice/app.service" }'
  echo 'add element ip6 vmmesh units_only_2 { "system.slice/app.service" }'
  echo 'add element inet vmmesh-fence units_only_2 { "system.slice/app.service" }'
}
unit_1() {
  [ -d '/sys/fs/cgroup/system.slice/system-db.slice/db@1.service' ] || return 0
  echo 'add element ip vmmesh units_only_3 { "system.slice/system-db.slice/db@1.service" }'
  echo 'add element ip6 vmmesh units_only_3 { "system.slice/system-db.slice/db@1.service" }'
  echo 'add element inet vmmesh-fence units_only_3 { "system.slice/system-db.slice/db@1.service" }'
}
unit_2() {
  [ -d '/sys/fs/cgroup/system.slice/x.service' ] || return 0
  echo 'add element ip vmmesh units_never_2 { "system.slice/x.service" }'
  echo 'add element ip6 vmmesh units_never_2 { "system.slice/x.service" }'
  echo 'add element inet vmmesh-fence units_never_2 { "system.slice/x.service" }'
}
elements() { unit_0; unit_1; unit_2; }
flush() {
  echo 'flush set ip vmmesh units_only_2'
  echo 'flush set ip vmmesh units_only_3'
  echo 'flush set ip vmmesh units_never_2'
  echo 'flush set ip6 vmmesh units_only_2'
  echo 'flush set ip6 vmmesh units_only_3'
  echo 'flush set ip6 vmmesh units_never_2'
  echo 'flush set inet vmmesh-fence units_only_2'
  echo 'flush set inet vmmesh-fence units_only_3'
  echo 'flush set inet vmmesh-fence units_never_2'
}
# A cgroup that went between our look and nft's makes nft refuse the whole text.
load() {
  for try in 1 2 3; do
    { printf "%s\n" "$1"; elements; } | nft -f - && return 0
  done
  return 1
}
there() { nft -t list table ip vmmesh >/dev/null 2>&1 && nft -t list table ip6 vmmesh >/dev/null 2>&1 && nft -t list table inet vmmesh-fence >/dev/null 2>&1; }
case "$1:$2" in
load:) load "$(cat)" ;;
refresh:) load "$(flush)" ;;
start:app.service) ! there || { unit_0; } | nft -f - ;;
start:db@1.service) ! there || { unit_1; } | nft -f - ;;
start:x.service) ! there || { unit_2; } | nft -f - || echo 'vmmesh: captured until the next repair' >&2 ;;
esac
