"""Whether a PostgreSQL takes connections, without logging in: what libpq's PQping does, on the event loop.

psycopg's PQping keeps the interpreter to itself while it waits, and a host that hangs would hold up everybody.
PostgreSQL, "Message Flow", "Start-up" and "SSL Session Encryption", and "Message Formats".
"""

import asyncio
import os
import ssl
import struct
from typing import Any

from psycopg.conninfo import conninfo_to_dict

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
_PROTOCOL = 196608
_USUAL_FOLDERS = "/var/run/postgresql,/tmp"
_LONGEST = 1 << 16


async def takes_connections(dsn: str, seconds: float) -> bool:
    """Whether one of its hosts answers the start of a login within that time, and not that it is starting, stopping or
    recovering (SQLSTATE 57P03). What it says of the login itself does not matter."""
    values = conninfo_to_dict(dsn)
    numeric = str(values.get("hostaddr") or os.environ.get("PGHOSTADDR") or "")
    hosts = str(values.get("host") or os.environ.get("PGHOST") or numeric or _USUAL_FOLDERS).split(",")
    addresses = numeric.split(",")
    ports = str(values.get("port") or os.environ.get("PGPORT") or "5432").split(",")
    most = max(len(hosts), len(addresses))
    found = await asyncio.gather(*(
        _answers(values, _at(hosts, n), _at(addresses, n), int(_at(ports, n) or 5432), seconds) for n in range(most)
    ))  # fmt: skip
    return any(found)


def _at(values: list[str], index: int) -> str:
    return values[index] if index < len(values) else values[-1]


async def _answers(values: dict[str, Any], host: str, address: str, port: int, seconds: float) -> bool:
    here = not address and host.startswith(("/", "@"))
    try:
        async with asyncio.timeout(seconds):
            if here:
                path = f"{host}/.s.PGSQL.{port}"
                reader, writer = await asyncio.open_unix_connection("\0" + path[1:] if host[0] == "@" else path)
            else:
                reader, writer = await asyncio.open_connection(address or host or "localhost", port)
            try:
                if not here and values.get("sslmode") != "disable":
                    writer.write(_SSL_REQUEST)
                    if await reader.readexactly(1) == b"S":
                        await writer.start_tls(_context(values), server_hostname=host or address)
                return await _start(reader, writer, values)
            finally:
                writer.close()
    except (OSError, EOFError, TimeoutError):  # an ssl.SSLError is an OSError
        return False


async def _start(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, values: dict[str, Any]) -> bool:
    """Say who wants to log in, and look at the first answer."""
    user = str(values.get("user") or os.environ.get("PGUSER") or "postgres")
    body = f"user\0{user}\0database\0{values.get('dbname') or user}\0\0".encode()
    writer.write(struct.pack("!ii", len(body) + 8, _PROTOCOL) + body)
    kind = await reader.readexactly(1)
    if kind != b"E":
        return kind == b"R"
    (length,) = struct.unpack("!i", await reader.readexactly(4))
    said = await reader.readexactly(max(0, min(length - 4, _LONGEST)))
    return b"C57P03" not in said.split(b"\0")


def _context(values: dict[str, Any]) -> ssl.SSLContext:
    """As libpq would look at the certificate: not at all, unless it is told to."""
    mode, root = str(values.get("sslmode")), values.get("sslrootcert")
    context = ssl.create_default_context(cafile=None if root in (None, "system") else str(root))
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # Python 3.13 asks for extensions that libpq does without
    context.check_hostname = mode == "verify-full"
    if not mode.startswith("verify-"):
        context.verify_mode = ssl.CERT_NONE
    return context
