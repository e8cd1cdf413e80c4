"""What a new token is given: its end and its permissions; how it is handed over, once, and what is said of it."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcpctl.cli import output
from mcpctl.cli.common import config_flag, user_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime

    from mcpctl.config_keys import Settings
    from mcpctl.config_values import Network
    from mcpctl.identity.blocked import Block
    from mcpctl.identity.tenants import Tenant
    from mcpctl.identity.tokens import Token
    from mcpctl.identity.users import User


def people(found: "Settings") -> "Mapping[str, User] | None":
    """The users; None while their file is broken, which hides no token."""
    from mcpctl.errors import Error
    from mcpctl.identity import users

    try:
        return users.user_file(found.auth.user_file).current()
    except Error as problem:
        output.warn(problem.message, problem.hint)
        return None


def blocked_by_us(found: "Settings") -> "Mapping[str, Block] | None":
    """The tokens that the server has blocked; None while nobody can say, which is warned of."""
    from contextlib import closing

    from mcpctl.errors import Error
    from mcpctl.identity.blocked import Blocked, store

    try:
        with closing(store(found)) as state:
            return Blocked(state).current()
    except Error as problem:
        output.warn(problem.message, problem.hint)
        return None


def standing(
    token: "Token", known: "Mapping[str, User] | None", now: "datetime", blocked: "Mapping[str, Block] | None"
) -> str:
    """A token's status; `unknown` where it would be good, and nobody can say whether it is blocked."""
    from mcpctl.identity import tokens

    status = tokens.standing(token, known, now, blocked or ())
    return "unknown" if blocked is None and status in ("active", "expiring") else status


def not_to_rotate(found: "Settings") -> dict[str, str]:
    """{token id: why}: its successor would be a way around the block, or no canary. Raises ConfigError where nobody can
    say who is blocked."""
    from contextlib import closing

    from mcpctl.identity.blocked import Blocked, store

    with closing(store(found)) as state:
        blocked = dict.fromkeys(Blocked(state).current(), "blocked")
    return {**dict.fromkeys(found.canaries.tokens, "a canary"), **blocked}


def record(token: "Token", status: str) -> dict[str, Any]:
    """A token as `--json` shows it."""
    from mcpctl.identity.tokens import as_values

    found = as_values(token)
    names = ("user", "databases", "permissions", "created_at", "expires_at", "revoked_at", "note")
    return {"id": token.id, **{name: found[name] for name in names}, "status": status}


def networks_of(texts: "list[str] | None") -> "tuple[Network, ...] | None":
    """What --allow-ip names; None where it names nothing. UsageError (exit 2) for what is no network."""
    from mcpctl.config_values import network
    from mcpctl.errors import UsageError

    try:
        return tuple(network(text) for text in texts) if texts else None
    except ValueError as problem:
        raise UsageError(f"--allow-ip takes {problem}", "repeat it for each network") from None


@contextlib.contextmanager
def handing_over(out: Path | None) -> "Iterator[Callable[[Token, str, bool, datetime], None]]":
    """A way to hand over a new token, once and nowhere else. The file for it is made before the token is: where it
    cannot be, there is no token; where there is no token, it goes away again."""
    import os

    from mcpctl import private_file
    from mcpctl.errors import ConfigError, Error, UsageError

    if out is not None and str(out) == "-":
        raise UsageError("--out takes a file, not -", "without --out the token goes to stdout")
    if out is not None:
        private_file.check_folder(out.absolute().parent)  # else the token would be made, and never handed over
        try:
            private_file.create(out, b"\n" * 80)  # its whole room, so that a full disk is known now
        except ConfigError as problem:
            folder = f"name a file in a folder that {user_name()} may write"
            hint = f"{folder}; run as root, mcpctl works as the owner of its files"
            raise ConfigError(problem.message, hint) from None
    given = False

    def give(token: "Token", text: str, json: bool, now: "datetime") -> None:
        nonlocal given
        try:
            if out is not None:
                with os.fdopen(private_file.open_checked(out, os.O_WRONLY), "wb") as file:
                    file.write(text.encode() + b"\n")
                    file.truncate()
                given = True
            heard = True
            if json:
                heard = output.put_json(
                    {
                        **record(token, token.status(now)),
                        "token": text if out is None else None,
                        "out": out and str(out),
                    }
                )
            elif out is None:
                heard = output.put(text)
            if not heard and out is None:
                raise Error("nobody reads stdout")
        except (OSError, Error) as problem:
            why = getattr(problem, "strerror", None) or str(problem)
            raise Error(
                f"token {token.id} was made, but could not be handed over: {why}",
                f"make another, and: mcpctl token revoke {token.id}",
            ) from None

    try:
        yield give
    finally:
        if out is not None and not given:
            out.unlink(missing_ok=True)


