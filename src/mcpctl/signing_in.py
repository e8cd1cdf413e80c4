"""A user's name and password → the user, or one refusal whatever is wrong; and a session for whoever was right.

All that is wrong with the two costs the same: a user who is not there, has no password or may not come in is found out
after a password was hashed, as one whose password is wrong. What was wrong is told to the audit log alone. A name is
written there where it is a user's: who is none may have typed the password into that field.
"""

from mcpctl.errors import Error, LimitedError, LockedError, UnauthorizedError, UnavailableError
from mcpctl.identity import tokens, users
from mcpctl.identity.authenticate import Authenticator
from mcpctl.identity.password_queue import Passwords
from mcpctl.identity.sessions import Opened, Sessions, mark_of
from mcpctl.identity.users import User
from mcpctl.in_turn import in_turn
from mcpctl.policy.sign_ins import SignIns
from mcpctl.recorder import Recorder

MADE_ROOM = "another sign-in of its user took its place"


class SigningIn:
    """Who comes with a password. One for each config that comes into force."""

    def __init__(
        self, door: Authenticator, sessions: Sessions, passwords: Passwords, limits: SignIns, recorder: Recorder
    ) -> None:
        self._door = door
        self.sessions = sessions
        self._passwords = passwords
        self._limits = limits
        self._recorder = recorder

    async def open(self, name: str, text: str, address: str | None, request_id: str) -> Opened:
        """A session for the user of that name and password. Raises as `prove`; UnavailableError where the session, or
        its line in the audit log, cannot be written."""
        self._recorder.before_call()
        user = await self.prove(name, text, address, request_id)
        mark = mark_of(user.password)
        opened = await in_turn(lambda: self.sessions.open(name, mark, address=address))
        where = {"user": name, "tenant": user.tenant, "client_ip": address, "request_id": request_id}
        for one in opened.ended:
            self._recorder.note("session.closed", token=one.id, **where, transport="http", reason=MADE_ROOM)
        try:
            self._look_again(user, address, request_id)
            self._recorder.call("session.opened", {"token": opened.session.id, **where, "transport": "http"})
        except Error:
            await in_turn(lambda: self.sessions.end([opened.session.id]))
            raise
        return opened

    def _look_again(self, user: User, address: str | None, request_id: str) -> None:
        """Look at the files now that the session is in the store, where whoever disables the user finds it: before,
        it would have been neither refused nor ended. What made room has nothing open any more when this returns."""
        self._door.look()
        if why := self._why_not(user, self._door.person(user.name), address):
            problem = UnauthorizedError(why, proven=True)
            self._note(problem, user.name, address, request_id)
            raise problem

    async def prove(self, name: str, text: str, address: str | None, request_id: str) -> User:
        """The user of that name and password. UnauthorizedError for all that is wrong with them, LimitedError (429)
        for too many wrong ones or too many at once, LockedError for who is right while the server is locked,
        UnavailableError (503) where nobody can say."""
        try:
            return await self._proven(name, text, address)
        except (UnauthorizedError, LimitedError, LockedError) as problem:
            self._note(problem, name, address, request_id)
            raise

    async def _proven(self, name: str, text: str, address: str | None) -> User:
        self._door.look()
        attempt, wrong = self._limits.begin(name, address), True  # also for who goes away before they are answered
        try:
            user = self._door.person(name)
            right = await self._passwords.matches(user.password if user is not None else None, text)
            self._door.look()
            why = self._why_not(user, self._door.person(name), address) if right else _why_wrong(user)
            wrong = why is not None
        except (LimitedError, UnavailableError):
            wrong = False
            raise
        finally:
            self._limits.end(attempt, wrong=wrong)
        if why is not None or user is None:
            raise UnauthorizedError(why or "no such user", proven=right)
        if self._door.locked:
            raise LockedError(user=name)
        return user

    def _why_not(self, then: User | None, user: User | None, address: str | None) -> str | None:
        """Why a user whose password was right may not come in; None where they may. `then`: as they were when it was
        looked at."""
        if then is None or user is None or (user.password, user.created_at) != (then.password, then.created_at):
            return "wrong password: it was changed meanwhile"
        if user.disabled_at is not None:
            return f"its user {user.name} is disabled"
        if user.tenant is None:
            return None
        place = self._door.place(user)
        if place is None or not tokens.in_networks(place.allow_ips, address):
            return f"not from this address ({address})"
        return None

    def _note(self, problem: Error, name: str, address: str | None, request_id: str) -> None:
        """One line, or a count; see Recorder.auth_refused."""
        there = users.NAME.fullmatch(name) is not None and self._door.person(name) is not None
        proven = isinstance(problem, UnauthorizedError) and problem.proven
        self._recorder.auth_refused(
            address, problem.message, proven=proven, locked=isinstance(problem, LockedError), token=None,
            user=name if there else None, request_id=request_id, transport="http",
        )  # fmt: skip


def _why_wrong(user: User | None) -> str:
    if user is None:
        return "no such user"
    return "wrong password" if user.password is not None else f"no password was given to {user.name}"
