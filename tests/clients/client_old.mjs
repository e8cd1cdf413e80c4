// One visit of the older TypeScript SDK 1.x, which knows only the era of `initialize`. Input and output as in client.mjs.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.MCPCTL_TEST_NODE_DIR}/package.json`);
const { Client } = require("@modelcontextprotocol/sdk/client/index.js");
const { StreamableHTTPClientTransport } = require("@modelcontextprotocol/sdk/client/streamableHttp.js");
const { StdioClientTransport } = require("@modelcontextprotocol/sdk/client/stdio.js");

const wanted = JSON.parse(readFileSync(0, "utf8"));
const transport = wanted.url
  ? new StreamableHTTPClientTransport(new URL(wanted.url), {
      requestInit: { headers: { Authorization: `Bearer ${wanted.token}` } },
    })
  : new StdioClientTransport({ command: wanted.command[0], args: wanted.command.slice(1), env: wanted.env });
let version = null;
const remember = transport.setProtocolVersion?.bind(transport);
transport.setProtocolVersion = (negotiated) => {
  version = negotiated;
  remember?.(negotiated);
};
const client = new Client({ name: "mcpctl-tests-typescript-old", version: "1" });

let answer;
try {
  await client.connect(transport);
  const listed = await client.listTools();
  answer = { era: "legacy", version, tools: listed.tools.map((tool) => tool.name) };
  if (wanted.tool) answer.result = await client.callTool({ name: wanted.tool, arguments: wanted.arguments });
} catch (error) {
  answer = { error: { code: error.code ?? null, message: String(error.message ?? error) } };
} finally {
  await client.close();
}
process.stdout.write(JSON.stringify(answer) + "\n");
