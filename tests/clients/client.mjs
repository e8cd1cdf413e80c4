// One visit of the TypeScript client 2.x. What to do comes as JSON on stdin (a token has no place in argv):
//   {"url", "token"} or {"command", "env"}, "era": "auto" | "modern" | "legacy", "tool", "arguments"
// What happened goes to stdout as JSON: {"era", "version", "tools", "result"} or {"error": {"code", "message"}}.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.MCPCTL_TEST_NODE_DIR}/package.json`);
const { Client, StreamableHTTPClientTransport } = require("@modelcontextprotocol/client");
const { StdioClientTransport } = require("@modelcontextprotocol/client/stdio");

const MODES = { auto: "auto", legacy: "legacy", modern: { pin: "2026-07-28" } };
const wanted = JSON.parse(readFileSync(0, "utf8"));
const transport = wanted.url
  ? new StreamableHTTPClientTransport(new URL(wanted.url), {
      requestInit: { headers: { Authorization: `Bearer ${wanted.token}` } },
    })
  : new StdioClientTransport({ command: wanted.command[0], args: wanted.command.slice(1), env: wanted.env });
const client = new Client(
  { name: "mcpctl-tests-typescript", version: "1" },
  { versionNegotiation: { mode: MODES[wanted.era] } },
);

let answer;
try {
  await client.connect(transport);
  const listed = await client.listTools();
  answer = {
    era: client.getProtocolEra(),
    version: client.getNegotiatedProtocolVersion(),
    tools: listed.tools.map((tool) => tool.name),
  };
  if (wanted.tool) answer.result = await client.callTool({ name: wanted.tool, arguments: wanted.arguments });
} catch (error) {
  answer = { error: { code: error.code ?? null, message: String(error.message ?? error) } };
} finally {
  await client.close();
}
process.stdout.write(JSON.stringify(answer) + "\n");
