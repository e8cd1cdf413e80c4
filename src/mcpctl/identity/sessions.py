"""Sign-in sessions: what a user who has signed in holds instead of a token, in `state.db`, for all workers.

A session's text is `mcs_<id>_<secret>_<checksum>`, made as a token's is (`tokens.py`). Its id begins with an S, which
no token's does, so that both can stand in one table. The secret is kept as a SHA-256: it has 256 random bits, and
whoever reads the store can do nothing with it.

A session ends at its hard end, when it was not used for long, when its user signs out, is disabled, or has another
password, and when the user opens more of them than they may have: then the one goes that was idle for longest.
"""

import hashlib
import json
import re
import secrets
import sqlite3
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from mcpctl.config_keys import Auth
from mcpctl.errors import NotFoundError, UnavailableError
from mcpctl.identity import tokens
from mcpctl.identity.tokens import Token
from mcpctl.identity.users import rfc3339
from mcpctl.state import SHORTLY, State

PASSWORD, OAUTH = "password", "oauth"
"""How a session was opened: with a password, or for a client that its user has allowed."""
_TEXT = re.compile(r"mcs_(S[0-9a-z]{7})_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}")
_KEPT = timedelta(hours=1)
"""For which the record of one that has ended stays, so that each worker sees that it did."""
_HURRIED = timedelta(seconds=1)
"""For which nobody's use is worth waiting, where the store was held when one was to be noted."""
_FINEST, _COARSEST = timedelta(seconds=1), timedelta(seconds=30)
_EPOCH = datetime.fromtimestamp(0, UTC)
_COLUMNS = (
    "id, changed, ended, kind, user, hash, mark, created, used, ends, access_ends, before, before_ends, databases, "
    "permissions, client, address"
)
_RECORDS = "SELECT id, user, ended FROM sessions ORDER BY used DESC"
_NAMES_OF = "SELECT id FROM sessions WHERE user = ? AND NOT ended"
_NEXT = "UPDATE session_changes SET last = last + 1 RETURNING last"
_SINCE = f"SELECT {_COLUMNS} FROM sessions WHERE changed > ? ORDER BY changed"  # noqa: S608 - of constants
_OPEN = f"SELECT {_COLUMNS} FROM sessions WHERE NOT ended"  # noqa: S608
_OF = f"SELECT {_COLUMNS} FROM sessions WHERE user = ? AND kind = ? AND NOT ended ORDER BY used DESC, changed DESC"  # noqa: S608
_NEW = (
    "INSERT INTO sessions (id, changed, kind, user, hash, mark, created, used, ends, access_ends, databases, "
    "permissions, client, address) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


@dataclass(frozen=True, slots=True)
class Session(Token):
    """One session. `expires_at` is when it opens nothing more if it is not used or renewed, `over_at` when it is over
    for good. `mark` is `mark_of` the password that it was opened with. `before` is the hash of the secret that it had
    before the last renewal, which is taken until `before_ends`. `client` is the id of the OAuth client that has it,
    `address` where it was opened from."""

    kind: str = PASSWORD
    used_at: datetime = _EPOCH
    over_at: datetime = _EPOCH
    mark: str = ""
    before: str | None = None
    before_ends: datetime | None = None
    client: str | None = None
    address: str | None = None

    @property
    def rights(self) -> tuple[object, ...]:
        """As a token's, but its secret may be renewed while what it has open goes on."""
        return (self.id, self.user, self.mark, self.databases, self.permissions)

    @property
    def pool(self) -> str:
        """The name of its own pools, which stays when its secret is renewed."""
        return _digest(f"session {self.id} {self.created_at.timestamp()}")

    def waits_for_renewal(self, now: datetime) -> bool:
        """Whether only the access of an OAuth client has ended, which it can renew."""
        return self.client is not None and self.expires_at is not None and self.expires_at <= now < self.over_at

    def is_current(self, text: str) -> bool:
        """Whether this text is the session's."""
        return secrets.compare_digest(_digest(text), self.hash)

    def was_current(self, text: str, now: datetime) -> bool:
        """Whether this text was the session's until its last renewal, and is still taken."""
        taken = self.before_ends is not None and now < self.before_ends
        return taken and secrets.compare_digest(_digest(text), self.before or "")


class Opened(NamedTuple):
    """A new session, its text, which exists nowhere else, and the sessions that ended to make room for it."""

    session: Session
    text: str
    ended: list[Session]


class Rules(NamedTuple):
    """`lasts`: how long a session lives at most; `idle`: how long without being used; `most`: how many sessions of a
    kind a user may have."""

    lasts: timedelta = timedelta(hours=24)
    idle: timedelta = timedelta(hours=1)
    most: int = 5

    @property
    def noted(self) -> timedelta:
        """How old the time of the last use may be before it is noted again: so much earlier it may end."""
        return min(_COARSEST, max(_FINEST, self.idle / 60))


def rules_of(auth: Auth) -> dict[str, Rules]:
    """The rules of each kind of session that the config lets anybody have."""
    found = {}
    for kind, own in ((PASSWORD, auth.sessions), (OAUTH, auth.oauth)):
        if own.enabled:
            found[kind] = Rules(timedelta(seconds=own.lifetime), timedelta(seconds=own.idle), own.per_user)
    return found


def session_id(text: str) -> str | None:
    """The id of a session whose form and checksum are right; None for anything else. Costs no hash."""
    found = _TEXT.fullmatch(text)
    if not found or tokens.signed(text[:-7]) != text:
        return None
    return found[1]


def is_id(name: str) -> bool:
    """Whether an id is a session's, by its form: no token's begins so."""
    return name[:1] == "S"


def mark_of(password: str | None) -> str:
    """What tells whether a user's password is still the one that a session was opened with, without being a hash that
    anybody could try passwords on."""
    return _digest(f"mark {password or ''}")[:32]


def secret(name: str) -> str:
    """A new text for the session of that id."""
    return tokens.signed(f"mcs_{name}_{tokens.base62(secrets.randbits(256), 43)}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Sessions:
    """The sessions of an installation. One thread's; all workers have their own, over the same store."""

    def __init__(
        self,
        state: State,
        rules: Mapping[str, Rules],
        now: Callable[[], datetime] = tokens.utcnow,
    ) -> None:
        self._state = state
        self._rules = rules
        self._now = now
        self._kinds: Container[str] = rules
        self._version: object = None
        self._opened = 0
        self._last = 0
        self._hurried = _EPOCH
        self._fresh: dict[str, Session | None] = {}
        self.known: dict[str, Session] = {}
        """Those that had not ended at the last look."""

    # -- what there is ---------------------------------------------------------------------------------------------

    def changes(self) -> dict[str, Session | None]:
        """Which sessions are others than when this was asked last, None for one that has ended. Raises as `look`."""
        self.look()
        found, self._fresh = self._fresh, {}
        return found

    def look(self) -> None:
        """Know what the store says now. UnavailableError while it is busy; ConfigError where it cannot be believed, or
        has gone since."""
        if not self._state.path.exists():
            if self._version is not None:
                raise self._state.missing()
            return
        version = self._state.version()
        if version == self._version:
            return
        last = self._last if version[0] == self._opened else 0  # it was opened anew, and may be another file
        rows = self._state.rows(_SINCE, (last,))
        found: dict[str, Session | None] = {} if last else dict.fromkeys(self.known)
        for row in rows:
            there = not row[2] and row[3] in self._rules and row[3] in self._kinds
            found[row[0]] = self._read(row) if there else None
            last = row[1]
        self._version, self._opened, self._last = version, version[0], last
        self._fresh |= found
        for name, session in found.items():
            if session is None:
                self.known.pop(name, None)
            else:
                self.known[name] = session

    def forget(self) -> None:
        """Know none; the next look reads all."""
        self._version, self._opened, self._last = None, 0, 0
        self.known.clear()
        self._fresh.clear()

    def only(self, kinds: Container[str]) -> None:
        """Know from the next look on no sessions but those of these kinds: a config without the others has come into
        force, and what they have open is not to end with its answer."""
        self._kinds, self._version, self._last = kinds, None, 0

    def _read(self, row: tuple[Any, ...]) -> Session:
        name, _, _, kind, user, hash_, mark, created, used, ends, access, before, until, names, may, client, at = row
        used_at, rules = _time(used), self._rules[kind]
        over = min(_time(ends), _time(created) + rules.lasts, used_at + rules.idle)  # the rules may be stricter by now
        return Session(
            id=name,
            user=user,
            hash=hash_,
            created_at=_time(created),
            expires_at=over if access is None else min(over, _time(access)),
            databases=None if names is None else tuple(json.loads(names)),
            permissions=None if may is None else tuple(json.loads(may)),
            kind=kind,
            used_at=used_at,
            over_at=over,
            mark=mark,
            before=before,
            before_ends=None if until is None else _time(until),
            client=client,
            address=at,
        )

    def of(self, user: str) -> list[Session]:
        """A user's sessions that have not ended, the one that was used last first."""
        return [one for one in self.all() if one.user == user]

    def all(self) -> list[Session]:
        """The sessions that have not ended, the one that was used last first. Raises as `look`."""
        self.look()
        now = self._now()
        return sorted(
            (one for one in self.known.values() if one.over_at > now), key=lambda one: one.used_at, reverse=True
        )

    def ends(self, session: Session) -> datetime:
        """When a session is over at the latest, however much it is used."""
        return session.created_at + self._rules[session.kind].lasts

    def idle(self, session: Session) -> timedelta:
        """After how long without being used it is over."""
        return self._rules[session.kind].idle

    # -- begin and end ---------------------------------------------------------------------------------------------

    def open(
        self,
        user: str,
        mark: str,
        *,
        kind: str = PASSWORD,
        access: timedelta | None = None,
        databases: tuple[str, ...] | None = None,
        permissions: tuple[str, ...] | None = None,
        client: str | None = None,
        address: str | None = None,
        also: Callable[[sqlite3.Connection, str], None] = lambda connection, name: None,
    ) -> Opened:
        """Open a session for a user who has just shown who they are. `access`: how long its secret is good without a
        renewal; None where it lives by being used. `also(connection, id)` is done with it, or nothing is. Raises
        UnavailableError where it cannot be written."""
        rules, now = self._rules[kind], self._now()
        name = f"S{''.join(secrets.choice('0123456789abcdefghijklmnopqrstuvwxyz') for _ in range(7))}"
        text, stamp = secret(name), now.timestamp()
        values = (
            kind, user, _digest(text), mark, stamp, stamp, stamp + rules.lasts.total_seconds(),
            None if access is None else stamp + access.total_seconds(),
            None if databases is None else json.dumps(databases),
            None if permissions is None else json.dumps(permissions), client, address,
        )  # fmt: skip
        with self._state.change() as connection:
            (changed,) = connection.execute(_NEXT).fetchone()
            connection.execute(_NEW, (name, changed, *values))
            also(connection, name)
            rows = connection.execute(_OF, (user, kind)).fetchall()
            theirs = {row[0]: self._read(row) for row in rows}
            session = theirs.pop(name)  # whatever the clock says, and wherever it stood when the others were used
            more = [one for one in theirs.values() if one.over_at > now][rules.most - 1 :]
            _end(connection, [one.id for one in more], stamp)
        self.look()
        return Opened(session, text, more)

    def renew(
        self,
        session: Session,
        access: timedelta,
        overlap: timedelta,
        also: Callable[[sqlite3.Connection], None] = lambda connection: None,
        permissions: tuple[str, ...] | None = None,
    ) -> str:
        """A new secret for a session, good for `access`; the old one is taken for `overlap` more, so that what is on
        its way arrives. `permissions`: those that it has from now on; None: as before. Where these are others, the old
        one is taken no longer: it may be with somebody who was to have no more than it. `also(connection)` is done with
        it, or nothing is. Raises UnavailableError; NotFoundError where the session has ended."""
        if permissions is not None and set(permissions) != set(session.permissions or ()):
            overlap = timedelta(0)
        text, now = secret(session.id), self._now()
        with self._state.change() as connection:
            (changed,) = connection.execute(_NEXT).fetchone()
            done = connection.execute(
                "UPDATE sessions SET changed = ?, before = hash, before_ends = ?, hash = ?, used = ?, access_ends = ?, "
                "permissions = coalesce(?, permissions) WHERE id = ? AND NOT ended",
                (
                    changed, (now + overlap).timestamp(), _digest(text), now.timestamp(), (now + access).timestamp(),
                    None if permissions is None else json.dumps(permissions), session.id,
                ),
            )  # fmt: skip
            if not done.rowcount:
                raise NotFoundError("the session has ended")
            also(connection)
        self.look()
        return text

    def bound(self, permissions: Mapping[str, tuple[str, ...]]) -> None:
        """Have sessions, by id, no other permissions than these from now on. Raises as `end`."""
        if not permissions:
            return
        with self._state.change() as connection:
            for name, found in permissions.items():
                (changed,) = connection.execute(_NEXT).fetchone()
                sql = "UPDATE sessions SET changed = ?, permissions = ? WHERE id = ? AND NOT ended"
                connection.execute(sql, (changed, json.dumps(found), name))

    def end(self, ids: Iterable[str]) -> list[str]:
        """End sessions: the ids of those that had not ended yet. Raises UnavailableError where it cannot be written."""
        ids = list(ids)
        if not ids or not self._state.path.exists():
            return []
        with self._state.change() as connection:
            return _end(connection, ids, self._now().timestamp())

    def ask_again(self, ids: Iterable[str]) -> None:
        """Forget that the users of these sessions have allowed their clients: a connection that somebody else has ended
        does not come back before its user was asked. Raises as `end`."""
        ids = list(ids)
        if not ids or not self._state.path.exists():
            return
        sql = "DELETE FROM oauth_consents WHERE (user, client) IN (SELECT user, client FROM sessions WHERE id = ?)"
        with self._state.change() as connection:
            connection.executemany(sql, [(name,) for name in ids])

    def records(self) -> dict[str, tuple[str, bool]]:
        """(whose, whether it has ended) of each that is remembered, of whatever kind, by id."""
        if not self._state.path.exists():
            return {}
        return {name: (user, bool(ended)) for name, user, ended in self._state.rows(_RECORDS)}

    def ids_of(self, user: str) -> list[str]:
        """The ids of all sessions of a user that were not ended, of whatever kind, and those that were over unseen."""
        if not self._state.path.exists():
            return []
        return [name for (name,) in self._state.rows(_NAMES_OF, (user,))]

    def end_of(self, user: str) -> list[str]:
        """End all sessions of a user; their ids."""
        return self.end(self.ids_of(user))

    def use(self, session: Session) -> None:
        """Note that a session is used, if that was noted long enough ago; if it cannot be noted now, the next use may.
        Whoever holds the store is hardly waited for: calls go through here."""
        if not self.is_due(session):
            return
        now = self._now()
        try:
            with self._state.change(SHORTLY if now >= self._hurried else 0) as connection:
                (changed,) = connection.execute(_NEXT).fetchone()
                connection.execute(
                    "UPDATE sessions SET changed = ?, used = ? WHERE id = ? AND used < ? AND NOT ended",
                    (changed, now.timestamp(), session.id, now.timestamp()),
                )
        except UnavailableError:
            self._hurried = now + _HURRIED
            return
        self.look()

    def is_due(self, session: Session) -> bool:
        """Whether its use is to be noted: the first at once, so that nobody reads of one in use that it never was."""
        first = session.used_at <= session.created_at
        return first or self._now() - session.used_at >= self._rules[session.kind].noted

    def sweep(self) -> list[tuple[Session, str]]:
        """End the sessions whose time is over, and forget the records of those that ended long enough ago for everybody
        to have seen it. Which have ended now and why: each is told once, to one of all who sweep. Raises
        UnavailableError while somebody else writes."""
        if not self._state.path.exists():
            return []
        now, over = self._now(), dict[str, tuple[Session, str]]()
        with self._state.change(SHORTLY) as connection:
            for row in connection.execute(_OPEN).fetchall():
                if row[3] in self._rules and (session := self._read(row)).over_at <= now:
                    over[session.id] = session, self._why_over(session)
            _end(connection, over, now.timestamp())
            connection.execute("DELETE FROM sessions WHERE ended AND used < ?", ((now - _KEPT).timestamp(),))
        self.look()
        return list(over.values())

    def _why_over(self, session: Session) -> str:
        rules = self._rules[session.kind]
        idle = session.over_at - session.used_at >= rules.idle
        return f"not used for {_told(rules.idle)}" if idle else f"its {_told(rules.lasts)} were over"


def _end(connection: Any, ids: Iterable[str], stamp: float) -> list[str]:
    """End these; each is changed once. `used` says from then on when it ended."""
    ended = []
    for name in ids:
        (changed,) = connection.execute(_NEXT).fetchone()
        done = connection.execute(
            "UPDATE sessions SET changed = ?, ended = 1, hash = '', before = NULL, used = ? WHERE id = ? AND NOT ended",
            (changed, stamp, name),
        )
        if done.rowcount:
            ended.append(name)
    return ended


def as_values(session: Session, of: Sessions) -> dict[str, Any]:
    """What may be told of a session: nothing that opens anything. `ends_at` is when it is over if it is not used."""
    return {
        "id": session.id,
        "kind": session.kind,
        "user": session.user,
        "created_at": rfc3339(session.created_at),
        "last_used_at": rfc3339(session.used_at),
        "ends_at": rfc3339(session.over_at),
        "expires_at": rfc3339(of.ends(session)),
        "address": session.address,
        "client": session.client,
    }


def _told(time: timedelta) -> str:
    """A time in its largest whole unit."""
    seconds = round(time.total_seconds())
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds and seconds % length == 0:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _time(stamp: float) -> datetime:
    return datetime.fromtimestamp(stamp, UTC)
