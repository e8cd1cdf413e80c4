"""The user file: who there is, their passwords and roles, and what each was granted in which database."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mcpctl.config_keys import Auth
from mcpctl.config_values import text
from mcpctl.errors import ConflictError, NotFoundError, UsageError
from mcpctl.identity import grants, passwords
from mcpctl.identity.entry_file import EntryFile, Shape
from mcpctl.identity.grants import Grant

NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
ROLE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_FIELDS = ("created_at", "disabled_at", "roles", "tenant", "note", "grants", "password")
_TOKEN = re.compile(r"mc[a-z]_[0-9A-Za-z]{8}_[0-9A-Za-z]{20}")
_TENANT = re.compile(r"[a-z][a-z0-9-]{0,30}")
EVERYWHERE = "*"
"""In the place of a database's name: in all of them."""
Roles = tuple[str, ...] | None
Fewer = Callable[[Roles, Roles], bool]
"""Whether the second roles give less than the first. What a role gives, the policy knows."""


@dataclass(frozen=True, slots=True)
class User:
    """One entry of users.yaml. `roles` is None for a user who was given none, and has the default one. `password` is
    the hash of one, a PHC string: what was opened with another one must end. Tokens know nothing of it."""

    name: str
    created_at: datetime
    note: str | None = None
    disabled_at: datetime | None = None
    roles: tuple[str, ...] | None = None
    grants: Mapping[str, Grant] = field(default_factory=dict)
    tenant: str | None = None
    password: str | None = field(default=None, repr=False)

    def narrowed(self, before: "User", fewer: Fewer) -> dict[str, str]:
        """In which databases what was opened when the entry was `before` must end, now that it is this one, and why;
        EVERYWHERE for all of them. `fewer` compares the roles."""
        if self.created_at != before.created_at:
            return {EVERYWHERE: "its user is another one of that name"}
        if self.disabled_at is not None and before.disabled_at is None:
            return {EVERYWHERE: "its user is disabled"}
        if fewer(before.roles, self.roles):
            return {EVERYWHERE: "its user's roles give less"}
        if self.tenant != before.tenant:
            return {EVERYWHERE: "its user's tenant changed"}
        return {
            database: f"its user's grant on {database} was narrowed"
            for database, grant in before.grants.items()
            if not grant.rights <= (self.grants[database].rights if database in self.grants else frozenset())
        }

    def with_grant(self, grant: Grant) -> "User":
        """The entry with that grant in the place of the one in its database; a grant of nothing is left out."""
        others = {database: one for database, one in self.grants.items() if database != grant.database}
        if not (grant.empty and grant.state is None):
            others[grant.database] = grant
        return replace(self, grants=dict(sorted(others.items())))


def _read(name: str, fields: dict[str, Any]) -> User:
    if unknown := [field for field in fields if field not in _FIELDS]:
        raise ValueError(f"{unknown[0]}: there is no such key; there are {', '.join(_FIELDS)}")
    created, note, disabled = fields.get("created_at"), fields.get("note"), fields.get("disabled_at")
    if created is None:
        raise ValueError("created_at: is missing")
    if note is not None and not isinstance(note, str):
        raise ValueError("note: expected a text")
    roles, granted, tenant = fields.get("roles"), fields.get("grants") or {}, fields.get("tenant")
    if tenant is not None and not (isinstance(tenant, str) and _TENANT.fullmatch(tenant)):
        raise ValueError("tenant: expected a tenant's name")
    if roles is not None and not (
        isinstance(roles, list) and all(isinstance(one, str) and ROLE_NAME.fullmatch(one) for one in roles)
    ):
        raise ValueError("roles: expected a list of roles")
    if not isinstance(granted, dict):
        raise ValueError("grants: expected {database: {…}}")  # noqa: TRY004 - as all readers do
    return User(
        name,
        read_time(created, "created_at"),
        note,
        None if disabled is None else read_time(disabled, "disabled_at"),
        None if roles is None else tuple(roles),
        {database: grants.read(database, found) for database, found in granted.items()},
        tenant,
        None if fields.get("password") is None else passwords.read(fields["password"]),
    )


def listed_strangers(auth: Auth, people: Mapping[str, User]) -> list[tuple[str, str]]:
    """(key, name) of whom the config lists as an admin or a reader, and who is no user: a typo, or gone."""
    listed = {"auth.admin_users": auth.admin_users, "auth.read_only_users": auth.read_only_users}
    return [(key, name) for key, names in listed.items() for name in names if name not in people]


