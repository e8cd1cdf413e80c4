"""What users have allowed OAuth clients: the code, the connection, its refresh tokens, its end.

A connection is a session of the kind OAUTH (`sessions.py`), so that its access tokens open the door as any token does,
and all that ends a session ends them. Here is what OAuth adds: each code and each refresh token is good once, and
whoever shows one a second time ends the connection, since one of two who have it has stolen it (OAuth 2.1, sections
4.1.3 and 4.3.1). There is no grace for an answer that was lost: a thief who is quicker than the client by a second
would keep what he has. All secrets have 256 random bits, and are kept as SHA-256.

All refresh tokens of a connection are known until it ends, used ones as well: if some were forgotten, whoever has
stolen one would renew until it is, and nobody would notice (RFC 9700, section 4.14.2). So that a client which renews
all the time does not fill the disk, a connection ends after MOST_RENEWALS of them, and its user is asked again.
"""

import hashlib
import json
import re
import secrets
import sqlite3
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from mcpctl.config import covers
from mcpctl.errors import Error, NotFoundError
from mcpctl.identity import sessions, tokens
from mcpctl.identity.oauth_clients import Client
from mcpctl.identity.sessions import OAUTH, Session, Sessions, mark_of
from mcpctl.identity.users import User
from mcpctl.state import State

CODE_LIFE = timedelta(seconds=60)
"""OAuth 2.1, section 4.1.2 recommends ten minutes at most; a browser goes on by itself."""
OVERLAP = timedelta(seconds=30)
"""For which the access token before is taken, so that the calls that are on their way arrive."""
_REFRESH = re.compile(r"mcr_(S[0-9a-z]{7})_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}")
_CODE = re.compile(r"[A-Za-z0-9_-]{43}")
_VERIFIER = re.compile(r"[A-Za-z0-9._~-]{43,128}")
_CHALLENGE = re.compile(r"[A-Za-z0-9_-]{43}")
REMEMBERED = timedelta(days=90)
"""For which a user is not asked again what they have allowed."""
_KEPT = timedelta(days=1)
"""For which a used code is known, so that its second use is noticed."""
MOST_RENEWALS = 10_000
"""Renewals of a connection: 90 days of hourly ones, the defaults, are 2,160."""
_CODE_COLUMNS = (
    "client, name, host, redirect, challenge, scopes, resource, renews, user, mark, made, ends, used, session"
)
_CONNECTION = "session, client, name, host, redirect, scopes, resource, renews, permissions"
People = Callable[[], Mapping[str, User]]


class GrantError(Error):
    """A code or a refresh token that opens nothing, or not that. `message` is for the log, `error` the code of RFC
    6749, section 5.2. `ended`: the session that was ended for it."""

    status = 400

    def __init__(self, message: str, ended: Session | None = None, *, error: str = "invalid_grant") -> None:
        super().__init__(message)
        self.ended = ended
        self.error = error


class Allowed(NamedTuple):
    """What a user has allowed. `mark`: `mark_of` their password; `challenge`: the client's, of PKCE."""

    client: Client
    redirect: str
    challenge: str
    scopes: tuple[str, ...]
    resource: str
    user: str
    mark: str


class Issued(NamedTuple):
    """What a client gets: `refresh` is None for one that takes none. `ended`: the sessions that made room."""

    session: Session
    access: str
    refresh: str | None
    scopes: tuple[str, ...]
    ended: Sequence[Session] = ()


@dataclass(frozen=True, slots=True)
class Connection:
    """What a user has allowed, as it is now. `permissions` are those of all its `scopes`: its access token may have
    fewer."""

    session: Session
    client: str
    name: str
    host: str | None
    redirect: str
    scopes: tuple[str, ...]
    resource: str
    renews: bool
    permissions: tuple[str, ...]


def stands(people: Mapping[str, User], name: str, mark: str, since: datetime) -> bool:
    """Whether that user is still who signed in then: there, not disabled, and with the same password."""
    user = people.get(name)
    if user is None or user.disabled_at is not None or user.created_at > since:
        return False
    return secrets.compare_digest(mark_of(user.password), mark)


def is_challenge(text: str) -> bool:
    """Whether a text has the form of a code_challenge of the method S256 (RFC 7636, section 4.2)."""
    return bool(_CHALLENGE.fullmatch(text))


