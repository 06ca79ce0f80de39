// An authorization server, npm's oidc-provider, that gives tokens for JWT-SVIDs (the grant of RFC 7523 section 2.1) of the workload
// SUBJECT, whose trust domain has its discovery document at ISSUER. What verifies them is jose, as elsewhere in oidc-provider. (Its
// client authentication `private_key_jwt` wants the client's ID as issuer and as subject, which no JWT-SVID has.) Prints "ready" when
// it listens on 127.0.0.1:PORT.
//   node oidc-provider.mjs PORT ISSUER SUBJECT
import { createRemoteJWKSet, jwtVerify } from 'jose';
import Provider, { errors } from 'oidc-provider';

const [port, issuer, subject] = process.argv.slice(2);
const audience = `http://127.0.0.1:${port}`;
const document = await (await fetch(`${issuer}/.well-known/openid-configuration`)).json();
if (document.issuer !== issuer) throw new Error(`the document is of ${document.issuer}`);
// Keys are asked for again after two seconds, so that a test need not wait ten minutes to see one revoked.
const keys = createRemoteJWKSet(new URL(document.jwks_uri), { cooldownDuration: 500, cacheMaxAge: 2000 });
const rules = {
  issuer, audience, subject,
  algorithms: document.id_token_signing_alg_values_supported,
  requiredClaims: ['exp', 'iat', 'jti', 'sub'],
};

const grant = 'urn:ietf:params:oauth:grant-type:jwt-bearer';
const provider = new Provider(audience, {
  clients: [{
    client_id: 'workloads', token_endpoint_auth_method: 'none', grant_types: [grant], redirect_uris: [], response_types: [],
  }],
  features: { clientCredentials: { enabled: true }, devInteractions: { enabled: false } },
});
provider.registerGrantType(grant, async (ctx) => {
  const { protectedHeader, payload } = await jwtVerify(ctx.oidc.params.assertion, keys, rules).catch((error) => {
    throw new errors.InvalidGrant(error.message);
  });
  if (!protectedHeader.kid) throw new errors.InvalidGrant('it names no key');
  const known = await provider.ReplayDetection.unique(payload.iss, payload.jti, payload.exp);
  if (!known) throw new errors.InvalidGrant('it was used before');
  const token = new provider.ClientCredentials({ client: ctx.oidc.client, extra: { workload: payload.sub } });
  ctx.oidc.entity('ClientCredentials', token);
  ctx.body = { access_token: await token.save(), expires_in: token.expiration, token_type: 'Bearer' };
}, ['assertion']);
provider.on('server_error', (_ctx, error) => console.log(error));
provider.on('grant.error', (_ctx, error) => console.log(error.message, error.error_description, error.error_detail ?? ''));
provider.listen(Number(port), '127.0.0.1', () => console.log('ready'));
