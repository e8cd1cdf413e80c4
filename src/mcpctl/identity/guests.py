"""People whom an issuer vouches for and who are no users here: what they are called, and as whom they log in.

Only where `auth.oidc.NAME.just_in_time` says so. Nothing here is stored, and no login role is made.
"""

import base64
import hashlib
from dataclasses import dataclass

from mcpctl.identity.claims import Outside


@dataclass(frozen=True, slots=True)
class Guest:
    """Such a person. `name` is theirs in limits and in the audit log; `as_user` is the user whose login roles and
    grants they have, who was made beforehand."""

    name: str
    roles: tuple[str, ...]
    as_user: str


def name_of(issuer: str, subject: str) -> str:
    """A name that stays, and that only this identity has: 100 bits of SHA-256, in the form of `users.OUTSIDE`."""
    digest = hashlib.sha256(f"{len(issuer)}:{issuer}{subject}".encode()).digest()
    return "x-" + base64.b32encode(digest).decode("ascii")[:20].lower()


def guest(outside: Outside) -> Guest | None:
    """Whom that identity is let in as where it has no user; None where it is not."""
    if outside.as_user is None:
        return None
    return Guest(name_of(outside.issuer, outside.subject), outside.roles, outside.as_user)
