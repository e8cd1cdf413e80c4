"""PostgreSQL over a network that swallows what is sent: bounded by timeouts, and nobody else has to wait."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from site_of_mcpctl import Client, Shop, Site, eventually, in_background
from under_load import Load

MakeSite = Callable[..., Site]


class Path:
    """A way through 127.0.0.1 to a cluster's socket. While it is `closed`, what comes is taken and goes nowhere; what
    was swallowed is lost for good, as are the connections over which it came."""

    def __init__(self, folder: str, port: int) -> None:
        self._to = f"{folder}/.s.PGSQL.{port}"
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.closed = False
        self.swallowed = 0
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listening.accept()
                self._open.append(ours)
                if self.closed:
                    continue
                theirs = socket.socket(socket.AF_UNIX)
                theirs.connect(self._to)
                self._open.append(theirs)
                lost = threading.Event()
                for one, other in ((ours, theirs), (theirs, ours)):
                    self._start(self._forward, one, other, lost)

    def _forward(self, one: socket.socket, other: socket.socket, lost: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                if self.closed:
                    lost.set()
                if lost.is_set():
                    self.swallowed += len(data)
                else:
                    other.sendall(data)
            if not lost.is_set():
                other.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """End all threads, then close all sockets."""
        while self._threads:
            for one in (self._listening, *self._open):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self._threads.pop(0).join(10)
        for one in (self._listening, *self._open):
            one.close()


@pytest.fixture
def path(newest_shop: Shop) -> Iterator[Path]:
    found = Path(newest_shop.cluster.host, newest_shop.cluster.port)
    yield found
    found.close()


def behind(make_site: MakeSite, shop: Shop, path: Path) -> Site:
    """A site with a database `far` at the end of that path, beside `shop`."""
    more = (
        f"  far: {{host: 127.0.0.1, port: {path.port}, dbname: shop, user: shop_reader, password_file: shop.password,"
        " sslmode: disable, pool: {wait: 2s}}\nlimits: {statement_timeout: 3s}\n"
    )
    return make_site(shop, database="    default: true\n    required: false\n", extra=more).start()


def text(client: Client, query: str = "select 'again'") -> str:
    """What is said to a query of the far one, whatever it is."""
    answer = client.call("query_database", {"query": query, "database": "far"}).json()
    return str(answer["result"]["content"][0]["text"])


def ready(at: Site) -> bool:
    return httpx.get(at.url.removesuffix("/mcp") + "/ready", trust_env=False, timeout=5).status_code == 200


def test_a_port_that_takes_connections_and_says_nothing(make_site: MakeSite, newest_shop: Shop, path: Path) -> None:
    path.closed = True
    at = behind(make_site, newest_shop, path)
    assert not ready(at)
    with Load(at, callers=2) as load, at.client(at.token()[1]) as client:
        begun = time.monotonic()
        assert "cannot be reached right now" in client.error("select 1", database="far")
        assert time.monotonic() - begun < 6
        path.closed = False
        eventually(lambda: "rows" in text(client))  # an attempt that began before may still be on its way
        eventually(lambda: ready(at), 5)
    load.judge()
    assert not load.refused


def test_a_path_that_is_lost_under_what_runs_over_it(make_site: MakeSite, newest_shop: Shop, path: Path) -> None:
    at = behind(make_site, newest_shop, path)
    with Load(at, callers=2) as load, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(at.client(at.token()[1])) for _ in range(4)]
        for client in clients[2:]:  # these have nothing running, but a connection
            assert client.rows("select 'far'", database="far") == [["far"]]
        running = [in_background(text, client, "select pg_sleep(2.9)") for client in clients[:2]]
        eventually(lambda: len(newest_shop.backends("state = 'active' AND query LIKE '%pg_sleep(2.9)%'")) == 2)
        path.closed = True
        begun = time.monotonic()
        said = [one.result() for one in running]
        assert all("statement timeout" in text for text in said), said
        assert "cannot be reached" in clients[3].error("select 1", database="far")
        assert time.monotonic() - begun < 20
        path.closed = False
        assert path.swallowed
        for client in clients:
            eventually(lambda client=client: "again" in text(client))
        load.goes_on()
    load.judge()
    assert not load.refused
    eventually(lambda: not newest_shop.backends("state = 'active'"), 15)
