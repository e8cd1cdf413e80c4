#!/bin/sh
# Real clients against a real server: what `mcpctl client-config CLIENT --write` writes is taken by Claude Code, Codex and
# Gemini CLI, which then say themselves that they are connected. Each has a home of its own, so no file of yours is touched.
#
#   packaging/try-clients.sh [FOLDER]
#
#   FOLDER   where the clients are, or are put by npm; default: a temporary one, which is removed
#   MCPCTL   the program; default: .venv/bin/mcpctl beside this folder, else the one of PATH
#
# Exit 0: all three are connected. 1: one is not. 3: the clients cannot be had here.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
mcpctl=${MCPCTL:-$here/.venv/bin/mcpctl}
[ -x "$mcpctl" ] || mcpctl=$(command -v mcpctl) || { echo "there is no mcpctl; set MCPCTL" >&2; exit 3; }
command -v npm >/dev/null 2>&1 || { echo "npm is not installed" >&2; exit 3; }
work=$(mktemp -d)
npm_folder=${1:-$work/npm}
demo=

# shellcheck disable=SC2317  # called by the trap
end() {
    [ -z "$demo" ] || { kill "$demo" 2>/dev/null || true; wait "$demo" 2>/dev/null || true; }
    rm -rf "$work"
}
trap end EXIT
trap 'exit 130' INT TERM

bin=$npm_folder/node_modules/.bin
if ! [ -x "$bin/claude" ] || ! [ -x "$bin/codex" ] || ! [ -x "$bin/gemini" ]; then
    echo "installing the clients into $npm_folder ..."
    npm install --silent --no-audit --no-fund --prefix "$npm_folder" \
        @anthropic-ai/claude-code @openai/codex @google/gemini-cli node@22 >&2 ||
        { echo "the clients cannot be installed" >&2; exit 3; }
fi
PATH=$npm_folder/node_modules/node/bin:$PATH

"$mcpctl" demo --port 0 --json >"$work/demo.json" 2>"$work/demo.err" &
demo=$!
waited=0
until [ -s "$work/demo.json" ]; do
    waited=$((waited + 1))
    if [ "$waited" -gt 60 ] || ! kill -0 "$demo" 2>/dev/null; then
        cat "$work/demo.err" >&2
        exit 1
    fi
    sleep 1
done
field() { sed -n "s/.*\"$1\": \"\([^\"]*\)\".*/\1/p" "$work/demo.json"; }
url=$(field url)
MCP_TOKEN=$(field token)
export MCP_TOKEN
failed=0

# at HOME COMMAND...: run it in a home of its own, where nothing of this user's is found
at() {
    home=$work/$1
    shift
    mkdir -p "$home/project"
    (cd "$home/project" && HOME=$home CLAUDE_CONFIG_DIR='' CODEX_HOME='' XDG_CONFIG_HOME='' \
        DISABLE_TELEMETRY=1 NO_COLOR=1 timeout 90 "$@" </dev/null 2>&1)
}

# told CLIENT WANTED TEXT: whether the client's own words are those
told() {
    if printf '%s\n' "$3" | grep -Eq "$2"; then
        echo "$1: $(printf '%s\n' "$3" | grep -E "$2" | head -1 | sed 's/^ *//' | cut -c 1-110)"
    else
        echo "$1: not connected; it said:" >&2
        printf '%s\n' "$3" >&2
        failed=1
    fi
}

echo "server: $url, $("$mcpctl" --version)"

at claude "$mcpctl" client-config claude-code --url "$url" --write >/dev/null
told "Claude Code $(at claude "$bin/claude" --version)" 'mcpctl: .*Connected' "$(at claude "$bin/claude" mcp list)"

at project "$mcpctl" client-config claude-code --url "$url" --file "$work/project/project/.mcp.json" >/dev/null
# it is taken, and waits for the person to trust it
told "Claude Code, .mcp.json of a project" 'Status: .*(Connected|Pending approval)' "$(at project "$bin/claude" mcp get mcpctl)"

at codex "$mcpctl" client-config codex --url "$url" --write >/dev/null
told "Codex $(at codex "$bin/codex" --version | tail -1)" "mcpctl .*$url .*MCP_TOKEN .*enabled" "$(at codex "$bin/codex" mcp list)"
ask() {
    echo '{"id":1,"method":"initialize","params":{"clientInfo":{"name":"try","version":"1"}}}'
    echo '{"method":"initialized"}'
    echo '{"id":2,"method":"mcpServerStatus/list","params":{}}'
    sleep 15
}
answer=$(ask | (home=$work/codex && cd "$home/project" && HOME=$home CODEX_HOME='' timeout 60 "$bin/codex" app-server 2>/dev/null) | grep '"id":2' || true)
told "Codex, its app server" 'tools: .*query_database' \
    "tools: $(printf '%s' "$answer" | grep -o '"[a-z_]*":{"name":"[a-z_]*"' | sed 's/.*"\([a-z_]*\)"$/\1/' | tr '\n' ' ')$answer"

at gemini "$mcpctl" client-config gemini --url "$url" --write >/dev/null
mkdir -p "$work/gemini/.gemini"
printf '{"%s": "TRUST_FOLDER"}\n' "$work/gemini/project" >"$work/gemini/.gemini/trustedFolders.json"
told "Gemini CLI $(at gemini "$bin/gemini" --version)" 'mcpctl: .*Connected' "$(at gemini "$bin/gemini" mcp list)"
exit "$failed"