def expiry_of(found: "Settings", text: str | None, now: "datetime") -> "datetime | None":
    """The end that is asked for, or the config's default. UsageError where there is none, or the config bars it."""
    from datetime import timedelta

    from mcpctl.errors import UsageError
    from mcpctl.identity.tokens import parse_expiry

    if text is not None:
        ends = parse_expiry(text, now)
    elif found.auth.token_lifetime is not None:
        ends = now + timedelta(seconds=found.auth.token_lifetime)
    else:
        raise UsageError(
            "--expiry is missing, and the config has no auth.token_lifetime",
            "say --expiry 90d, or `never` if it must be",
        )
    most = _latest(found, now)
    if most is not None and (ends is None or ends > most):
        raise UsageError(
            f"--expiry {text or 'of the config'} is beyond auth.max_token_lifetime ({most:%Y-%m-%d %H:%M} UTC now)",
            "choose an earlier one",
        )
    if ends is None:
        output.warn("a token that never expires is a bad idea", "nobody will notice when it leaks; choose --expiry 1y")
    return ends


def _latest(found: "Settings", now: "datetime") -> "datetime | None":
    """The latest end that the config lets a token have."""
    from datetime import timedelta

    most = found.auth.max_token_lifetime
    return None if most is None else now + timedelta(seconds=most)


def bounded(found: "Settings", text: str | None, now: "datetime") -> "datetime | None":
    """The end that a rotation asks for, or the latest one that the config lets it have."""
    return expiry_of(found, text, now) if text is not None else _latest(found, now)


def check_user(user: "User") -> None:
    """Refuses a token for somebody who may not come in."""
    from mcpctl.errors import ConflictError

    if user.disabled_at is not None:
        raise ConflictError(f"user {user.name} is disabled", f"mcpctl user enable {user.name}")


def check_services(found: "Settings", databases: "tuple[str, ...]") -> None:
    """Refuses a service token for a database where there is no login for it."""
    from mcpctl.errors import ConflictError

    for name in databases:
        if found.databases[name].roles == "per_user" and found.databases[name].service_dsn is None:
            raise ConflictError(
                f"in {name} each user logs in as themselves, and there is no login for a service token",
                f"set databases.{name}.service_dsn, or make it a user's: --user U",
            )


def check_places(found: "Settings", user: "User | None", databases: "tuple[str, ...]") -> None:
    """Refuses a token for a database that its tenant has not, or that is another's alone: it would open nothing."""
    from mcpctl.errors import ConflictError
    from mcpctl.identity import tenants

    places = tenants.checked(found)
    own = tenants.find(places, user.tenant) if user is not None and user.tenant is not None else None
    taken = {one.database: one for one in places.values() if one.schema is None}
    for name in databases:
        if own is not None:
            own.confine(name, ())
        elif (place := taken.get(name)) is not None:
            raise ConflictError(
                f"{place.where} is the tenant {place.name}'s alone, so the token would open nothing there",
                f"name another, or make it one of that tenant's users': mcpctl user add U --tenant {place.name}",
            )


def permission_of(found: "Settings", text: str) -> str:
    """A pattern that covers something that there is. ValueError for any other."""
    from mcpctl.config import check_permission
    from mcpctl.config_values import permission

    check_permission(permission(text), found.databases)
    return text


def kept(out: Path | None) -> str:
    """What is said of where a new token's text is."""
    return f"it is in {out}, and nowhere else" if out is not None else "keep it now, it is not shown again"


