"""The tenant file: who shares data with whom. A tenant has a database of the config, or one schema in it; its users,
and with them their tokens, see nothing else. The tenant comes from the credential alone, never from what a call says.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mcpctl.errors import ConflictError, NotFoundError, UsageError
from mcpctl.identity import grants
from mcpctl.identity.entry_file import EntryFile, Shape
from mcpctl.identity.users import User, check_note, read_time, rfc3339

NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
_FIELDS = ("created_at", "database", "schema", "note")


@dataclass(frozen=True, slots=True)
class Tenant:
    """One entry of tenants.yaml. `schema` is None where the whole database is the tenant's."""

    name: str
    created_at: datetime
    database: str
    schema: str | None = None
    note: str | None = None

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

    def outside(self, targets: Iterable[str]) -> str | None:
        """The first target of a grant in its database that is not the tenant's own; None where all are."""
        if self.schema is None:
            return None
        own = grants.parse(self.schema).schema
        return next((one for one in targets if one == grants.EVERYTHING or grants.parse(one).schema != own), None)


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
    return Tenant(name, read_time(fields["created_at"], "created_at"), database, schema, note)


def as_values(tenant: Tenant) -> dict[str, Any]:
    """The entry's fields as plain values, without its name."""
    return {
        "created_at": rfc3339(tenant.created_at),
        "database": tenant.database,
        "schema": tenant.schema,
        "note": tenant.note,
    }


_SHAPE: Shape[Tenant] = Shape("tenants", NAME, _read, as_values)


def tenant_file(path: Path) -> EntryFile[Tenant]:
    """The tenant file at `path`; where there is none, there are no tenants, and whoever belongs to one is refused."""
    return EntryFile(path, _SHAPE, optional=True)


def add(file: EntryFile[Tenant], tenant: Tenant) -> None:
    """Write a new tenant into the file; ConflictError (exit 5) where the name or its place is another's."""
    if not NAME.fullmatch(tenant.name):
        raise UsageError(
            f"{tenant.name!r} cannot be a tenant's name", "a-z first, then a-z 0-9 -, at most 31 characters"
        )
    check_note(tenant.note)
    with file.edit() as entries:
        if tenant.name in entries:
            raise ConflictError(f"there is a tenant {tenant.name} already", "`mcpctl tenant list` shows all")
        for other in entries.values():
            if other.database == tenant.database and (
                other.schema == tenant.schema or not (other.schema and tenant.schema)
            ):
                raise ConflictError(f"{other.where} is the tenant {other.name}'s", "tenants share nothing")
        entries[tenant.name] = tenant


def alone(entries: Mapping[str, Tenant], but: str | None = None) -> frozenset[str]:
    """The databases that are one tenant's alone, and so closed to everybody else; `but` that tenant's."""
    return frozenset(one.database for one in entries.values() if one.schema is None and one.name != but)


def strangers(tenant: Tenant, people: Mapping[str, User]) -> list[str]:
    """The users outside of a tenant who were granted something in its place."""
    return [user.name for user in people.values() if user.tenant != tenant.name and _enters(user, tenant)]


def _enters(user: User, tenant: Tenant) -> bool:
    grant = user.grants.get(tenant.database)
    if grant is None:
        return False
    if tenant.schema is None:
        return True
    own = grants.parse(tenant.schema).schema
    return any(one == grants.EVERYTHING or grants.parse(one).schema == own for one in (*grant.read, *grant.write))


def find(entries: Mapping[str, Tenant], name: str) -> Tenant:
    """The tenant of that name, or NotFoundError (exit 4)."""
    try:
        return entries[name]
    except KeyError:
        raise NotFoundError(f"there is no tenant {name}", f"make one with `mcpctl tenant add {name}`") from None


def remove(file: EntryFile[Tenant], name: str, people: Mapping[str, User]) -> Tenant:
    """Take a tenant out of the file; ConflictError (exit 5) while users belong to it."""
    find(file.current(), name)  # before the edit, which would make the file
    members = [user.name for user in people.values() if user.tenant == name]
    if members:
        raise ConflictError(f"{', '.join(members[:5])} belong to the tenant {name}", f"mcpctl user remove {members[0]}")
    with file.edit(though_full=True) as entries:
        tenant = find(entries, name)
        del entries[name]
    return tenant
