"""Who holds something that opens the door, by the files and the sessions: as they are now, and what is over is told.

Each request has the files looked at. Of what has changed only that is forgotten which is no longer so.
"""

import logging
import operator
from collections.abc import Callable, Container, Mapping, Sequence
from datetime import datetime
from math import inf
from pathlib import Path
from time import time
from typing import NamedTuple

from mcpctl.errors import Error, LockedError, UnavailableError
from mcpctl.identity import tenants, tokens, users
from mcpctl.identity.guest_book import GuestBook
from mcpctl.identity.lockdown import Lockdown
from mcpctl.identity.principal import Principal
from mcpctl.identity.sessions import OAUTH, Session, Sessions, mark_of
from mcpctl.identity.tenants import Tenant
from mcpctl.identity.tokens import Token
from mcpctl.identity.users import EVERYWHERE
from mcpctl.identity.vouched import Visitors, Vouched, later
from mcpctl.private_file import ABSENT, Fingerprint, fingerprints

log = logging.getLogger("mcpctl")
_BESIDE = frozenset("SJ")
"""How the ids of those begin that stand in no file."""
CHANGED = "its user's password was changed"
"""Why a session is over that was opened with another one."""
LOCKED = "the server is locked"
"""Why a lockdown ends what is open."""


class Files(NamedTuple):
    """The entries of the three files."""

    tokens: Mapping[str, Token]
    people: Mapping[str, users.User]
    places: Mapping[str, Tenant]


_REMEMBERED = 10_000
_GONE: Mapping[type, str] = {Session: "signed out", Vouched: "no longer vouched for"}
"""What is said of an entry that is gone; of one that a file had it is "removed"."""


class _Everybody:
    """Holds everything."""

    def __contains__(self, name: object) -> bool:
        return True


