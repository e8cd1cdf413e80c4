"""What may stand below auth.oidc and auth.oauth in config.yaml: a part of `config_keys.py`."""

from dataclasses import field
from pathlib import Path

from mcpctl import config_values as values
from mcpctl.config_schema import keys, section, setting


@keys(frozen=True)
class Introspection:
    """auth.oidc.NAME.introspection"""

    client_id: str | None = setting(None, values.optional(values.text), "our own client there; without one: off")
    client_secret_file: Path | None = setting(
        None, values.optional(values.path), "file with its secret and nothing else, 0600"
    )
    tokens: str = setting("opaque", values.choice("opaque", "jwt", "all"), "which tokens the issuer is asked about")
    cache: float = setting(50.0, values.between(0, 60, "of 60s at most"), "how long an answer holds")


@keys(frozen=True)
class Oidc:
    """auth.oidc.NAME"""

    issuer: str | None = setting(None, values.optional(values.issuer), "its URL, to the letter as in its tokens")
    audience: tuple[str, ...] = setting((), values.one_or_more, "what its tokens for us have in `aud`: one of these")
    clients: tuple[str, ...] = setting(
        (), values.one_or_more, "clients whose tokens are taken (`azp`); none: any, for tokens with our audience alone"
    )
    algorithms: tuple[str, ...] = setting(values.ALGORITHMS, values.algorithms, "how its tokens may be signed")
    user_claim: str = setting("sub", values.choice("sub", "oid", "uid"), "which claim says whose a token is")
    name_claim: str = setting(
        "preferred_username", values.claim, "the claim that is shown to people, and decides nothing"
    )
    roles_claims: tuple[str, ...] = setting(("realm_access.roles",), values.claims, "where roles stand in its tokens")
    roles: dict[str, str] = field(
        default_factory=dict, metadata={"read": values.text_map, "map": True, "doc": "our role for a role of theirs"}
    )
    tenant_claim: str | None = setting(
        None, values.optional(values.claim), "the claim that names the tenant, which every token then needs"
    )
    just_in_time: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "read": values.text_map,
            "map": True,
            "doc": "whose login roles and grants a person without a user has, by a role of theirs; none: nobody's",
        },
    )
    jwks_cache: float = setting(
        3600.0, values.between(60, 86400, "from 1m to 24h"), "how long its keys hold before they are fetched again"
    )
    clock_skew: float = setting(30.0, values.between(0, 300, "of 5m at most"), "how far its clock may be from ours")
    ca_file: Path | None = setting(
        None, values.optional(values.path), "CA in PEM that signed its certificate; default: the system's"
    )
    allow_http_loopback: bool = setting(
        False, values.truth, "take an issuer on this machine over http; for tests alone"
    )
    introspection: Introspection = section(Introspection, "asking the issuer about tokens")


@keys(frozen=True)
class OauthClient:
    """auth.oauth.clients.NAME"""

    redirect_uris: tuple[str, ...] = setting(
        (), values.texts, "where it is answered; http on loopback is any port there"
    )
    title: str | None = setting(None, values.optional(values.text), "what people are told it is called; default: NAME")
    secret_file: Path | None = setting(
        None, values.optional(values.path), "file with its secret and nothing else, 0600; none: a public client"
    )


@keys(frozen=True)
class OauthScope:
    """auth.oauth.scopes.NAME"""

    permissions: tuple[str, ...] = setting(
        (), values.permissions, "what clients with this scope may do, with * for a part"
    )
    description: str | None = setting(
        None, values.optional(values.text), "what people are told that it allows; default: its permissions"
    )


@keys(frozen=True)
class Oauth:
    """auth.oauth"""

    enabled: bool = setting(False, values.truth, "clients may ask users for access at /authorize (OAuth 2.1)")
    access_lifetime: float = setting(
        3600.0, values.between(60, 86400, "from 1m to 24h"), "an access token is good for this, then it is renewed"
    )
    lifetime: float = setting(
        7776000.0, values.between(60, 31536000, "from 1m to 365d"), "a user allows a client again after this"
    )
    idle: float = setting(
        2592000.0, values.between(60, 31536000, "from 1m to 365d"), "what a client does not use ends after this"
    )
    per_user: int = setting(20, values.number(1, 1000), "connections of a user; one more ends that idle longest")
    registration: bool = setting(True, values.truth, "clients may register themselves at /register (RFC 7591)")
    registrations: int = setting(1000, values.number(1, 100_000), "clients that may be registered at once")
    metadata_documents: bool = setting(
        True, values.truth, "clients may be known by the https URL of a document about them, which is fetched"
    )
    allow_metadata_from: tuple[values.Network, ...] = setting(
        (), values.networks, "networks that are not public, and documents may be fetched from all the same; for tests"
    )
    app_schemes: tuple[str, ...] = setting(
        (), values.schemes, "schemes without a dot that clients may be answered at, such as cursor"
    )
    default_scopes: tuple[str, ...] = setting(
        ("mcp:read",), values.texts, "scopes that clients are told to ask for, and have that ask for none"
    )
    clients: dict[str, OauthClient] = field(
        default_factory=dict, metadata={"named": OauthClient, "doc": "clients that need no registration, by their id"}
    )
    scopes: dict[str, OauthScope] = field(
        default_factory=dict,
        metadata={"named": OauthScope, "name": values.scope, "doc": "scopes beside the built-in ones, by name"},
    )
