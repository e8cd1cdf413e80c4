"""The frozen answer to "who is asking?". It is made once per request and handed down; nothing looks it up."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller.

    `token` is the token's id (None for the one local user of stdio or --no-auth), `pool` the name of its own
    pools: SHA-256 of the stored hash in hex, of which logs show the first 12. `databases` and `permissions` are
    what the token is limited to; None means all that its user has. `edition` counts how often the rights of its
    token have changed: what was opened under an earlier edition is over, whatever else is equal.
    """

    token: str | None
    user: str | None
    pool: str
    databases: tuple[str, ...] | None = None
    permissions: tuple[str, ...] | None = None
    expires_at: datetime | None = None
    tenant: str | None = None
    edition: int = 0

    @property
    def name(self) -> str:
        """How messages call the caller."""
        return self.user or (f"service token {self.token}" if self.token else "the local user")


LOCAL = Principal(token=None, user=None, pool="local")
"""Whoever started the server on stdio without a token, or reaches a --no-auth server over loopback."""
