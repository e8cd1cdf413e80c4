// A real OpenID provider, for tests: prints its issuer, and ends with its stdin.
//   LIFE: seconds of an access token; REGISTRATION=off: no client registers itself
import { createServer } from 'node:http'
import { createRequire } from 'node:module'

const { default: Provider } = createRequire(`${process.env.MCPCTL_TEST_NODE_DIR}/package.json`)('oidc-provider')

const DEVICE = 'urn:ietf:params:oauth:grant-type:device_code'
const life = Number(process.env.LIFE ?? '600')
const server = createServer()
server.listen(0, '127.0.0.1', () => {
  const issuer = `http://127.0.0.1:${server.address().port}`
  const on = { enabled: true }
  const provider = new Provider(issuer, {
    clients: [
      { client_id: 'resource-server', client_secret: 'of the test', redirect_uris: [], response_types: [], grant_types: [] },
      {
        client_id: 'desktop',
        application_type: 'native',
        token_endpoint_auth_method: 'none',
        redirect_uris: ['http://127.0.0.1/callback'],
        grant_types: ['authorization_code', 'refresh_token', DEVICE],
      },
    ],
    features: {
      devInteractions: on,
      deviceFlow: on,
      introspection: { ...on, allowedPolicy: () => true },
      registration: { enabled: process.env.REGISTRATION !== 'off' },
      revocation: { ...on, allowedPolicy: () => true },
      resourceIndicators: {
        ...on,
        getResourceServerInfo: (_, resource) => ({ scope: 'read', audience: resource, accessTokenTTL: life, accessTokenFormat: 'opaque' }),
        useGrantedResource: () => true,
      },
    },
    issueRefreshToken: () => true,
    pkce: { required: () => true },
    rotateRefreshToken: true,
    scopes: ['openid', 'offline_access', 'read'],
    ttl: { AccessToken: life },
  })
  server.on('request', provider.callback())
  console.log(issuer)
})
process.stdin.resume()
process.stdin.on('end', () => process.exit(0))
