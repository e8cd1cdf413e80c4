"""The parameters of OAuth: of a query, or of a form. Each may stand there once (RFC 6749, sections 3.1 and 3.2)."""

import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote_to_bytes

from mcpctl.errors import Error, UsageError
from mcpctl.server.credentials import Headers, header

LARGEST = 7 << 10
"""Bytes of a query or a form."""
_ENCODED = re.compile(rb"(?:[!-$'-~]|%[0-9A-Fa-f]{2})*")
"""What may stand in an encoded name or value: every visible ASCII character but `%` and `&`."""
_MOST = 40
_FORM = "application/x-www-form-urlencoded"


class Parameters(Mapping[str, str]):
    """What was sent, without what is empty, which counts as left out. `twice` are the names that stand there more than
    once; what each says is unknown then."""

    def __init__(self, data: bytes) -> None:
        """UsageError (400) for what is no list of parameters. No message repeats a value: it may be a secret."""
        if len(data) > LARGEST:
            raise UsageError(f"there are more than {LARGEST} bytes of parameters", "send less")
        parts = [part for part in data.split(b"&") if part]
        if len(parts) > _MOST:
            raise UsageError(f"there are more than {_MOST} parameters", "send less")
        self._found: dict[str, str] = {}
        self.twice: set[str] = set()
        for part in parts:
            name, value = (_decoded(one) for one in part.partition(b"=")[::2])
            if name in self._found:
                self.twice.add(name)
            self._found[name] = value

    def __getitem__(self, name: str) -> str:
        if name in self.twice or not self._found[name]:
            raise KeyError(name)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._found if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def check_once(self) -> None:
        """UsageError where one stands there twice."""
        if self.twice:
            raise UsageError("a parameter stands there twice", "send each once")


def _decoded(encoded: bytes) -> str:
    if not _ENCODED.fullmatch(encoded):
        raise UsageError("the parameters are not encoded as a form's are", f"send them as {_FORM}")
    try:
        text = unquote_to_bytes(encoded.replace(b"+", b" ")).decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError("the parameters are not UTF-8", f"send them as {_FORM}") from None
    if "\0" in text:
        raise UsageError("a parameter has a NUL in it", "leave it out")
    return text


def check_form(headers: Headers) -> None:
    """Raise an Error (415) where a body is not said to be a form."""
    given = (header(headers, b"content-type") or "").partition(";")[0].strip().lower()
    if given != _FORM:
        raise Error("the body is to be a form", f"send Content-Type: {_FORM}", status=415)
