"""Servers that mean no good: one that is no PostgreSQL, and asks for the password in clear; one that lets in, and then
says nothing."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Iterator
from typing import TypeVar

_SSL, _GSS, _CANCEL = 80877103, 80877104, 80877102


class Hostile:
    """What it has heard: the settings of each startup message, and every byte."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.startups: list[dict[str, str]] = []
        self.heard = b""
        self.connections = 0

    def serve(self) -> None:
        while True:
            try:
                visitor, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            with visitor, contextlib.suppress(OSError, EOFError):
                visitor.settimeout(10)
                self._talk(visitor)

    def _talk(self, visitor: socket.socket) -> None:
        while True:
            length, code = struct.unpack("!ii", self._read(visitor, 8))
            body = self._read(visitor, length - 8)
            if code not in (_SSL, _GSS):
                break
            visitor.sendall(b"N")
        if code == _CANCEL:
            return
        parts = body.rstrip(b"\0").decode().split("\0")
        self.startups.append(dict(zip(parts[::2], parts[1::2], strict=True)))
        visitor.sendall(b"R" + struct.pack("!ii", 8, 3))  # AuthenticationCleartextPassword
        while more := visitor.recv(4096):
            self.heard += more

    def _read(self, visitor: socket.socket, size: int) -> bytes:
        found = b""
        while len(found) < size:
            more = visitor.recv(size - len(found))
            if not more:
                raise EOFError
            found += more
        self.heard += found
        return found


T = TypeVar("T", "Hostile", "Silent")


@contextlib.contextmanager
def _serving(found: T) -> Iterator[T]:
    thread = threading.Thread(target=found.serve, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        with contextlib.suppress(OSError):
            found.listener.shutdown(socket.SHUT_RDWR)
        found.listener.close()
        thread.join(15)
        assert not thread.is_alive()


@contextlib.contextmanager
def hostile() -> Iterator[Hostile]:
    with _serving(Hostile()) as found:
        yield found


class Silent:
    """Stands before a real PostgreSQL, and passes on what both say until somebody is logged in; nothing after that."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.let_in = 0

    def serve(self) -> None:
        while True:
            try:
                visitor, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass_on, args=(visitor,), daemon=True).start()

    def _pass_on(self, visitor: socket.socket) -> None:
        with visitor, socket.create_connection(("127.0.0.1", self._behind)) as real, contextlib.suppress(OSError):
            said = b""
            while not said.endswith(b"Z\0\0\0\5I"):  # ReadyForQuery, in no transaction
                for one in select.select([visitor, real], [], [], 10)[0]:
                    data = one.recv(65536)
                    if not data:
                        return
                    said = said + data if one is real else said
                    (visitor if one is real else real).sendall(data)
            self.let_in += 1
            while visitor.recv(65536):
                pass


@contextlib.contextmanager
def silent(port: int) -> Iterator[Silent]:
    with _serving(Silent(port)) as found:
        yield found
