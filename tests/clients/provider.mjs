// A certified OpenID provider (npm oidc-provider) on a free port of this machine. Its address goes to stdout as one
// line of JSON: {"url"}. It stops when stdin ends. Whoever signs in is whom they say they are; what a token holds
// depends on the resource that it is for: https://mcp.example.org gets a JWT, https://opaque.example.org a reference.
import { generateKeyPairSync } from "node:crypto";
import { createServer } from "node:http";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.MCPCTL_TEST_NODE_DIR}/package.json`);
const { Provider } = require("oidc-provider");

const jwk = (kind, options, more) => ({
  ...generateKeyPairSync(kind, options).privateKey.export({ format: "jwk" }),
  use: "sig",
  ...more,
});
const confidential = (id) => ({
  client_id: id,
  client_secret: `the secret of ${id}`,
  grant_types: ["client_credentials"],
  redirect_uris: [],
  response_types: [],
});
const SCOPE = "openid offline_access read";
let handler;
const server = createServer((request, response) => handler(request, response));
server.listen(0, "127.0.0.1", () => {
  const url = `http://127.0.0.1:${server.address().port}`;
  const provider = new Provider(url, {
    clients: [
      confidential("nightly"),
      confidential("mcpctl"),
      {
        client_id: "desktop",
        application_type: "native",
        token_endpoint_auth_method: "none",
        grant_types: ["authorization_code", "refresh_token"],
        response_types: ["code"],
        redirect_uris: ["http://127.0.0.1/callback"],
        scope: SCOPE,
      },
    ],
    cookies: { keys: ["a key of tests"] },
    scopes: ["openid", "offline_access", "read"],
    jwks: {
      keys: [
        jwk("rsa", { modulusLength: 2048 }, { kid: "r", alg: "RS256" }),
        jwk("ec", { namedCurve: "P-256" }, { kid: "e", alg: "ES256" }),
      ],
    },
    extraTokenClaims: () => ({ realm_access: { roles: ["mcp-tools", "offline_access"] } }),
    features: {
      clientCredentials: { enabled: true },
      introspection: { enabled: true, allowedPolicy: () => true },
      revocation: { enabled: true, allowedPolicy: () => true },
      resourceIndicators: {
        enabled: true,
        useGrantedResource: () => true,
        getResourceServerInfo: (_, resource) => ({
          scope: "read",
          audience: resource,
          ...(resource.includes("opaque")
            ? { accessTokenFormat: "opaque" }
            : { accessTokenFormat: "jwt", jwt: { sign: { alg: "ES256" } } }),
        }),
      },
    },
  });
  handler = provider.callback();
  process.stdout.write(`${JSON.stringify({ url })}\n`);
});
process.stdin.on("end", () => process.exit(0)).resume();
