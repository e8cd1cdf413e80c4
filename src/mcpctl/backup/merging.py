"""Pure: what a backup says and what is here now → what is to be. What is here wins, and the log with it: nothing
that was taken away since comes back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from mcpctl.backup.since import Since
from mcpctl.identity.tenants import Tenant
from mcpctl.identity.tokens import Token
from mcpctl.identity.users import User

Reseal = Callable[[str, str], str]


@dataclass
class Said:
    """What is to be known of a merge, for people: what comes back, what stays out, and what lacks something."""

    back: list[str] = field(default_factory=list)
    out: list[tuple[str, str]] = field(default_factory=list)
    less: list[tuple[str, str]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def merged_tokens(
    backup: Mapping[str, Token], here: Mapping[str, Token] | None, since: Since, said: Said
) -> dict[str, Token]:
    """The tokens that there are to be. `here` is None where there is no token file."""
    found = _older_tokens(backup, here or {}, since.earlier, said)
    for name, token in backup.items():
        if here is not None and name in here:
            if name in found:
                found[name] = _sooner(found[name], token, said)
        elif name in since.removed:
            said.out.append((name, "it was removed"))
        elif here is not None and not since.known:
            said.out.append((name, "it is not in tokens.yaml any more, and no log says why"))
        else:
            found[name] = _ended(token, since, said)
            said.back.append(name)
    said.lost += sorted(since.added - found.keys() - since.removed - backup.keys()) if here is None else []
    return found


def _older_tokens(
    backup: Mapping[str, Token], here: Mapping[str, Token], earlier: Since | None, said: Said
) -> dict[str, Token]:
    """Those that are here, without what the backup's log says was taken away after the log here ends."""
    if earlier is None:
        return dict(here)
    found = {}
    for name, token in here.items():
        if name in earlier.removed:
            said.out.append((name, "it was removed before the backup was made"))
        else:
            found[name] = _ended(token, earlier, said)
    return found


def _sooner(here: Token, backup: Token, said: Said) -> Token:
    """What is here, ended where the backup has it ended already: it may be an older copy."""
    if here.revoked_at is None and backup.revoked_at is not None and here.hash == backup.hash:
        said.less.append((here.id, "it was revoked already when the backup was made"))
        return replace(here, revoked_at=backup.revoked_at)
    return here


def _ended(token: Token, since: Since, said: Said) -> Token:
    when = since.ended.get(token.id)
    if when is None or token.revoked_at is not None:
        return token
    said.less.append((token.id, f"it ended at {when:%Y-%m-%d %H:%M}, says the log"))
    return replace(token, revoked_at=max(when, token.created_at))


def merged_users(
    backup: Mapping[str, User], here: Mapping[str, User] | None, since: Since, again: Reseal, said: Said
) -> dict[str, User]:
    """The users that there are to be, likewise. What comes back is sealed `again`."""
    found = _older_users(backup, here or {}, since.earlier, said)
    identities = {link for user in found.values() for link in user.links}
    for name, user in backup.items():
        if here is not None and name in here and name in found:
            continue
        if name in since.gone:
            said.out.append((name, "they were removed"))
        elif here is not None and not since.known and name not in here:
            said.out.append((name, "they are not in users.yaml any more, and no log says why"))
        else:
            back = _narrowed(user, since, said)
            back = replace(back, links=tuple(link for link in back.links if link not in identities))
            found[name] = _resealed(back, again)
            said.back.append(name)
    return found


def _older_users(
    backup: Mapping[str, User], here: Mapping[str, User], earlier: Since | None, said: Said
) -> dict[str, User]:
    """Those that are here, likewise. Who was removed and made anew is as the backup has them."""
    if earlier is None:
        return dict(here)
    found = {}
    for name, user in here.items():
        if user == backup.get(name):
            found[name] = user
        elif name not in earlier.gone:
            found[name] = _narrowed(user, earlier, said)
        elif name not in backup:
            said.out.append((name, "they were removed before the backup was made"))
    return found


def _narrowed(user: User, since: Since, said: Said) -> User:
    """The user without whatever was changed since, of which the backup has only what was before."""
    name, less = user.name, list[str]()
    if name in since.disabled and user.disabled_at is None:
        user = replace(user, disabled_at=since.disabled[name])
        less.append("they were disabled")
    if name in since.roles:
        user = replace(user, roles=())
        less.append(f"their roles were changed, so they have none: mcpctl user roles {name}")
    if name in since.passwords and user.password is not None:
        user = replace(user, password=None)
        less.append(f"their password was changed, so they have none: mcpctl user passwd {name}")
    if name in since.unlinked and user.links:
        user = replace(user, links=())
        less.append(f"an identity was taken from them, so they have none: mcpctl user link {name}")
    kept = {database: one for database, one in user.grants.items() if (name, database) not in since.grants}
    if kept != user.grants:
        less += [
            f"their grant on {one} was changed, so they have none" for one in sorted(user.grants.keys() - kept.keys())
        ]
        user = replace(user, grants=kept)
    said.less += [(name, one) for one in less]
    return user


def _resealed(user: User, again: Reseal) -> User:
    for grant in list(user.grants.values()):
        passwords = {access: again(text, f"a password of {user.name}") for access, text in grant.passwords.items()}
        if passwords != grant.passwords:
            user = user.with_grant(replace(grant, passwords=passwords))
    return user


def merged_tenants(
    backup: Mapping[str, Tenant], here: Mapping[str, Tenant] | None, since: Since, said: Said
) -> dict[str, Tenant]:
    """The tenants that there are to be. One that comes back takes its database from everybody else."""
    found = {name: one for name, one in (here or {}).items() if not _is_gone(name, backup, since.earlier)}
    taken = {(one.database, one.schema) for one in found.values()}
    for name, tenant in backup.items():
        if here is not None and name in here:
            continue
        if name in since.tenants or (tenant.database, tenant.schema) in taken:
            said.out.append((name, "it was removed" if name in since.tenants else "another tenant has its place"))
            continue
        found[name] = tenant
        said.back.append(name)
    return found


def _is_gone(name: str, backup: Mapping[str, Tenant], earlier: Since | None) -> bool:
    return earlier is not None and name in earlier.tenants and name not in backup


def all_revoked(tokens: Mapping[str, Token], now: datetime) -> dict[str, Token]:
    """All of them, revoked now where they were not."""
    return {name: replace(one, revoked_at=one.revoked_at or now) for name, one in tokens.items()}
