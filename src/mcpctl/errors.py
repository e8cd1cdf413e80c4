"""The one exception base, and what no message may show. Imports nothing of ours.

An `Error` is for a person: it says what was wrong, where, and (in `hint`) what to do. It carries the
command line's exit code and the HTTP status, so that one place at each edge turns it into an answer.
"""

import re

_TOKEN = re.compile(r"(mc[a-z]_[0-9A-Za-z]{8}_)[0-9A-Za-z]{20,}(?:_[0-9A-Za-z]+)?")


def masked(text: str) -> str:
    """The text with every token in it cut down to its id."""
    return _TOKEN.sub(r"\1…", text) if "mc" in text else text


class Error(Exception):
    """Something a person has to know.

    `message` names the object and the fault, `hint` says what to do. `exit_code` is the command
    line's (0 done, 1 failed, 2 usage, 3 config or file mode, 4 no such thing, 5 conflict, 130
    interrupted); `status` is HTTP's.
    """

    exit_code = 1
    status = 500

    def __init__(
        self, message: str, hint: str | None = None, *, exit_code: int | None = None, status: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code
        if status is not None:
            self.status = status


class UsageError(Error):
    """The command's words or a call's arguments are off."""

    exit_code = 2
    status = 400


class ConfigError(Error):
    """A file cannot be trusted or understood: its content, mode or owner."""

    exit_code = 3
    status = 503


class NotFoundError(Error):
    """There is no such thing."""

    exit_code = 4
    status = 404


class ConflictError(Error):
    """It exists already, or is not as the command expects."""

    exit_code = 5
    status = 409


class UnauthorizedError(Error):
    """A credential that opens nothing. `message` is for the log; outside there is one 401 for all. `proven`: its secret
    was right."""

    status = 401

    def __init__(
        self,
        message: str,
        *,
        token_id: str | None = None,
        status: int = 401,
        retry_after: int = 0,
        proven: bool = False,
    ) -> None:
        super().__init__(message, status=status)
        self.proven = proven
        self.token_id = token_id
        self.retry_after = retry_after


class ForbiddenError(Error):
    """A known caller asks for what it may not have."""

    status = 403


class ScopeError(ForbiddenError):
    """Its user may have it, and only the client has not asked for it. `scopes` are those that it needs."""

    def __init__(self, message: str, hint: str | None, scopes: tuple[str, ...]) -> None:
        super().__init__(message, hint)
        self.scopes = scopes


class UnavailableError(Error):
    """Not now: a file is broken, the log cannot be written, the server is full or stopping."""

    status = 503


class BusyError(UnavailableError):
    """Somebody else holds what was to be written, and nothing was done. `retry_after` in whole seconds."""

    retry_after = 1


class LimitedError(Error):
    """Too much of what is allowed. `kind` and `name` are whose limit it is, `limit` which one; `retry_after` in whole
    seconds."""

    status = 429

    def __init__(self, message: str, *, kind: str, name: str, limit: str, retry_after: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.name = name
        self.limit = limit
        self.retry_after = retry_after


class NotWrittenError(ConfigError):
    """A file could not be written or read for a reason of the system's: its disk, or its lock. It is as it was."""


class FullError(UnavailableError):
    """There is no room on the disk (or in the quota), and what was there is as it was."""


class LockedError(UnavailableError):
    """An administrator has locked the server. Unlike other faults of ours it is told to whoever may call. `token_id`
    and `user` are whose credential was good."""

    def __init__(self, token_id: str | None = None, user: str | None = None) -> None:
        super().__init__("the server is locked: it answers no calls until its administrator lifts that")
        self.token_id = token_id
        self.user = user


class Failures:
    """What went wrong on the way, in a block or in several; `check` raises all of it as one Error."""

    def __init__(self) -> None:
        self._found: dict[str, Error] = {}

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, problem: object, where: object) -> bool:
        if not isinstance(problem, Error):
            return False
        self._found.setdefault(problem.message, problem)
        return True

    def check(self) -> None:
        """Raises what was found, if anything was."""
        if self._found:
            first = next(iter(self._found.values()))
            raise Error("; ".join(self._found), first.hint, exit_code=first.exit_code)
