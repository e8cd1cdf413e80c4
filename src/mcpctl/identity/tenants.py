"""The tenant file: who shares data with whom. A tenant has a database of the config, or one schema in it; its users,
and with them their tokens, see nothing else. The tenant comes from the credential alone, never from what a call says.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mcpctl.config_keys import Settings
from mcpctl.config_values import Network
from mcpctl.errors import ConfigError, ConflictError, NotFoundError, UsageError
from mcpctl.identity import grants
from mcpctl.identity.entry_file import EntryFile, Shape
from mcpctl.identity.tokens import read_networks
from mcpctl.identity.users import User, check_note, read_time, repeated, rfc3339, user_file

NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
_FIELDS = ("created_at", "database", "schema", "note", "allow_ips")


@dataclass(frozen=True, slots=True)
class Tenant:
    """One entry of tenants.yaml. `schema` is None where the whole database is the tenant's, `allow_ips` where its
    tokens may be used from anywhere."""

    name: str
    created_at: datetime
    database: str
    schema: str | None = None
    note: str | None = None
    allow_ips: tuple[Network, ...] | None = None

    @property
    def where(self) -> str:
        """Its place, in words."""
        return f"the schema {self.schema} of {self.database}" if self.schema else f"the database {self.database}"

    def confine(self, database: str, targets: tuple[str, ...]) -> tuple[str, ...]:
        """The targets of a grant to one of its users; its whole place where none is named. UsageError for another."""
        if database != self.database:
            raise UsageError(f"the tenant {self.name} has {self.where}, not {database}", f"--database {self.database}")
        if self.schema is None:
            return targets
        if targets == (grants.EVERYTHING,):
            return (self.schema,)
        if (text := self.outside(targets)) is not None:
            raise UsageError(f"the tenant {self.name} has {self.where}, and {text} is outside", "leave it out")
        return targets

    @property
    def own(self) -> str | None:
        """Its schema's name, however it is quoted; None where the whole database is its own."""
        return grants.parse(self.schema).schema if self.schema is not None else None

    def outside(self, targets: Iterable[str]) -> str | None:
        """The first target of a grant in its database that is not the tenant's own; None where all are."""
        if self.schema is None:
            return None
        return next((one for one in targets if one == grants.EVERYTHING or grants.parse(one).schema != self.own), None)


def _read(name: str, fields: dict[str, Any]) -> Tenant:
    if unknown := [field for field in fields if field not in _FIELDS]:
        raise ValueError(f"{unknown[0]}: there is no such key; there are {', '.join(_FIELDS)}")
    database, schema, note = fields.get("database"), fields.get("schema"), fields.get("note")
    if not isinstance(database, str) or not database:
        raise ValueError("database: is missing")
    if schema is not None and (not isinstance(schema, str) or grants.parse(schema).table is not None):
        raise ValueError("schema: expected a schema's name")
    if note is not None and not isinstance(note, str):
        raise ValueError("note: expected a text")
    if fields.get("created_at") is None:
        raise ValueError("created_at: is missing")
    allow_ips = read_networks(fields.get("allow_ips"))
    return Tenant(name, read_time(fields["created_at"], "created_at"), database, schema, note, allow_ips)


def as_values(tenant: Tenant) -> dict[str, Any]:
    """The entry's fields as plain values, without its name."""
    return {
        "created_at": rfc3339(tenant.created_at),
        "database": tenant.database,
        "schema": tenant.schema,
        "note": tenant.note,
        "allow_ips": None if tenant.allow_ips is None else [str(item) for item in tenant.allow_ips],
    }


_SHAPE: Shape[Tenant] = Shape("tenants", NAME, _read, as_values)


def tenant_file(
    path: Path, twins: Mapping[str, Sequence[str]] | None = None, there: Callable[[Tenant], bool] = lambda one: True
) -> EntryFile[Tenant]:
    """The tenant file at `path`. It is there even where there are no tenants: with one that is lost the databases of
    its tenants would be everybody's.

    `twins` names, for a database of the config, others that are the same one in PostgreSQL: no tenant's may have one.
    `there` says whether the config has a tenant's database: one by another name is open to everybody.
    """
    return EntryFile(
        path,
        replace(_SHAPE, together=lambda entries: (*_shared(entries, twins or {}), *_nowhere(entries, there))),
        missing="restore it; only where there never were tenants, make it as the owner of the other files: "
        f"(umask 077; echo '{{version: 1, tenants: {{}}}}' >{path})",
        elsewhere="; where that speaks of the config, mend the config, or the variable MCPCTL_… that adds to it",
    )


def _clashes(entries: Mapping[str, Tenant]) -> Iterator[tuple[Tenant, Tenant]]:
    """Each tenant whose place, or some of it, an earlier one has; and that one."""
    taken: dict[str, dict[str | None, Tenant]] = {}
    for one in entries.values():
        there = taken.setdefault(one.database, {})
        other = there.get(None) or (there.get(one.own) if one.own else next(iter(there.values()), None))
        if other is not None:
            yield one, other
        there[one.own] = one