class Connections:
    """The connections of an installation. `permissions` says what scopes allow, `access` how long a token is good."""

    def __init__(
        self,
        state: State,
        store: Sessions,
        people: People,
        permissions: Callable[[Sequence[str]], tuple[str, ...]],
        access: timedelta,
        now: Callable[[], datetime] = tokens.utcnow,
    ) -> None:
        self._state = state
        self._sessions = store
        self._people = people
        self._permissions = permissions
        self._now = now
        self.access = access

    # -- the code ------------------------------------------------------------------------------------------------------

    def allow(self, allowed: Allowed) -> str:
        """A code for a client that a user has just allowed. Raises UnavailableError where it cannot be written."""
        code, now, client = secrets.token_urlsafe(32), self._now().timestamp(), allowed.client
        values = (
            _digest(code), client.id, client.name, client.host, allowed.redirect, allowed.challenge,
            json.dumps(allowed.scopes), allowed.resource, client.renews, allowed.user, allowed.mark, now,
            now + CODE_LIFE.total_seconds(),
        )  # fmt: skip
        with self._state.change() as connection:
            connection.execute(
                "INSERT INTO oauth_codes (hash, client, name, host, redirect, challenge, scopes, resource, renews, "
                "user, mark, made, ends) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )
        return code

    def redeem(
        self, code: str, client: str, redirect: str | None, verifier: str, resource: str | None, address: str | None
    ) -> Issued:
        """Open the connection that a code stands for. `redirect` and `resource` are compared where they are given.
        GrantError for a code that is none, or not this client's; each is good once, for whoever shows it first."""
        found = self._code(code)
        if found["used"]:
            raise self._shown_twice(found)
        if problem := self._why_not(found, client, redirect, verifier, resource):
            with self._state.change() as connection:
                connection.execute("UPDATE oauth_codes SET used = 1 WHERE hash = ?", (_digest(code),))
            raise GrantError(problem)
        scopes = tuple(json.loads(found["scopes"]))
        permissions = self._permissions(scopes)
        found["permissions"] = json.dumps(permissions)
        refresh: list[str] = []

        def also(connection: sqlite3.Connection, name: str) -> None:
            done = connection.execute(
                "UPDATE oauth_codes SET used = 1, session = ? WHERE hash = ? AND NOT used", (name, _digest(code))
            )
            if not done.rowcount:
                raise GrantError("the code is being redeemed by two at once")
            connection.execute(
                f"INSERT INTO oauth_connections ({_CONNECTION}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                (name, *(found[key] for key in _CONNECTION.split(", ")[1:])),
            )
            if found["renews"]:
                refresh.append(_keep(connection, name))

        try:
            opened = self._sessions.open(
                found["user"], found["mark"], kind=OAUTH, access=self.access, permissions=permissions,
                client=client, address=address, also=also,
            )  # fmt: skip
        except GrantError:
            raise self._shown_twice(self._code(code)) from None
        return Issued(opened.session, opened.text, refresh[0] if refresh else None, scopes, opened.ended)

    def _code(self, code: str) -> dict[str, Any]:
        sql = f"SELECT {_CODE_COLUMNS} FROM oauth_codes WHERE hash = ?"  # noqa: S608 - of constants
        rows = self._state.rows(sql, (_digest(code),)) if _CODE.fullmatch(code) else []
        if not rows:
            raise GrantError("there is no such code")
        return dict(zip(_CODE_COLUMNS.split(", "), rows[0], strict=True))

    def _why_not(
        self, found: Mapping[str, Any], client: str, redirect: str | None, verifier: str, resource: str | None
    ) -> str | None:
        if found["ends"] <= self._now().timestamp():
            return "the code is too old"
        if found["client"] != client:
            return "the code is another client's"
        if redirect is not None and redirect != found["redirect"]:
            return "the code was sent to another redirect_uri"
        if resource is not None and resource != found["resource"]:
            return "the code is for another resource"
        if not _fits(verifier, found["challenge"]):
            return "the code_verifier is wrong"
        if not stands(self._people(), found["user"], found["mark"], _time(found["made"])):
            return "the user is gone, disabled, or has another password"
        return None

    def _shown_twice(self, found: Mapping[str, Any]) -> GrantError:
        return GrantError("the code was shown twice", self._end_known(found["session"]))

    # -- the connection ------------------------------------------------------------------------------------------------

    def renew(self, refresh: str, client: str, resource: str | None, scopes: Sequence[str] | None) -> Issued:
        """The next access token, for these of its scopes alone where some are named, and the next refresh token, which
        keeps all (RFC 6749, section 6). GrantError for one that opens nothing, and where more is asked for; whoever
        shows one again ends the connection."""
        name = session_of(refresh)
        rows = self._state.rows("SELECT used, number FROM oauth_refresh_tokens WHERE hash = ?", (_digest(refresh),))
        if name is None or not rows:
            raise GrantError("there is no such refresh token")
        found = self._connection(name)
        used, number = rows[0]
        if used:
            raise GrantError("the refresh token was shown twice", self._end_known(name))
        session = found.session if found is not None else None
        if found is None or session is None or session.over_at <= self._now():
            raise GrantError("the connection has ended")
        if number > MOST_RENEWALS:
            raise GrantError(f"it was renewed {MOST_RENEWALS} times", self._end_known(name))
        if found.client != client:  # who has stolen it has no use for it, and its owner is warned
            raise GrantError("the refresh token is another client's", self._end_known(name))
        if not stands(self._people(), session.user or "", session.mark, session.created_at):
            raise GrantError("the user is gone, disabled, or has another password", self._end_known(name))
        if resource is not None and resource != found.resource:
            raise GrantError("the refresh token is for another resource")
        given = found.scopes if scopes is None else self._narrower(found, scopes)
        following: list[str] = []

        def also(connection: sqlite3.Connection) -> None:
            done = connection.execute(
                "UPDATE oauth_refresh_tokens SET used = 1 WHERE hash = ? AND NOT used", (_digest(refresh),)
            )
            if not done.rowcount:
                raise GrantError("the refresh token is being used by two at once")
            following.append(_keep(connection, name))

        try:
            access = self._sessions.renew(session, self.access, OVERLAP, also, self._of_scopes(found, given))
        except GrantError:
            raise GrantError("the refresh token was shown twice", self._end_known(name)) from None
        except NotFoundError:
            raise GrantError("the connection has ended") from None
        renewed = self._sessions.known.get(name)
        if renewed is None:  # somebody has ended it meanwhile
            raise GrantError("the connection has ended")
        return Issued(renewed, access, following[0], given)

    def _narrower(self, found: Connection, scopes: Sequence[str]) -> tuple[str, ...]:
        """These scopes, if the connection has each, or one that allows all that it does; else a GrantError."""
        has = self._permissions(found.scopes)
        for one in dict.fromkeys(scopes):
            wants = self._permissions([one])
            implied = bool(wants) and all(any(covers(its, want) for its in has) for want in wants)
            if one not in found.scopes and not implied:
                raise GrantError("the refresh token is for other scopes", error="invalid_scope")
        return tuple(dict.fromkeys(scopes))

    def _of_scopes(self, found: Connection, scopes: tuple[str, ...]) -> tuple[str, ...]:
        """What these scopes of a connection allow; never what its user was not asked for."""
        if scopes == found.scopes:
            return found.permissions
        return tuple(sorted(_common(found.permissions, self._permissions(scopes))))

    def revoke(self, text: str, client: str) -> Session | None:
        """End the connection of an access or a refresh token, if it is that client's (RFC 7009); its session, if it had
        not ended."""
        name = sessions.session_id(text) or session_of(text)
        found = self._connection(name) if name is not None else None
        if name is None or found is None or found.client != client:
            return None
        now = self._now()
        sql = "SELECT 1 FROM oauth_refresh_tokens WHERE hash = ? AND session = ?"
        ours = found.session.is_current(text) or found.session.was_current(text, now)
        return self._end_known(name) if ours or self._state.rows(sql, (_digest(text), name)) else None

    def of(self, user: str) -> list[Connection]:
        """What a user has allowed and is not over, the one that was used last first."""
        own = [one for one in self._sessions.of(user) if one.kind == OAUTH]
        return [found for one in own if (found := self._connection(one.id)) is not None]

    def end(self, user: str, name: str) -> Connection | None:
        """End a connection of that user's; None where there is none of that id."""
        found = next((one for one in self.of(user) if one.session.id == name), None)
        return found if found is not None and self._sessions.end([name]) else None

    def _connection(self, name: str) -> Connection | None:
        self._sessions.look()
        session = self._sessions.known.get(name)
        rows = self._state.rows(f"SELECT {_CONNECTION} FROM oauth_connections WHERE session = ?", (name,))  # noqa: S608
        if session is None or not rows:
            return None
        _, client, title, host, redirect, scopes, resource, renews, permissions = rows[0]
        return Connection(
            session, client, title, host, redirect, tuple(json.loads(scopes)), resource, bool(renews),
            _kept(permissions, session),
        )  # fmt: skip

    def _end_known(self, name: str | None) -> Session | None:
        """End a session; what it was, if it had not ended."""
        self._sessions.look()
        session = self._sessions.known.get(name or "")
        return session if session is not None and self._sessions.end([session.id]) else None

    # -- consent that is remembered, and what is forgotten -------------------------------------------------------------

    def remember(self, user: str, client: str, redirect: str, scopes: Sequence[str]) -> None:
        """Note what a user has allowed a client, so that it need not be asked again."""
        with self._state.change() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO oauth_consents (user, client, redirect, scopes, made) VALUES (?, ?, ?, ?, ?)",
                (user, client, redirect, json.dumps(list(scopes)), self._now().timestamp()),
            )

    def remembers(self, user: User, client: str, redirect: str, scopes: Sequence[str]) -> bool:
        """Whether this user has allowed all of that, and not too long ago."""
        rows = self._state.rows(
            "SELECT scopes, made FROM oauth_consents WHERE user = ? AND client = ? AND redirect = ?",
            (user.name, client, redirect),
        )
        if not rows or _time(rows[0][1]) < max(user.created_at, self._now() - REMEMBERED):
            return False
        return set(scopes) <= set(json.loads(rows[0][0]))

    def forget(self, user: str, client: str) -> None:
        """Ask that user again whether the client may."""
        with self._state.change() as connection:
            connection.execute("DELETE FROM oauth_consents WHERE user = ? AND client = ?", (user, client))

    def fit(self, is_known: Callable[[str], bool]) -> list[Session]:
        """Take from connections what their scopes allow no longer; none gets what its user was not asked for. End
        those whose client is not known any more: these."""
        self._sessions.look()
        bounds, kept, strangers = dict[str, tuple[str, ...]](), list[tuple[str, str]](), list[Session]()
        sql = "SELECT session, client, scopes, permissions FROM oauth_connections"
        for name, client, scopes, permissions in self._state.rows(sql):
            if (session := self._sessions.known.get(name)) is None:
                continue
            had, now = _kept(permissions, session), session.permissions or ()
            left = _common(had, self._permissions(json.loads(scopes)))
            if not is_known(client):
                strangers.append(session)
                continue
            if left != set(had):
                kept.append((json.dumps(sorted(left)), name))
            if (rest := _common(now, tuple(left))) != set(now):
                bounds[name] = tuple(sorted(rest))
        self._sessions.bound(bounds)
        if kept:
            with self._state.change() as connection:
                connection.executemany("UPDATE oauth_connections SET permissions = ? WHERE session = ?", kept)
        ended = self._sessions.end(one.id for one in strangers)
        return [one for one in strangers if one.id in ended]

    def sweep(self) -> None:
        """Forget old codes and what belongs to sessions that are over; end those that can be renewed no more."""
        self._sessions.look()
        now = self._now()
        over = [
            name
            for (name,) in self._state.rows("SELECT session FROM oauth_connections WHERE NOT renews")
            if (one := self._sessions.known.get(name)) is not None and (one.expires_at or now) <= now
        ]
        self._sessions.end(over)
        with self._state.change() as connection:
            connection.execute(
                "DELETE FROM oauth_codes WHERE ends < ? OR (ends < ? AND session IS NULL)",
                ((now - _KEPT).timestamp(), now.timestamp()),
            )
            connection.execute("DELETE FROM oauth_consents WHERE made < ?", ((now - REMEMBERED).timestamp(),))
            for table in ("oauth_connections", "oauth_refresh_tokens"):
                connection.execute(
                    f"DELETE FROM {table} WHERE session NOT IN (SELECT id FROM sessions WHERE NOT ended)"  # noqa: S608
                )


