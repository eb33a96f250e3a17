# Sourced by the scripts that people type: what they need, fetched once, said in one line each.

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

# node_modules as the lock file says, and its Node 26 first on PATH (the distribution's may be 18).
need_modules() {
  if ! command -v npm >/dev/null; then
    if [ "$(id -u)" != 0 ]; then echo "npm is missing: apt-get install nodejs npm" >&2; exit 3; fi
    say "installing nodejs and npm (apt)"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nodejs npm >/dev/null
  fi
  if ! cmp -s package-lock.json node_modules/.vmmesh-lock; then
    say "fetching the packages of package-lock.json (npm ci)"
    # --force: an npm that runs on an older Node (Debian 12 has 18) would leave out optional packages that want a newer
    # one, the native parts of the linters and of vitest; all of them run on the Node 26 that comes along.
    npm ci --force --no-audit --no-fund --loglevel=error
    cp package-lock.json node_modules/.vmmesh-lock
  fi
  export PATH="$PWD/node_modules/.bin:$PATH"
}

# need_programs PROGRAM=PACKAGE …: installs what is missing by apt, as root.
need_programs() {
  local missing=() pair
  for pair in "$@"; do command -v "${pair%%=*}" >/dev/null || PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}"); done
  if [ "${#missing[@]}" -gt 0 ]; then
    if [ "$(id -u)" != 0 ]; then echo "missing: ${missing[*]} (apt-get install ${missing[*]})" >&2; exit 3; fi
    say "installing ${missing[*]} (apt)"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  fi
}