def _shared(entries: Mapping[str, Tenant], twins: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    for one, other in _clashes(entries):
        yield one.name, f"{other.where} is the tenant {other.name}'s; give each a place of its own"
    for one in entries.values():
        for twin in twins.get(one.database, ())[:1]:
            yield one.name, f"{one.database} and {twin} of the config are one database; leave one of them in the config"


def _nowhere(entries: Mapping[str, Tenant], there: Callable[[Tenant], bool]) -> Iterator[tuple[str, str]]:
    for one in entries.values():
        if not there(one):
            yield (
                one.name,
                f"there is no database {one.database} in the config, so the one that is meant is open to all",
            )


def checked(settings: Settings) -> Mapping[str, Tenant]:
    """The tenants, for what decides by them. ConfigError (exit 3) where one has a database that is not in the config,
    or a user's is not there."""
    path = settings.auth.tenant_file
    entries = tenant_file(path, there=lambda one: one.database in settings.databases).current()
    check_members(path, entries, user_file(settings.auth.user_file).current())
    return entries


def add(file: EntryFile[Tenant], tenant: Tenant) -> None:
    """Write a new tenant into the file; ConflictError (exit 5) where the name or its place is another's."""
    if not NAME.fullmatch(tenant.name):
        raise UsageError(
            f"{repeated(repr(tenant.name), 'that')} cannot be a tenant's name",
            "a-z first, then a-z 0-9 -, at most 31 characters",
        )
    check_note(tenant.note)
    with file.edit() as entries:
        if tenant.name in entries:
            raise ConflictError(f"there is a tenant {tenant.name} already", "`mcpctl tenant list` shows all")
        for _, other in _clashes({**entries, tenant.name: tenant}):
            raise ConflictError(f"{other.where} is the tenant {other.name}'s", "tenants share nothing")
        entries[tenant.name] = tenant


def check_members(path: Path, entries: Mapping[str, Tenant], people: Mapping[str, User]) -> None:
    """See that every tenant which a user belongs to is there. ConfigError (exit 3) where one is not: its database would
    be open to whoever has no tenant."""
    for user in people.values():
        if user.tenant is not None and user.tenant not in entries:
            raise ConfigError(
                f"{path}: there is no tenant {user.tenant}, and the user {user.name} belongs to it",
                gone_hint(user),
            )


def gone_hint(user: User) -> str:
    """What to do where the tenant that a user belongs to is not there."""
    return (
        f"mend the name in tenants.yaml, or put it back: mcpctl tenant add {user.tenant}; or: mcpctl user remove "
        f"{user.name}"
    )


def closed(entries: Mapping[str, Tenant], user: User | None) -> dict[str, str]:
    """The databases that are closed to a user, or to service tokens, with why: one is another tenant's alone, or the
    user's grant reaches a schema in it that is."""
    others = [one for one in entries.values() if user is None or one.name != user.tenant]
    reached = [one for one in others if user is not None and _enters(user, one)]
    return {
        **{one.database: f"the user's grant reaches {one.where}, which is the tenant {one.name}'s" for one in reached},
        **{one.database: f"the database {one.database} is a tenant's alone" for one in others if one.schema is None},
    }


def grantable(entries: Mapping[str, Tenant], tenant: str | None, database: str) -> bool:
    """Whether a user of that tenant, or of none, may be granted all of a database, or of what the tenant has of it."""
    if tenant is not None:
        return tenant in entries and entries[tenant].database == database
    return all(one.database != database for one in entries.values())


def strangers(tenant: Tenant, people: Mapping[str, User]) -> list[str]:
    """The users outside of a tenant who were granted something in its place."""
    return [user.name for user in people.values() if user.tenant != tenant.name and _enters(user, tenant)]


def astray(entries: Mapping[str, Tenant], people: Mapping[str, User]) -> Iterator[tuple[str, Tenant]]:
    """Each user of a tenant who has a grant outside of its place, with the tenant as it would be if it had that one:
    where the file has a typo, that one is meant, and open to others."""
    for user in people.values():
        if (place := entries.get(user.tenant or "")) is None:
            continue
        for grant in user.grants.values():
            for one in (*grant.read, *grant.write):
                if place.database != grant.database or place.outside([one]):
                    whole = place.schema is None or one == grants.EVERYTHING
                    schema = None if whole else grants.quoted(grants.parse(one).schema)
                    yield user.name, replace(place, database=grant.database, schema=schema)


def _enters(user: User, tenant: Tenant) -> bool:
    grant = user.grants.get(tenant.database)
    if grant is None:
        return False
    if tenant.schema is None:
        return True
    return any(
        one == grants.EVERYTHING or grants.parse(one).schema == tenant.own for one in (*grant.read, *grant.write)
    )


def find(entries: Mapping[str, Tenant], name: str) -> Tenant:
    """The tenant of that name, or NotFoundError (exit 4)."""
    try:
        return entries[name]
    except KeyError:
        said, hint = repeated(name, "of that name"), f"make one with `mcpctl tenant add {repeated(name, 'T')}`"
        raise NotFoundError(f"there is no tenant {said}", hint) from None


def removable(file: EntryFile[Tenant], name: str, people: Mapping[str, User]) -> Tenant:
    """The tenant of that name; ConflictError (exit 5) while users belong to it."""
    found = find(file.current(), name)
    members = [user.name for user in people.values() if user.tenant == name]
    if members:
        word = "belongs" if len(members) == 1 else "belong"
        raise ConflictError(f"{', '.join(members[:5])} {word} to the tenant {name}", f"mcpctl user remove {members[0]}")
    return found


def remove(file: EntryFile[Tenant], name: str, people: Mapping[str, User]) -> Tenant:
    """Take a tenant out of the file; ConflictError (exit 5) while users belong to it."""
    removable(file, name, people)  # before the edit, which would make the file
    with file.edit(though_full=True) as entries:
        tenant = find(entries, name)
        del entries[name]
    return tenant
