"""What the bridge shows to the server: nothing, a token that was given, or what a sign-in has led to (sign_in.py)."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import httpx2

from mcpctl import private_file
from mcpctl.errors import ConfigError, Error, UnauthorizedError

_B64TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]{1,16384}=*")


class RefusedError(UnauthorizedError):
    """The server takes the token no more, and there is no other."""

    def __init__(self, said: str, hint: str) -> None:
        super().__init__(said)
        self.hint = hint


def checked(token: str, where: str) -> str:
    """A bearer token without the white space around it (RFC 6750, section 2.1). Raises ConfigError for what is none;
    the token itself is not in it."""
    found = token.strip()
    if not _B64TOKEN.fullmatch(found):
        said = "holds no token" if not found else "holds something else than one token"
        raise ConfigError(f"{where} {said}", "put the token there alone, as `mcpctl token add` printed it")
    return found


def from_file(path: Path) -> str:
    """The token in a file that is its owner's alone (0600). Raises ConfigError."""
    try:
        text = private_file.read(path, limit=1 << 16).data.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} holds something else than one token", "it is text, in UTF-8") from None
    return checked(text, str(path))


class Given:
    """A token that somebody has made. `read` is asked again when the server refuses it: it may have been rotated."""

    def __init__(self, read: Callable[[], str], where: str) -> None:
        self._read = read
        self._where = where
        self._token = read()

    async def bearer(self) -> str:
        return self._token

    def rotated(self, used: str | None) -> bool:
        with contextlib.suppress(Error):  # it is told when the token itself is refused
            self._token = self._read()
        return self._token != used

    async def another(self, used: str | None, refused: httpx2.Response) -> None:
        try:
            self._token = self._read()
        except Error as problem:
            raise RefusedError(f"the server refuses the token, and {problem.message}", problem.hint or "") from None
        if self._token != used:
            return
        if refused.status_code == 403:
            raise RefusedError("the token does not allow this", "ask for one that does")
        raise RefusedError(
            f"the server does not take the token of {self._where}: it is wrong, has expired, or was revoked",
            "ask for a new one, and put it there",
        )
