"""The frozen answer to "who is asking?". It is made once per request and handed down; nothing looks it up."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from mcpctl.identity.grants import Grant
from mcpctl.identity.tenants import Tenant
from mcpctl.identity.users import EVERYWHERE


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller.

    `token` is the token's id (None for the one local user of stdio or --no-auth). No secret: PostgreSQL sees it in
    application_name. `pool` is the name of its own pools: SHA-256 of the stored hash in hex. `databases` and
    `permissions` are what the token is limited to; None means all that its user has. `roles` are its user's own (None:
    the default ones), `claimed` those that an outside issuer gives it (None: no issuer is asked), `grants` its user's
    by database; `as_user` is whose login roles and grants they are, where it is no user itself; `within` is its
    tenant's place, beyond which it sees nothing; `closed` are the databases that other tenants keep it out of, with
    why. `edition` grows when its token's rights have become fewer, and `narrowed` by database when its user's have:
    what was opened under an earlier edition is over, whatever else is equal. `scoped`: its
    permissions are those of OAuth scopes, and its client can ask for more.
    """

    token: str | None
    user: str | None
    pool: str
    databases: tuple[str, ...] | None = None
    permissions: tuple[str, ...] | None = None
    expires_at: datetime | None = None
    tenant: str | None = None
    edition: int = 0
    narrowed: Mapping[str, int] = field(default_factory=dict, compare=False)
    roles: tuple[str, ...] | None = None
    claimed: tuple[str, ...] | None = None
    as_user: str | None = None
    grants: Mapping[str, Grant] = field(default_factory=dict, compare=False)
    within: Tenant | None = None
    closed: Mapping[str, str] = field(default_factory=dict, compare=False)
    scoped: bool = field(default=False, compare=False)

    def edition_in(self, database: str) -> int:
        """The edition of its rights in that database."""
        return max(self.edition, self.narrowed.get(EVERYWHERE, 0), self.narrowed.get(database, 0))

    @property
    def person(self) -> str | None:
        """The user in users.yaml whose login roles and grants it has."""
        return self.as_user or self.user

    @property
    def name(self) -> str:
        """How messages call the caller."""
        return self.user or (f"service token {self.token}" if self.token else "the local user")


LOCAL = Principal(token=None, user=None, pool="local")
"""Whoever started the server on stdio without a token, or reaches a --no-auth server over loopback."""
