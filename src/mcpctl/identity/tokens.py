"""The token file: mint, match, add, rotate, revoke, remove.

A token is `mcp_<id>_<secret>_<checksum>`: 8 characters of a-z0-9, 256 random bits in base62, and the CRC-32 of all
before it in base62, so that a typo is told from an attack without a hash, and secret scanners can find it. The file
keeps an Argon2id hash of the whole token; the secret is random, so the cheapest profile is enough (RFC 9106 is about
passwords that people choose).
"""

import hashlib
import ipaddress
import re
import secrets
import sys
import zlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import argon2
from argon2.exceptions import InvalidHashError

from mcpctl.config_values import Network, duration, network, permission
from mcpctl.errors import ConflictError, NotFoundError, UsageError
from mcpctl.identity.entry_file import EntryFile, Shape
from mcpctl.identity.users import NAME as USER_NAME
from mcpctl.identity.users import User, check_note, read_time
from mcpctl.identity.users import rfc3339 as rfc3339

# The secret has 256 random bits: nobody guesses it, so a hash that costs .02 ms is as good as one that costs 500.
CHEAP_ARGON2ID = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1, hash_len=32, salt_len=16)
EXPIRING = timedelta(days=14)
OLD = timedelta(days=365)
"""The age from which a token that was never rotated is warned of."""
_HASH = re.compile(r"\$argon2id\$v=19\$m=8,t=1,p=1\$[A-Za-z0-9+/]{22}\$[A-Za-z0-9+/]{43}")
_TOKEN = re.compile(r"mcp_([0-9a-z]{8})_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}")
_ID = re.compile(r"[0-9a-z]{8}")
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_FIELDS = (
    "user", "hash", "created_at", "expires_at", "revoked_at", "databases", "permissions", "allow_ips", "note",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Token:
    """One entry of tokens.yaml. Of what is None there is no limit, or it has not happened."""

    id: str
    user: str | None
    hash: str
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    databases: tuple[str, ...] | None = None
    permissions: tuple[str, ...] | None = None
    allow_ips: tuple[Network, ...] | None = None
    note: str | None = None

    @property
    def rights(self) -> tuple[object, ...]:
        """Everything that what it has open depends on: not its times, nor its note."""
        return (self.hash, self.user, self.databases, self.permissions, self.allow_ips)

    @property
    def person(self) -> str | None:
        """The user in users.yaml by whose entry it is judged."""
        return self.user

    @property
    def pool(self) -> str:
        """The name of its own pools: SHA-256 of the stored hash in hex."""
        return hashlib.sha256(self.hash.encode()).hexdigest()

    def status(self, now: datetime) -> str:
        """active, expiring (within 14 days), expired or revoked."""
        if self.revoked_at is not None:  # whatever the clock says: a clock that is set back brings nothing back
            return "revoked"
        if self.expires_at is None:
            return "active"
        if self.expires_at <= now:
            return "expired"
        return "expiring" if self.expires_at - now <= EXPIRING else "active"


def standing(token: Token, people: Mapping[str, User] | None, now: datetime, blocked: Container[str] = ()) -> str:
    """active, expiring, expired or revoked; or disabled with its user, or blocked: by the server, which has `blocked`
    it, or since whose it was is gone."""
    own = token.status(now)
    if own in ("expired", "revoked"):
        return own
    if token.id in blocked:
        return "blocked"
    if token.user is None or people is None:
        return own
    user = people.get(token.user)
    gone = user is None or user.created_at > token.created_at
    return "blocked" if user is None or gone else own if user.disabled_at is None else "disabled"


def aged(living: Iterable[Token], now: datetime) -> list[str]:
    """The ids of those that are OLD."""
    return [one.id for one in living if now - one.created_at >= OLD]


def utcnow() -> datetime:
    """The clock that everything is handed unless a test hands another."""
    return datetime.now(UTC)


def base62(number: int, width: int) -> str:
    """A number in so many digits of 0-9A-Za-z."""
    digits = ""
    for _ in range(width):
        number, digit = divmod(number, 62)
        digits = _BASE62[digit] + digits
    return digits


def _checksum(body: str) -> str:
    return base62(zlib.crc32(body.encode("ascii")), 6)


def mint(taken: Iterable[str] = ()) -> tuple[str, str]:
    """A new (id, token). The id is none of those taken."""
    taken = set(taken)
    while True:
        name = "".join(secrets.choice("0123456789abcdefghijklmnopqrstuvwxyz") for _ in range(8))
        if name not in taken:
            break
    return name, signed(f"mcp_{name}_{base62(secrets.randbits(256), 43)}")


def signed(body: str) -> str:
    """A token's text from what stands before its checksum."""
    return f"{body}_{_checksum(body)}"


def token_id(text: str) -> str | None:
    """The id of a token whose form and checksum are right; None for anything else. Costs no hash."""
    found = _TOKEN.fullmatch(text)
    if not found or not secrets.compare_digest(_checksum(text[:-7]), text[-6:]):
        return None
    return found[1]


def matches(token: Token, text: str) -> bool:
    """Whether this text is that token: one Argon2id of the cheap profile (20 µs)."""
    try:
        return CHEAP_ARGON2ID.verify(token.hash, text)
    except argon2.exceptions.VerificationError:
        return False


def parse_expiry(text: str, now: datetime) -> datetime | None:
    """When a token ends, from `12h 30d 2w 1y`, a date (its beginning, UTC), an RFC 3339 time, or `never` (None)."""
    if text == "never":
        return None
    try:
        when = now + timedelta(seconds=duration(text))
    except (ValueError, OverflowError):
        when = _date(text)
    if when <= now:
        raise UsageError(f"--expiry {text!r} is not in the future", "a token that has ended already helps nobody")
    return when


def _date(text: str) -> datetime:
    try:
        if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            return datetime.combine(date.fromisoformat(text), datetime.min.time(), UTC)
        when = datetime.fromisoformat(text)
        if when.tzinfo is not None:
            return when.astimezone(UTC)
        if "T" not in text and " " not in text:
            raise ValueError  # a date in another form than ours
    except (ValueError, OverflowError):
        raise UsageError(
            f"--expiry {text!r} is no lifetime", "say 12h, 30d, 2w, 1y, a date such as 2027-01-31, or never"
        ) from None
    raise UsageError(f"--expiry {text!r} has no time zone", "write it as 2027-01-31T12:00:00Z")


def _time(value: Any, name: str) -> datetime | None:
    if value is None:
        return None
    return read_time(value, name)


def _texts(value: Any, name: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{name}: expected a list of texts")
    return tuple(map(sys.intern, value))


def read_networks(value: Any) -> tuple[Network, ...] | None:
    """The field allow_ips, as a token and a tenant have it."""
    texts = _texts(value, "allow_ips")
    try:
        return None if texts is None else tuple(network(item, scoped=True) for item in texts)
    except ValueError as problem:
        raise ValueError(f"allow_ips: takes {problem}") from None


def _read_hash(value: Any) -> str:
    """An Argon2id PHC string of exactly our profile: a dearer or longer one would let a stranger make us pay."""
    if isinstance(value, str) and _HASH.fullmatch(value):
        return value
    try:
        cost = argon2.extract_parameters(value)
    except (InvalidHashError, AttributeError, TypeError, ValueError):
        raise ValueError("hash: is not an Argon2id hash as `mcpctl token add` makes it") from None
    if cost.type is not argon2.Type.ID:
        raise ValueError("hash: is not of the type Argon2id")
    raise ValueError(
        f"hash: t={cost.time_cost}, m={cost.memory_cost}, p={cost.parallelism}, {cost.salt_len}+{cost.hash_len} bytes; "
        "only t=1, m=8, p=1, 16+32 bytes is taken here"
    )


def _read(name: str, fields: dict[str, Any]) -> Token:
    if unknown := [field for field in fields if field not in _FIELDS]:
        raise ValueError(f"{unknown[0]}: there is no such key; there are {', '.join(_FIELDS)}")
    user, note, created = fields.get("user"), fields.get("note"), _time(fields.get("created_at"), "created_at")
    if user is not None and not (isinstance(user, str) and USER_NAME.fullmatch(user)):
        raise ValueError(f"user: {user!r} is no user name")
    if created is None:
        raise ValueError("created_at: is missing")
    if note is not None and not isinstance(note, str):
        raise ValueError("note: expected a text")
    permissions = _texts(fields.get("permissions"), "permissions")
    for one in permissions or ():
        permission(one)
    return Token(
        id=name,
        user=user and sys.intern(user),
        hash=_read_hash(fields.get("hash")),
        created_at=created,
        expires_at=_time(fields.get("expires_at"), "expires_at"),
        revoked_at=_time(fields.get("revoked_at"), "revoked_at"),
        databases=_texts(fields.get("databases"), "databases"),
        permissions=permissions,
        allow_ips=read_networks(fields.get("allow_ips")),
        note=note,
    )


def as_values(token: Token) -> dict[str, Any]:
    """The entry's fields as plain values, in the file's order, without its id."""
    return {
        "user": token.user,
        "hash": token.hash,
        "created_at": rfc3339(token.created_at),
        "expires_at": token.expires_at and rfc3339(token.expires_at),
        "revoked_at": token.revoked_at and rfc3339(token.revoked_at),
        "databases": None if token.databases is None else list(token.databases),
        "permissions": None if token.permissions is None else list(token.permissions),
        "allow_ips": None if token.allow_ips is None else [str(item) for item in token.allow_ips],
        "note": token.note,
    }


_SHAPE: Shape[Token] = Shape("tokens", _ID, _read, as_values)


def token_file(path: Path) -> EntryFile[Token]:
    """The token file at `path`."""
    return EntryFile(path, _SHAPE)


@dataclass(frozen=True)
class Wanted:
    """What a new token is to be limited to."""

    user: str | None = None
    expires_at: datetime | None = None
    databases: tuple[str, ...] | None = None
    permissions: tuple[str, ...] | None = None
    allow_ips: tuple[Network, ...] | None = None
    note: str | None = None


def add(file: EntryFile[Token], wanted: Wanted, now: datetime) -> tuple[Token, str]:
    """Write a new token into the file; returns its entry and the token itself, which exists nowhere else."""
    check_note(wanted.note)
    with file.edit() as entries:
        name, text = mint(entries)
        entry = Token(
            id=name,
            user=wanted.user,
            hash=CHEAP_ARGON2ID.hash(text),
            created_at=now,
            expires_at=wanted.expires_at,
            databases=wanted.databases,
            permissions=wanted.permissions,
            allow_ips=wanted.allow_ips,
            note=wanted.note,
        )
        entries[name] = entry
    return entry, text


def _find(entries: Mapping[str, Token], name: str) -> Token:
    try:
        return entries[name]
    except KeyError:
        whole = token_id(name)
        hint = f"that is a whole token; its id is {whole}" if whole else "`mcpctl token list` shows the ids"
        shown = name if _ID.fullmatch(name) else "of that form"
        raise NotFoundError(f"there is no token {shown}", hint) from None


def show(file: EntryFile[Token], name: str) -> Token:
    """The entry of that id, or NotFoundError (exit 4)."""
    return _find(file.current(), name)


def rotate(
    file: EntryFile[Token], name: str, overlap: timedelta | None, expires_at: datetime | None, now: datetime
) -> tuple[Token, Token, str]:
    """A new token with the rights of an old one; returns (old, new, the new token's text).

    The new one ends at `expires_at` or when the old one would have, whichever is first. The old one ends after
    `overlap`, or now. Both changes are one write.
    """
    with file.edit() as entries:
        old = _find(entries, name)
        if old.status(now) in ("revoked", "expired"):
            raise ConflictError(f"token {name} is {old.status(now)} already", "make a new one with `mcpctl token add`")
        fresh, text = mint(entries)
        ends = [when for when in (old.expires_at, expires_at) if when is not None]
        new = replace(
            old,
            id=fresh,
            hash=CHEAP_ARGON2ID.hash(text),
            created_at=max(now, old.created_at),  # whatever the clock says: not before its user was made
            expires_at=min(ends, default=None),
        )
        if overlap is None:
            old = replace(old, revoked_at=now)
        else:
            try:
                until = now + overlap
            except OverflowError:
                raise UsageError("--overlap is beyond all dates", "say 24h") from None
            old = replace(old, expires_at=until if old.expires_at is None else min(until, old.expires_at))
        entries[name] = old
        entries[fresh] = new
    return old, new, text


def revoke(
    file: EntryFile[Token], names: Iterable[str] | None, now: datetime, but: Iterable[str] = ()
) -> list[tuple[Token, bool]]:
    """End tokens now (all of them for None, `but` those), keeping their record: [(entry, whether it was alive until
    now)].

    An unknown id is NotFoundError and then nothing is changed. Revoking twice is fine.
    """
    done = []
    with file.edit(though_full=True) as entries:
        spared = {_find(entries, name).id for name in but}
        for name in [one for one in entries if one not in spared] if names is None else dict.fromkeys(names):
            entry = _find(entries, name)
            alive = entry.revoked_at is None
            if alive:
                entry = entries[name] = replace(entry, revoked_at=now)
            done.append((entry, alive))
    return done


def remove(file: EntryFile[Token], name: str) -> Token:
    """Take a token out of the file, record and all."""
    with file.edit(though_full=True) as entries:
        entry = _find(entries, name)
        del entries[name]
    return entry


def prune(file: EntryFile[Token], now: datetime) -> list[Token]:
    """Take out every token that is expired or revoked; returns them."""
    with file.edit(though_full=True) as entries:
        dead = [entry for entry in entries.values() if entry.status(now) in ("expired", "revoked")]
        for entry in dead:
            del entries[entry.id]
    return dead


def allows_address(token: Token, address: str | None) -> bool:
    """Whether the token may be used from there. A caller on stdio is on this machine."""
    return in_networks(token.allow_ips, address)


def in_networks(networks: tuple[Network, ...] | None, address: str | None) -> bool:
    """Whether an address is in one of these; None is any, and a caller on stdio is on this machine."""
    if networks is None:
        return True
    try:
        found = ipaddress.ip_address(address or "127.0.0.1")
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
        found = found.ipv4_mapped
    return any(found.version == item.version and found in item for item in networks)