def read_time(value: Any, name: str) -> datetime:
    """A time of one of these files, in UTC; ValueError for what is none."""
    try:
        when = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        if when.tzinfo is not None:
            return when.astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: {str(value)[:40]!r} is not a time such as 2027-01-31T12:00:00Z") from None
    raise ValueError(f"{name}: has no time zone")


def rfc3339(when: datetime) -> str:
    """RFC 3339 in UTC, to the second or, where there is a part of one, to the microsecond."""
    return when.astimezone(UTC).isoformat().replace("+00:00", "Z")


def check_note(note: str | None) -> None:
    """A note is a short line of text."""
    if note is None:
        return
    try:
        text(note)
    except ValueError as problem:
        raise UsageError(f"--note takes {problem}", "or leave it out") from None
    if _TOKEN.search(note):
        raise UsageError("--note holds a token", "notes are shown and logged; name the token by its id")
    if len(note) > 1000:
        raise UsageError("--note is longer than 1000 characters", "say it shorter")


def repeated(name: str, instead: str) -> str:
    """A name as an error repeats it; `instead` of what has a token's form, mistyped or not."""
    return instead if _TOKEN.search(name) else name


def as_values(user: User) -> dict[str, Any]:
    """The entry's fields as plain values, without its name: what the file keeps, the hash of the password too."""
    return {
        "created_at": rfc3339(user.created_at),
        "disabled_at": user.disabled_at and rfc3339(user.disabled_at),
        "roles": None if user.roles is None else list(user.roles),
        "tenant": user.tenant,
        "note": user.note,
        "grants": {name: grants.as_values(grant) for name, grant in user.grants.items()} or None,
        "password": user.password,
    }


_SHAPE: Shape[User] = Shape("users", NAME, _read, as_values)


def user_file(path: Path) -> EntryFile[User]:
    """The user file at `path`."""
    return EntryFile(path, _SHAPE)


def add(
    file: EntryFile[User],
    name: str,
    note: str | None,
    now: datetime,
    roles: Iterable[str] | None = None,
    tenant: str | None = None,
    password: str | None = None,
) -> User:
    """Write a new user into the file; ConflictError (exit 5) where there is one of that name. `password` is a hash."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{repeated(repr(name), 'that')} cannot be a user name", "a-z first, then a-z 0-9 -, at most 31 characters"
        )
    check_note(note)
    with file.edit() as entries:
        if name in entries:
            raise ConflictError(f"there is a user {name} already", "`mcpctl user list` shows all")
        given = tuple(dict.fromkeys(roles)) if roles is not None else None
        entries[name] = user = User(name, now, note, roles=given, tenant=tenant, password=password)
    return user


def find(entries: Mapping[str, User], name: str) -> User:
    """The user of that name, or NotFoundError (exit 4)."""
    try:
        return entries[name]
    except KeyError:
        said, hint = repeated(name, "of that name"), f"make one with `mcpctl user add {repeated(name, 'U')}`"
        raise NotFoundError(f"there is no user {said}", hint) from None


def disable(file: EntryFile[User], name: str, when: datetime | None) -> tuple[User, bool]:
    """Set or, with None, clear the time since which a user is disabled; (entry, whether that changed anything)."""
    with file.edit(though_full=when is not None) as entries:
        user = find(entries, name)
        changed = (user.disabled_at is None) != (when is None)
        if changed:
            user = entries[name] = replace(user, disabled_at=when)
    return user, changed


def set_roles(file: EntryFile[User], name: str, roles: Iterable[str]) -> User:
    """Give a user these roles instead of those they have; none at all for none."""
    with file.edit() as entries:
        user = entries[name] = replace(find(entries, name), roles=tuple(dict.fromkeys(roles)))
    return user


def set_password(file: EntryFile[User], name: str, hashed: str | None) -> tuple[User, bool]:
    """Keep that hash of a user's password or, with None, none any more; (entry, whether that changed anything)."""
    with file.edit(though_full=hashed is None) as entries:
        before = find(entries, name)
        user = entries[name] = replace(before, password=hashed)
    return user, user != before


def remove(file: EntryFile[User], name: str) -> User:
    """Take a user out of the file. All of their tokens end with that."""
    with file.edit(though_full=True) as entries:
        user = find(entries, name)
        del entries[name]
    return user


def sealed_in(people: Mapping[str, User]) -> Iterator[tuple[str, str]]:
    """(sealed, what it is) of each password in the user file."""
    for user in people.values():
        for grant in user.grants.values():
            for access, sealed in grant.passwords.items():
                yield sealed, f"users.yaml: the {access} password of {user.name} in {grant.database}"
