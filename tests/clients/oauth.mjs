// The TypeScript client 2.x goes through OAuth by itself. What to do comes as JSON on stdin: {"url", "redirect"}.
// It writes a line {"open": URL}, waits for a line {"query"} with what the browser has brought, and says as JSON what
// happened: {"client", "opened", "renewed", "scope", "result", "revoked", "after"} or {"error"}.
import { createInterface } from "node:readline";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.MCPCTL_TEST_NODE_DIR}/package.json`);
const { Client, StreamableHTTPClientTransport, UnauthorizedError } = require("@modelcontextprotocol/client");

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const read = async () => JSON.parse((await lines.next()).value);
const write = (what) => process.stdout.write(JSON.stringify(what) + "\n");
const wanted = await read();

const kept = { opened: 0 };
const provider = {
  redirectUrl: wanted.redirect,
  clientMetadata: {
    client_name: "TypeScript client",
    redirect_uris: [wanted.redirect],
    grant_types: ["authorization_code", "refresh_token"],
    token_endpoint_auth_method: "none",
  },
  state: () => "a state of the TypeScript client",
  clientInformation: () => kept.client,
  saveClientInformation: (found) => { kept.client = found; },
  tokens: () => kept.tokens,
  saveTokens: (found) => { kept.tokens = found; },
  saveCodeVerifier: (found) => { kept.verifier = found; },
  codeVerifier: () => kept.verifier,
  discoveryState: () => kept.discovery,
  saveDiscoveryState: (found) => { kept.discovery = found; },
  redirectToAuthorization: (url) => { kept.opened += 1; write({ open: String(url) }); },
};
const client = () =>
  new Client({ name: "mcpctl-tests-typescript", version: "1" }, { versionNegotiation: { mode: "auto" } });
const transport = () => new StreamableHTTPClientTransport(new URL(wanted.url), { authProvider: provider });

try {
  const first = transport();
  try {
    await client().connect(first);
    throw new Error("it was let in without a token");
  } catch (error) {
    if (!(error instanceof UnauthorizedError)) throw error;
  }
  await first.finishAuth(new URLSearchParams((await read()).query));
  const access = kept.tokens.access_token;
  const connected = client();
  await connected.connect(transport());
  const result = await connected.callTool({ name: "query_database", arguments: { query: "select 1" } });
  await connected.close();
  kept.tokens = { ...kept.tokens, access_token: access.slice(0, -1) + (access.endsWith("A") ? "B" : "A") };
  const again = client();
  await again.connect(transport());
  await again.callTool({ name: "whoami", arguments: {} });
  await again.close();
  const renewed = kept.tokens.access_token !== access;
  const { revocation_endpoint } = kept.discovery.authorizationServerMetadata;
  const body = new URLSearchParams({ token: kept.tokens.refresh_token, client_id: kept.client.client_id });
  const revoked = (await fetch(revocation_endpoint, { method: "POST", body })).status;
  const headers = { authorization: `Bearer ${kept.tokens.access_token}` };
  const after = (await fetch(wanted.url, { method: "POST", headers })).status;
  write({ client: kept.client, opened: kept.opened, renewed, scope: kept.tokens.scope, result, revoked, after });
} catch (error) {
  write({ error: String(error.stack ?? error) });
}
process.exit(0);