def tell(found: "Settings", entry: "Token", entries: Any, out: Path | None) -> None:
    """The facts of a new token, on stderr."""
    from mcpctl.config import covers
    from mcpctl.identity import tenants, users
    from mcpctl.identity.tokens import rfc3339, utcnow

    whose = f"user {entry.user}" if entry.user else "a service"
    ends = f"expires {rfc3339(entry.expires_at)}" if entry.expires_at else "never expires"
    output.say(f"token {entry.id} for {whose}, {ends}; {kept(out)}")
    if entry.permissions is not None and not any(text.startswith(("*", "tools:")) for text in entry.permissions):
        output.warn("this token's permissions name no tool, so it can call none", "add --permission 'tools:*'")
    elif entry.permissions is not None:
        asked = [f"databases:{name}:read" for name in found.databases]
        if not any(covers(pattern, wanted) for pattern in entry.permissions for wanted in asked):
            hint = "add --permission 'databases:*:read'"
            output.warn("this token's permissions name no database, so it can ask none", hint)
    everybody, places = users.user_file(found.auth.user_file).current(), tenants.checked(found)
    named = _usable(found, entry, everybody, places)
    _tell_of_grants(found, everybody.get(entry.user or ""), places, named)
    now = utcnow()
    living = [token for token in entries.values() if token.status(now) in ("active", "expiring")]
    wanted = [name for token in living for name in _usable(found, token, everybody, places)]
    worst = sum(found.databases[name].pool.max_size for name in wanted)
    _tell_of_limits(found, entry, named, living)
    if worst > found.limits.connections:
        output.say(
            f"note: the {len(living)} living tokens could want {worst} connections at once, and the server has "
            f"{found.limits.connections} (limits.connections): the longest-idle pool gives way, then calls wait"
        )


def _usable(
    found: "Settings", token: "Token", everybody: "Mapping[str, User]", places: "Mapping[str, Tenant]"
) -> list[str]:
    """The databases that a token is for, without those that tenants keep it from."""
    from mcpctl.identity import tenants

    user = everybody.get(token.user or "")
    own, closed = places.get((user and user.tenant) or ""), tenants.closed(places, user)
    named = [name for name in found.databases if token.databases is None or name in token.databases]
    return [name for name in named if name not in closed and (own is None or name == own.database)]


def _tell_of_grants(found: "Settings", user: "User | None", places: "Mapping[str, Tenant]", named: list[str]) -> None:
    """Whether the user could ask nothing with it: in a database whose roles are per user a grant is needed."""
    from mcpctl.identity import tenants

    per_user = [name for name in named if found.databases[name].roles == "per_user"]
    if user is not None and per_user and named == per_user and not any(name in user.grants for name in per_user):
        whole = [name for name in per_user if tenants.grantable(places, user.tenant, name)]
        only, most = "" if whole else " --schema S", whole or per_user  # of the others some schemas are tenants'
        command = f"mcpctl user grant {user.name} --database {most[0]}{only} --access read --apply"
        hint = command + config_flag(found.source)
        output.warn(f"{user.name} has no grant in {', '.join(most)}, so the token opens nothing there", hint)


def _tell_of_limits(found: "Settings", entry: "Token", named: list[str], living: "list[Token]") -> None:
    """Whether the user's tokens could want more than their login role may have, or the server more than PostgreSQL."""
    from mcpctl.errors import Error
    from mcpctl.keyring import Keyring
    from mcpctl.postgres import arithmetic
    from mcpctl.postgres.logins import Logins

    own = sum(token.user == entry.user for token in living) if entry.user is not None else 0
    logins = Logins(found.databases, Keyring(found.keyring.file))
    for name in named:
        database = found.databases[name]
        most = database.pool.max_per_user
        if database.roles == "per_user" and own * database.pool.max_size > most:
            output.say(
                f"note: {entry.user}'s {own} tokens could want {own * database.pool.max_size} connections to {name}, "
                f"and the login role has {most} (databases.{name}.pool.max_per_user): then calls wait"
            )
        try:
            room = arithmetic.asked(logins.own(name))
        except Error:  # a database that is down stops nobody from making a token
            continue
        if room is not None and found.limits.connections > room:
            output.say(
                f"note: limits.connections is {found.limits.connections}, and {name} has {room} connections to give"
            )
