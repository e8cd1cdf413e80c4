"""The journal's native protocol: one entry a datagram, with fields (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/).

Written here, since it is small: systemd-python is LGPL and needs a compiler.
"""

import array
import errno
import logging
import os
import socket
from collections.abc import Mapping

SOCKET = "/run/systemd/journal/socket"
_WAIT = 1.0
"""Seconds for a journal that is busy; then the line goes elsewhere."""
_BUFFER = 1 << 20
_PRIORITIES = ((logging.ERROR, "3"), (logging.WARNING, "4"), (logging.INFO, "6"))


def priority(level: int) -> str:
    """A level as syslog(3) numbers it."""
    return next((number for least, number in _PRIORITIES if level >= least), "7")


def is_stderr(stderr: int = 2) -> bool:
    """Whether the journal takes what is written to stderr: systemd.exec(5), JOURNAL_STREAM."""
    try:
        found = os.fstat(stderr)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def entry(fields: Mapping[str, str]) -> bytes:
    """Fields as they are sent: `NAME=value`, or, where the value has lines, its length in 8 bytes before it."""
    parts = []
    for name, value in fields.items():
        data = value.encode("utf-8", "backslashreplace")
        if b"\n" in data:
            parts.append(name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n")
        else:
            parts.append(name.encode() + b"=" + data + b"\n")
    return b"".join(parts)


class Journal:
    """A way to the journal. Raises OSError where nobody listens there."""

    def __init__(self, address: str = SOCKET) -> None:
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            self._socket.settimeout(_WAIT)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as tried:
                tried.connect(address)
        except OSError:
            self._socket.close()
            raise

    def send(self, fields: Mapping[str, str]) -> None:
        """Send an entry; one that is too large for a datagram in a sealed memfd. Raises OSError."""
        data = entry(fields)
        try:
            self._socket.sendto(data, self._address)
        except OSError as problem:
            if problem.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_apart(data)

    def _send_apart(self, data: bytes) -> None:
        import fcntl

        file = os.memfd_create("mcpctl", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(file, "wb", closefd=False) as writing:
                writing.write(data)
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
            passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))]
            self._socket.sendmsg([], passed, 0, self._address)
        finally:
            os.close(file)

    def close(self) -> None:
        """Close it."""
        self._socket.close()