class Standing:
    """Knows the token, user and tenant files, and the sessions.

    `ended` is called with {id: why} for the tokens in use that a look found gone, revoked or changed, before the
    request that noticed is answered. In use is what has been let in and not ended since. It also hears of those whose
    user's rights have become fewer: they live on, and `in_force` tells where what they have open does not. `fewer`
    compares two users' roles by what they give. `over` holds the tokens that were seen to have expired, {id: when}, and
    `kept_out` what `keep_out` was told; both outlive this object. `sessions`, where they are, open the door as tokens
    do, and so do those whom the issuers of `visitors` vouch for, the guests of the book `guests` among them.
    """

    def __init__(
        self,
        token_path: Path,
        user_path: Path,
        tenant_path: Path | None = None,
        *,
        fewer: users.Fewer = operator.ne,
        twins: Mapping[str, Sequence[str]] | None = None,
        databases: Container[str] | None = None,
        now: Callable[[], datetime] = tokens.utcnow,
        over: dict[str, datetime | None] | None = None,
        kept_out: dict[str, Mapping[str, str]] | None = None,
    ) -> None:
        self._fewer = fewer
        self.tokens = tokens.token_file(token_path)
        self.users = users.user_file(user_path)
        self.tenants = tenants.tenant_file(tenant_path or user_path.with_name("tenants.yaml"), twins, self._there)
        self._databases = databases
        self.ended: Callable[[dict[str, str]], None] = lambda ids: None
        self.lockdown = Lockdown(token_path)
        self.locked = False
        self.broken: Error | None = None
        self.sessions: Sessions | None = None
        self.visitors: Visitors | None = None
        self.guests: GuestBook | None = None
        self._kept_out: dict[str, Mapping[str, str]] = {} if kept_out is None else kept_out
        self._now = now
        self._known: dict[str, tuple[bytes, Principal]] = {}
        self._seen: dict[str, Token] = {}
        self._signed_in: dict[str, Session] = {}
        self._turned_out: Container[str] = ()
        self._gone: dict[str, str | None] = {}
        self._editions: dict[str, int] = {}
        self._edition = 0
        self._narrowed: dict[str, dict[str, int]] = {}
        self._people: Mapping[str, users.User] = {}
        self._active: set[str] = set()
        self._due: datetime | None = None  # none of those in use expires before
        self._over = {} if over is None else over
        self._places: Mapping[str, Tenant] = {}
        self._versions = (-1, -1, -1)
        self._paths = [str(file.path) for file in (self.tokens, self.users, self.tenants)]
        self._noted: list[Fingerprint] | None = None
        self._open: dict[str, float] = {}

    def _there(self, one: Tenant) -> bool:
        """Whether a tenant's database is in the config. While we run, `database add` and `tenant add` may make both of
        one that we do not know before our next start; a tenant whose database we knew may not lose it."""
        if self._databases is None or one.database in self._databases:
            return True
        old = self._places.get(one.name)
        return self._versions[2] > 0 and (old is None or old.database == one.database)

    def read(self) -> "Files":
        """What the files say now. ConfigError while one is broken, or does not go with the others: a tenant that is
        named and not there has a database which would be everybody's; or while nobody can say who is blocked."""
        if self.broken is not None:
            raise self.broken
        found = Files(self.tokens.current(), self.users.current(), self.tenants.current())
        versions = (self.tokens.version, self.users.version, self.tenants.version)
        if versions != self._versions:
            tenants.check_members(self.tenants.path, found.places, found.people)
        return found

    def refresh(self) -> None:
        """Take note of what the files say now. Raises UnavailableError while one is broken (law 3: fail closed)."""
        self.check_lock()
        self._renew()

    def look(self) -> None:
        """Take note of what the files say now, and whether the server is locked: `locked` says so. Raises as
        `refresh`."""
        self._look_for_lock()
        self._renew()

    def person(self, name: str) -> users.User | None:
        """The user of that name, as the last look found them."""
        return self._people.get(name)

    def place(self, user: users.User) -> Tenant | None:
        """The tenant that a user belongs to."""
        return self._places.get(user.tenant or "")

    def _renew(self) -> None:
        """`refresh`, also while the server is locked. Costs a stat of each file where none has changed."""
        found = fingerprints(self._paths)
        if found != self._noted or self.broken is not None:
            self._noted = None
            self._note_files()
            self._noted = found if ABSENT not in found else None  # as they were before they were read: else look again
        if self.sessions is not None:
            self._note_sessions(self.sessions)
        if self.guests is not None:
            self._note_guests(self.guests)

    def _note_files(self) -> None:
        try:
            entries, people, places = self.read()
        except Error as problem:
            raise UnavailableError(problem.message, problem.hint) from None
        versions = (self.tokens.version, self.users.version, self.tenants.version)
        if versions == self._versions:
            return
        self._versions = versions
        self._open.clear()
        for name in self._over.keys() - entries.keys():
            if not self._is_beside(name):
                del self._over[name]
        narrowed = self._note_people(people, places)
        gone = [name for name in self._seen if name not in entries and not self._is_beside(name)]
        differ = {name: new for name, new in entries.items() if self._seen.get(name) is not new}
        self._put({**dict.fromkeys(gone), **differ}, narrowed)

    def _is_beside(self, name: str) -> bool:
        """Whether such an entry is none of a file's: a session, or somebody whom an issuer vouches for."""
        return name[:1] in _BESIDE

    def _note_sessions(self, store: Sessions) -> None:
        """Take note of what became of sessions. While nobody can say, there are none."""
        changes: Mapping[str, Session | None]
        try:
            changes = store.changes()
        except UnavailableError:  # somebody else holds it: what was known still is
            return
        except Error as problem:
            if self._signed_in:
                log.error("nobody is signed in any more: %s (%s)", problem.message, problem.hint)
            store.forget()
            changes = dict.fromkeys(self._signed_in)
        for name, new in changes.items():
            if new is None:
                self._signed_in.pop(name, None)
                self._over.pop(name, None)
            else:
                self._signed_in[name] = new
        if changes:
            self._put(changes)

    def _note_guests(self, book: GuestBook) -> None:
        """Take note of which guests are disabled. While nobody can say, all are."""
        try:
            if not book.look():
                return
            self._turned_out = frozenset(name for name, one in book.known.items() if one.disabled_at is not None)
        except UnavailableError:  # somebody else holds it: what was known still is
            return
        except Error as problem:
            if not isinstance(self._turned_out, _Everybody):
                log.error("no guest is let in any more: %s (%s)", problem.message, problem.hint)
            book.forget()
            self._turned_out = _Everybody()
        guests = {name: one for name, one in self._seen.items() if isinstance(one, Vouched) and one.as_user is not None}
        for name in guests:
            self._open.pop(name, None)
        over = {name: why for name in self._active & guests.keys() if (why := self._why_not_vouched(guests[name]))}
        self._active -= over.keys()
        if over:
            self.ended(over)

    def _put(self, changes: Mapping[str, Token | None], narrowed: Mapping[str, str] | None = None) -> None:
        """Take note of entries, None for one that is gone, and tell of those in use what is over. `narrowed`: whose
        user's rights have become fewer; None where the users are as they were."""
        before = {name: self._seen.get(name) for name in changes}
        for name, new in changes.items():
            self._note(name, before[name], new)
        looked_at = self._active & changes.keys() if narrowed is None else self._active
        over = {}
        for name in looked_at:
            new = self._seen.get(name)
            if (why := self._why_over(before.get(name, new), new, narrowed or {})) is not None:
                over[name] = why
        self._active.difference_update(name for name in over if not self._opens(name))
        self._note_due()
        if over:
            self.ended(over)

    def _note(self, name: str, old: Token | None, new: Token | None) -> None:
        """Know an entry as it is now, and forget of it what is no longer so."""
        self._open.pop(name, None)
        if new is not None:
            self._seen[name] = new
        elif self._seen.pop(name, None) is not None and old is not None:
            while len(self._gone) >= _REMEMBERED:
                self._forget(next(iter(self._gone)))
            self._gone[name] = old.user
        if old is None or new is old:
            return
        if new is None or new.rights != old.rights:
            self._known.pop(name, None)
            self._edition += 1
            self._editions[name] = self._edition  # kept when it is gone: an id that comes back is another edition
        elif new.hash != old.hash:
            self._known.pop(name, None)  # another secret opens it from now on, and what it has open goes on
        elif name in self._known:  # its times or its note: the same secret still opens it
            self._known[name] = (self._known[name][0], self._principal(new))

    def _forget(self, name: str) -> None:
        """Forget one that is long gone. A token's id could come back; of sessions there is no end, and none does."""
        del self._gone[name]
        if self._is_beside(name) and name not in self._seen:
            self._editions.pop(name, None)

    def check_lock(self) -> None:
        """Raises LockedError while the server is locked. What is open ends with the first look that finds it so; the
        caller without a token, where there is one, has the id ""."""
        if self._look_for_lock():
            raise LockedError

    def _look_for_lock(self) -> bool:
        before, self.locked = self.locked, self.lockdown.on()
        if self.locked and not before:
            over, self._active = {"", *self._active}, set()
            self.ended(dict.fromkeys(sorted(over), LOCKED))
        return self.locked

    def keep_out(self, by: str, why: Mapping[str, str]) -> None:
        """These tokens, {id: why}, open nothing from now on, whatever the files say; no others of those that were kept
        out `by` that name before."""
        self._kept_out[by] = dict(why)
        over = self._active & why.keys()
        self._active -= over
        if over:
            self.ended(dict.fromkeys(sorted(over), "blocked"))

    def kept_out(self, by: str) -> Mapping[str, str]:
        """See `keep_out`."""
        return self._kept_out.get(by, {})

    def _note_people(self, people: Mapping[str, users.User], places: Mapping[str, Tenant]) -> dict[str, str]:
        """Take note of the users and tenants; whose rights have become fewer, and why. What each has now is remembered
        with who is known."""
        before, self._people = self._people, people
        was, self._places = self._places, places
        moved = {name for name, old in was.items() if places.get(name) is not old}
        elsewhere = bool(moved) or places.keys() != was.keys()
        outside = {name for name, old in before.items() if old.tenant in moved and name in people}
        differ = {name for name in before.keys() | people.keys() if people.get(name) is not before.get(name)}
        changed = {*people} if elsewhere else differ
        if not changed and not elsewhere:
            return {}
        found = {
            name: people[name].narrowed(before[name], self._fewer) for name in changed & before.keys() & people.keys()
        }
        for name in outside:
            found[name] = {EVERYWHERE: "its user's tenant changed"}
        for name, user in {**people, "": None}.items() if elsewhere else ():
            for database in tenants.closed(places, user).keys() - tenants.closed(was, user).keys():
                found.setdefault(name, {})[database] = f"{database} is a tenant's alone now"
        self._edition += 1
        for name, databases in found.items():
            self._narrowed.setdefault(name, {}).update(dict.fromkeys(databases, self._edition))
        self._know_again(changed, services=elsewhere)
        return {name: "; ".join(databases.values()) for name, databases in found.items() if databases}

    def _know_again(self, changed: set[str], *, services: bool) -> None:
        """Remember these users' tokens, and service tokens, with what they have now."""
        for name, (digest, principal) in list(self._known.items()):
            if principal.person not in changed and (principal.user is not None or not services):
                continue
            if (principal.user is None or principal.person in self._people) and (token := self._seen.get(name)):
                self._known[name] = (digest, self._principal(token))
            else:  # who comes back under that name is somebody else
                del self._known[name]

    def _why_over(self, old: Token | None, new: Token | None, narrowed: Mapping[str, str]) -> str | None:
        """Why what a token has open must end, now that its entry is `new`; None where it need not. `narrowed`: whose
        user's rights have become fewer."""
        if new is None:
            return _GONE.get(type(old), "removed")
        if new.revoked_at is not None:
            return "revoked"
        if new.user is not None and new.person not in self._people:
            return "its user is gone"
        if self._has_other_password(new):
            return CHANGED
        if old is not None and old is not new and old.rights != new.rights:
            return "changed"
        return self._why_not_vouched(new) or narrowed.get(new.person or "")

    def _why_not_vouched(self, token: Token) -> str | None:
        """Why somebody is not any more whom an issuer vouches for; None where they are, and of all others."""
        if not isinstance(token, Vouched) or self.visitors is None:
            return None
        self.visitors.know(self._people)
        if token.as_user is not None and token.user in self._turned_out:
            return f"its user {token.user} is disabled"
        return token.why_not(self.visitors.links, self._people)

    def _stand(self, found: Vouched) -> Token:
        """Know whom an issuer vouches for; the entry that stands for them."""
        if found.as_user is not None and self.guests is not None and found.user not in self._turned_out:
            self.guests.note(found)
        old = self._seen.get(found.id)
        entry = later(old if isinstance(old, Vouched) else None, found)
        if entry is not old:
            self._put({entry.id: entry})
        if entry is not old or entry.id not in self._known:
            self._known[entry.id] = (b"", self._principal(entry))
        return entry

    async def look_again(self) -> None:
        """Ask the issuers again about those of theirs who are in use, and end who is vouched for no more. The entries
        of those who have gone are forgotten."""
        if self.visitors is None:
            return
        theirs = {name: one for name, one in self._seen.items() if isinstance(one, Vouched)}
        gone = await self.visitors.look_again(frozenset(theirs.keys() & self._active), self._now())
        over = [name for name, one in theirs.items() if name not in self._active and self._why_not(one)]
        self._put(dict.fromkeys([*gone, *over]))

    def whose(self, name: str) -> str | None:
        """The user of an entry that is there, or was until lately."""
        token = self._seen.get(name)
        return token.user if token is not None else self._gone.get(name)

    def expired(self) -> list[str]:
        """Ids of tokens in use whose time is over; each is told once. As long as there can be none it looks at none."""
        early = self._due is None or self._now() < self._due
        if early and self._over.keys().isdisjoint(self._active):
            return []
        over = [name for name in self._active if self._status(self._seen[name]) == "expired"]
        self._active.difference_update(over)
        self._note_due()
        return over

    def _note_due(self) -> None:
        ends = (self._seen[name].expires_at for name in self._active)
        self._due = min((end for end in ends if end is not None), default=None)

    def still_valid(self, principal: Principal) -> bool:
        """Whether its token still opens something: it is there, with the same rights, neither expired nor revoked, and
        its user is there."""
        name = principal.token
        if self.locked or name is None:
            return not self.locked
        return principal.edition == self._editions.get(name, 0) and self._opens(name)

    def in_force(self, principal: Principal, database: str) -> bool:
        """Whether what was opened as this principal in that database may go on: its token is valid, and its user has
        no fewer rights there than when it was let in."""
        if not self.still_valid(principal):
            return False
        if not self._narrowed and not principal.narrowed:
            return True
        now, then = self._narrowed.get(principal.person or "", {}), principal.narrowed
        if not now and not then:
            return True
        return all(now.get(name, 0) == then.get(name, 0) for name in (EVERYWHERE, database))

    def _opens(self, name: str) -> bool:
        """Whether the token of that id opens something now. Each call asks several times: what the files say of a token
        that does is remembered until one of them changes, and only its time and who is kept out are looked at."""
        end = self._open.get(name)
        if end is not None and name not in self._over:
            now = time() if self._now is tokens.utcnow else self._now().timestamp()  # a sixth of what a datetime takes
            kept = self._kept_out.values()
            if end > now and not (any(kept) and any(name in ids for ids in kept)):
                return True
        token = self._seen.get(name)
        if token is None or self._why_not(token) is not None:
            return False
        self._open[name] = inf if token.expires_at is None else token.expires_at.timestamp()
        return True

    def next_expiry(self) -> float | None:
        """Seconds until the next token in use expires, at least; None when none does."""
        return max(0.0, (self._due - self._now()).total_seconds()) if self._due is not None else None

    def _status(self, token: Token) -> str:
        """A token's status. What was seen to have expired stays so, even when the clock is set back."""
        status = token.status(self._now())
        if status == "expired":
            self._over[token.id] = token.expires_at
        elif status != "revoked" and token.id in self._over and self._over[token.id] == token.expires_at:
            return "expired"
        return status

    def _why_not(self, token: Token) -> str | None:
        """Why a token opens nothing now; None where it does."""
        status = self._status(token)
        if status in ("expired", "revoked"):
            return f"the token is {status}"
        if any(token.id in kept for kept in self._kept_out.values()):
            return "the token is blocked"
        if token.person is None:
            return None
        user = self._people.get(token.person)
        if user is None:
            return f"its user {token.person} is gone"
        if user.created_at > token.created_at:
            return f"it was given to another {token.person}, who is gone"
        if user.disabled_at is not None:
            return f"its user {token.person} is disabled"
        return CHANGED if self._has_other_password(token) else self._why_not_vouched(token)

    def _has_other_password(self, token: Token) -> bool:
        """Whether a session was opened with another password than its user has now."""
        if not isinstance(token, Session) or (user := self._people.get(token.user or "")) is None:
            return False
        return token.mark != mark_of(user.password)

    def _principal(self, token: Token) -> Principal:
        user = self._people.get(token.person or "")
        vouched = token if isinstance(token, Vouched) else None
        return Principal(
            token=token.id,
            user=token.user,
            pool=token.pool,
            databases=token.databases,
            permissions=token.permissions,
            expires_at=token.expires_at,
            edition=self._editions.get(token.id, 0),
            narrowed=dict(self._narrowed.get(token.person or "", {})),
            roles=user.roles if user is not None else None,
            claimed=vouched.claimed if vouched is not None else None,
            as_user=vouched.as_user if vouched is not None else None,
            grants=user.grants if user is not None else {},
            tenant=user.tenant if user is not None else None,
            within=self._places.get(user.tenant or "") if user is not None else None,
            closed=tenants.closed(self._places, user),
            scoped=isinstance(token, Session) and token.kind == OAUTH,
        )

    def supposed(self, user: str, permissions: tuple[str, ...]) -> Principal:
        """Who a client of that user's with these permissions would be. It opens nothing."""
        return self._principal(Token("", user, "", self._now(), permissions=permissions))
