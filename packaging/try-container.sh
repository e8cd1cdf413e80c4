#!/usr/bin/env bash
# Builds the image, and does with it what docs/containers.md says: init, a database, a user, a token, a call, a revoke,
# all without root and on a root file system that nothing can write to. One line for each thing that it has seen; exits 1 at the first that is not so.
#
#   ENGINE       podman or docker; with options of its own, such as "podman --cgroup-manager cgroupfs"
#   BUILD_FLAGS  further options of `build`, such as --build-arg BASE=… or a mounted certificate
#   RUN_FLAGS    further options of `run`
#   PYTHON       a Python with mcpctl and its extra `demo`, which brings the PostgreSQL; default .venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra engine <<<"${ENGINE:-podman}"
read -ra build <<<"${BUILD_FLAGS:-}"
read -ra run <<<"${RUN_FLAGS:-}"
python=${PYTHON:-.venv/bin/python}
name=mcpctl-try-$$
image=localhost/$name
work=$(mktemp -d)
postgres=

saw() { printf 'ok   %s\n' "$*"; }
fail() {
    printf 'FAIL %s\n' "$*" >&2
    "${engine[@]}" logs "$name" 2>&1 | tail -20 >&2
    exit 1
}
# shellcheck disable=SC2317 # called by the trap
away() {
    "${engine[@]}" rm -f "$name" >/dev/null 2>&1 || true
    "${engine[@]}" volume rm "$name-config" "$name-state" "$name-log" >/dev/null 2>&1 || true
    "${engine[@]}" untag "$image" >/dev/null 2>&1 || true
    [ -z "$postgres" ] || { kill "$postgres" 2>/dev/null && wait "$postgres" 2>/dev/null; } || true
    rm -rf "$work"
}
trap away EXIT
patiently() { # until it is so, 30 s at most
    local i
    for ((i = 0; i < 300; i++)); do
        if "$@" >/dev/null 2>&1; then return 0; fi
        sleep 0.1
    done
    return 1
}

"${engine[@]}" build "${build[@]}" -q -t "$image" -f packaging/container/Containerfile . >"$work/build.log" 2>&1 ||
    { tail -20 "$work/build.log" >&2; fail "the image is built"; }
saw "the image is built"
[ "$("${engine[@]}" image inspect --format '{{.Config.User}}' "$image")" = 10001:10001 ] || fail "its user is no root"
saw "its user is 10001, not root"

# A PostgreSQL beside it, with the shop of `mcpctl demo`.
"$python" -m mcpctl demo --port 0 --json >"$work/demo.json" 2>"$work/demo.log" </dev/null &
postgres=$!
patiently test -s "$work/demo.json" || fail "a PostgreSQL: $(cat "$work/demo.log")"
demo() { "$python" -c 'import json,sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$work/demo.json" "$1"; }
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
read -r pghost pgport < <("$python" - "$(demo dsn)" <<'PY'
import sys

import psycopg

info = psycopg.conninfo.conninfo_to_dict(sys.argv[1])
print(info.get("host"), info.get("port", 5432))
PY
)
if [ "${pghost#/}" != "$pghost" ]; then run+=(-v "$pghost:$pghost"); fi

options=(--rm -i --read-only --cap-drop ALL --security-opt no-new-privileges --network host "${run[@]}"
    -v "$name-config:/etc/mcpctl" -v "$name-state:/var/lib/mcpctl" -v "$name-log:/var/log/mcpctl" --tmpfs /tmp)
# The control socket is in /tmp of the container that serves; commands for it run there.
box() { "${engine[@]}" run "${options[@]}" "$image" "$@"; }
inside() { "${engine[@]}" exec -i "$name" mcpctl "$@"; }

if box serve >"$work/serve.log" 2>&1; then fail "it does not serve without a config"; fi
grep -q 'mcpctl: error:' "$work/serve.log" || fail "it says why it does not serve: $(cat "$work/serve.log")"
saw "without a config it says: $(grep -m1 'mcpctl: error:' "$work/serve.log")"
box init /etc/mcpctl --db-host "$pghost" --db-port "$pgport" --db-name shop --db-user box_reader --user alice --print-sql \
    >"$work/roles.sql" 2>"$work/init.log" || fail "init: $(cat "$work/init.log")"
"$python" - "$(demo dsn)" "$work/roles.sql" <<'PY'
import sys
from pathlib import Path

import psycopg

with psycopg.connect(sys.argv[1], autocommit=True) as admin:
    admin.execute(Path(sys.argv[2]).read_text())
PY
saw "init, on volumes, and the SQL of its login role"
token=$(box token add --user alice --expiry 1d 2>/dev/null)
saw "token add"

"${engine[@]}" run -d --name "$name" "${options[@]:1}" \
    -e MCPCTL_SERVER__PORT="$port" "$image" >/dev/null
patiently inside status || fail "the server is up"
saw "it serves, and its health check (mcpctl status) says so"
ask() {
    printf 'header = "Authorization: Bearer %s"\n' "$token" |
        curl -s -m 60 -K - -o "$work/answer" -w '%{http_code}' "http://127.0.0.1:$port/mcp" -H 'Content-Type: application/json' \
            -H 'Accept: application/json' -d "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/call\",\"params\":{\"name\":\"query_database\",\"arguments\":{\"query\":\"$1\"}}}"
}
ask 'select 6*7 as answer' >/dev/null
grep -q '\[\[42\]\]' "$work/answer" || fail "a call: $(cat "$work/answer")"
saw "a call: 42"
if "${engine[@]}" exec "$name" sh -c 'echo > /opt/mcpctl/x || echo > /etc/x' 2>/dev/null; then fail "nothing can be written but the volumes"; fi
saw "nothing can be written but the volumes"
(ask 'select pg_sleep(30)' >"$work/status") &
asking=$!
running() { inside top --once --json | grep -q '"query_database"'; }
patiently running || fail "a long query runs"
id=${token#mcp_}
begun=$(date +%s%N)
inside token revoke "${id%%_*}" --reason try >"$work/revoked" 2>&1 || fail "revoke: $(cat "$work/revoked")"
wait "$asking"
took=$((($(date +%s%N) - begun) / 1000000))
[ "$(cat "$work/status")" = 401 ] || fail "the revoked call has 401, not $(cat "$work/status")"
saw "token revoke: $(grep -o 'cut: .*' "$work/revoked"), and the call has 401, after $took ms"
inside audit verify >"$work/verify" 2>&1 || fail "audit verify: $(cat "$work/verify")"
saw "audit verify: $(tail -1 "$work/verify")"
begun=$(date +%s%N)
"${engine[@]}" stop -t 30 "$name" >/dev/null
saw "it stops when told, in $((($(date +%s%N) - begun) / 1000000)) ms, with exit $("${engine[@]}" inspect --format '{{.State.ExitCode}}' "$name")"
echo "all is well"
