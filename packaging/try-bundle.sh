#!/bin/sh
# The desktop bundle as a host installs it: built, validated and unpacked by Anthropic's own tool, its command made from
# the manifest by that tool's code, started with uv, which installs its dependencies, and a real question asked through it.
#
#   packaging/try-bundle.sh [FOLDER]
#
#   FOLDER   where `mcpb` and `uv` are, or are put by npm and pip; default: a temporary one, which is removed
#
# Exit 0: the question was answered. 1: it was not. 3: the tools cannot be had here.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
mcpctl=$here/.venv/bin/mcpctl
[ -x "$mcpctl" ] || { echo "first: make" >&2; exit 3; }
command -v npm >/dev/null 2>&1 || { echo "npm is not installed" >&2; exit 3; }
work=$(mktemp -d)
tools=${1:-$work/tools}
demo=

# shellcheck disable=SC2317  # called by the trap
end() {
    [ -z "$demo" ] || { kill "$demo" 2>/dev/null || true; wait "$demo" 2>/dev/null || true; }
    rm -rf "$work"
}
trap end EXIT
trap 'exit 130' INT TERM

[ -x "$tools/node_modules/.bin/mcpb" ] ||
    npm install --silent --no-audit --no-fund --prefix "$tools" @anthropic-ai/mcpb >&2 || exit 3
[ -x "$tools/uv/bin/uv" ] || { python3 -m venv "$tools/uv" && "$tools/uv/bin/pip" install --quiet uv; } >&2 || exit 3
PATH=$tools/uv/bin:$tools/node_modules/.bin:$PATH

bundle=$("$here/.venv/bin/python" "$here/packaging/mcpb/build.py")
mcpb info "$bundle" | head -2
mcpb unpack "$bundle" "$work/bundle" >/dev/null
mcpb validate "$work/bundle/manifest.json"

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

cat >"$work/host.mjs" <<'HOST'
// What a host does: the manifest's command with the user's values, and MCP on its stdin and stdout.
import { spawn } from "node:child_process";
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const [tool, folder, facts] = process.argv.slice(2);
const { getMcpConfigForManifest } = await import(pathToFileURL(tool));
const { url, token } = JSON.parse(readFileSync(facts, "utf8"));
const manifest = JSON.parse(readFileSync(`${folder}/manifest.json`, "utf8"));
const config = await getMcpConfigForManifest({
    manifest, extensionPath: folder, systemDirs: {}, userConfig: { url, token }, pathSeparator: "/",
});
console.log("starts:", config.command, ...config.args);
const child = spawn(config.command, config.args, {
    env: { ...process.env, ...config.env }, stdio: ["pipe", "pipe", "inherit"],
});
const say = (message) => child.stdin.write(`${JSON.stringify({ jsonrpc: "2.0", ...message })}\n`);
say({ id: 1, method: "initialize", params: {
    protocolVersion: "2025-06-18", capabilities: {}, clientInfo: { name: "host", version: "1" } } });
const until = setTimeout(() => { console.error("no answer in 300 s"); child.kill(); process.exit(1); }, 300_000);
for await (const line of createInterface({ input: child.stdout })) {
    const answer = JSON.parse(line);
    if (answer.id === 1) {
        console.log("serves:", JSON.stringify(answer.result?.serverInfo ?? answer.error));
        say({ method: "notifications/initialized" });
        say({ id: 2, method: "tools/call", params: {
            name: "query_database", arguments: { query: "select count(*) from products" } } });
    } else if (answer.id === 2) {
        console.log("answers:", JSON.stringify(answer.result?.structuredContent ?? answer));
        clearTimeout(until);
        child.stdin.end();
        await new Promise((done) => child.on("exit", done));
        process.exit(answer.result && !answer.result.isError ? 0 : 1);
    }
}
process.exit(1);
HOST
HOME=$work/home node "$work/host.mjs" "$tools/node_modules/@anthropic-ai/mcpb/dist/node.js" "$work/bundle" "$work/demo.json"
