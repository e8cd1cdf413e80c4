#!/bin/sh
# Puts Node 22 and the clients of package-lock.json where the tests find them.
#
#   MCPCTL_TEST_NODE_DIR   where node_modules goes; default: the folder of this file
#
# Exit 0: all is there. 3: it cannot be had on this machine, the reason is on stderr (tests skip with it).
# Anything else: the rig itself is broken. Two runs at once are safe, root is not needed, and a second run does nothing.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
target=${MCPCTL_TEST_NODE_DIR:-$here}

unavailable() {
    echo "$1" >&2
    exit 3
}

up_to_date() {
    cmp -s "$here/package-lock.json" "$target/node_modules/.mcpctl-installed"
}

up_to_date && exit 0

# A way to say no for good, for machines where the download is not wanted.
[ "${MCPCTL_TEST_NODE:-}" != off ] || unavailable "the Node clients are not installed and MCPCTL_TEST_NODE is off"
command -v npm >/dev/null 2>&1 || unavailable "npm is not installed"
node --version >/dev/null 2>&1 || unavailable "node is not installed"
mkdir -p "$target" 2>/dev/null && [ -w "$target" ] ||
    unavailable "$target cannot be written: set MCPCTL_TEST_NODE_DIR to a folder that can"

# One installer at a time; the others wait, and then find it done.
if command -v flock >/dev/null 2>&1; then
    exec 9>"$target/.lock-file"
    flock -w 600 9 || unavailable "another run has been installing into $target for ten minutes"
else
    waited=0
    until mkdir "$target/.lock" 2>/dev/null; do
        [ "$waited" -lt 600 ] || unavailable "another run is installing; if none is, remove $target/.lock"
        sleep 1
        waited=$((waited + 1))
    done
    trap 'rmdir "$target/.lock"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
fi
up_to_date && exit 0

if [ "$target" != "$here" ]; then
    cp "$here/package.json" "$here/package-lock.json" "$target/"
fi
cd "$target"
[ -w "${npm_config_cache:-${HOME:-/nonexistent}}" ] || export npm_config_cache="$target/.npm-cache"

# No package here needs its install script, so none is run. The lock holds every package's digest and no address:
# npm fetches from the registry that this machine is set to use.
log=$(mktemp)
code=0
npm ci --ignore-scripts --no-audit --no-fund --no-progress --loglevel=error --engine-strict=false \
    --fetch-retries=1 --fetch-retry-mintimeout=1000 --fetch-timeout=60000 >"$log" 2>&1 9>&- || code=$?
message=$(grep -v -e 'A complete log' -e '^npm error  *at ' "$log" | tr '\n' ' ' | cut -c1-400)
rm -f "$log"
if [ "$code" -ne 0 ]; then
    case $message in
    *EUSAGE* | *EINTEGRITY* | *EJSONPARSE*)
        echo "npm ci refuses the lock file: $message" >&2
        exit 1
        ;;
    esac
    unavailable "npm ci failed: $message"
fi

for folder in node_modules/node-*/bin; do
    if [ -x "$folder/node" ] && "$folder/node" --version >/dev/null 2>&1; then
        cp package-lock.json node_modules/.mcpctl-installed.new
        mv node_modules/.mcpctl-installed.new node_modules/.mcpctl-installed
        exit 0
    fi
done
unavailable "the registry has no Node 22 that runs on $(uname -sm)"
