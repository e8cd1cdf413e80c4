"""A PostgreSQL that says what no PostgreSQL says: the call ends, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import site_of_mcpctl as site
from mcpctl.config_keys import Database
from mcpctl.errors import Error
from mcpctl.identity.principal import LOCAL
from mcpctl.keyring import Keyring
from mcpctl.postgres import statement
from mcpctl.postgres.answer import Bounds
from mcpctl.postgres.login import Login
from mcpctl.postgres.terminator import Terminator
from mcpctl.postgres.token_pool import TokenPool
from mcpctl.postgres.verdicts import Verdicts
from mcpctl.postgres.wire import ConnectionLostError
from site_of_mcpctl import Shop

BOUNDS = Bounds(10, 100_000, 5.0)
COPY_IN, COPY_OUT = b"G\0\0\0\7\0\0\0", b"H\0\0\0\7\0\0\0"
TOO_SHORT = b"D\0\0\0\1"
Says = Callable[[bytes], bytes]
"""What comes before a message of the server's."""


class _Proxy:
    """Passes on what a PostgreSQL says, message by message, with what `says` puts before each."""

    says: Says | None = None

    def __init__(self, socket_path: str) -> None:
        self._path = socket_path

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to = await asyncio.open_unix_connection(self._path)

        async def up() -> None:
            while data := await reader.read(65536):
                to.write(data)
            to.close()

        async def down() -> None:
            left = b""
            while data := await there.read(65536):
                if self.says is None:
                    writer.write(data)
                    continue
                left += data
                while len(left) >= 5 and len(left) > (end := int.from_bytes(left[1:5], "big")):
                    message, left = left[: end + 1], left[end + 1 :]
                    writer.write(self.says(message) + message)
            writer.close()

        with contextlib.suppress(OSError):
            await asyncio.gather(up(), down())


@contextlib.asynccontextmanager
async def _pool(shop: Shop) -> AsyncIterator[tuple[TokenPool, _Proxy]]:
    async def room(pool: TokenPool) -> None:
        pool.connecting += 1

    found = conninfo_to_dict(shop.cluster.dsn_for(site.READER, site.PASSWORD, "shop"))
    proxy = _Proxy(f"{found['host']}/.s.PGSQL.{found.get('port', 5432)}")
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    own = {"host": "127.0.0.1", "port": server.sockets[0].getsockname()[1], "sslmode": "disable"}
    dsn = make_conninfo("", **{**found, **own, "gssencmode": "disable"})
    login = Login("shop", Database(dsn=dsn), Keyring(Path("/nonexistent/secret.key")))
    pool = TokenPool(Terminator(login), LOCAL, 5.0, Verdicts(), room)
    await pool.open()
    try:
        yield pool, proxy
    finally:
        proxy.says = None
        await pool.close()
        await pool.terminator.close()
        server.close()


class _Once:
    """Says that before the so manieth message."""

    def __init__(self, what: bytes, before: int) -> None:
        self.what = what
        self.left = before

    def __call__(self, message: bytes) -> bytes:
        self.left -= 1
        return self.what if self.left == -1 else b""


@pytest.mark.parametrize("what", [COPY_IN, COPY_OUT, TOO_SHORT], ids=["copy in", "copy out", "too short"])
@pytest.mark.parametrize("before", [0, 3, 5, 7, 9, 11])
def test_what_nobody_asked_for_ends_the_call(newest_shop: Shop, what: bytes, before: int) -> None:
    async def main() -> None:
        async with _pool(newest_shop) as (pool, proxy):
            for says in (None, None, _Once(what, before)):
                session = await pool.take()
                proxy.says = says
                begun = time.monotonic()
                with contextlib.suppress(Error):
                    await statement.run(session, "select 1", BOUNDS)
                assert time.monotonic() - begun < BOUNDS.seconds + statement.AFTER + 2
                proxy.says = None
                await pool.give_back(session)
            session = await pool.take()
            assert (await statement.run(session, "select 2", BOUNDS)).json == b"[[2]]"
            await pool.give_back(session)

    asyncio.run(main())


def test_of_a_connection_that_was_let_go_nothing_more_is_waited_for(newest_shop: Shop) -> None:
    """libpq would give None at once, again and again, to whoever counts what is still to come."""

    async def main() -> None:
        async with _pool(newest_shop) as (pool, _):
            session = await pool.take()
            assert session.conn.wire is not None
            with session.conn.wire.exchange(1 << 20, 1 << 20) as wire:
                session.pgconn.send_query_params(b"select 1", None)
                wire.sync()
                await wire.flush()
                assert await wire.command() is not None
                wire.close()
                for wait in (wire.result, wire.come):
                    with pytest.raises(ConnectionLostError):
                        await asyncio.wait_for(wait(), 5)
            session.close()
            await pool.give_back(session)

    asyncio.run(main())