def _common(given: Sequence[str], allowed: Sequence[str]) -> set[str]:
    """The patterns that allow what both do."""
    return {one for one in given if any(covers(other, one) for other in allowed)} | {
        one for one in allowed if any(covers(other, one) for other in given)
    }


def _kept(permissions: str | None, session: Session) -> tuple[str, ...]:
    """Those of all scopes of a connection; what an earlier version has opened has not kept them apart."""
    return (session.permissions or ()) if permissions is None else tuple(json.loads(permissions))


def session_of(refresh: str) -> str | None:
    """The session of a refresh token whose form and checksum are right; None for anything else."""
    found = _REFRESH.fullmatch(refresh)
    return found[1] if found is not None and tokens.signed(refresh[:-7]) == refresh else None


def _keep(connection: sqlite3.Connection, name: str) -> str:
    """A new refresh token of that session's."""
    text = tokens.signed(f"mcr_{name}_{tokens.base62(secrets.randbits(256), 43)}")
    sql = "SELECT coalesce(max(number), 0) + 1 FROM oauth_refresh_tokens WHERE session = ?"
    (number,) = connection.execute(sql, (name,)).fetchone()
    sql = "INSERT INTO oauth_refresh_tokens (hash, session, number) VALUES (?, ?, ?)"
    connection.execute(sql, (_digest(text), name, number))
    return text


def _fits(verifier: str, challenge: str) -> bool:
    """RFC 7636, section 4.6, by S256."""
    if not _VERIFIER.fullmatch(verifier):
        return False
    made = urlsafe_b64encode(hashlib.sha256(verifier.encode("ascii")).digest()).rstrip(b"=").decode()
    return secrets.compare_digest(made, challenge)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _time(stamp: float) -> datetime:
    return datetime.fromtimestamp(stamp, UTC)
