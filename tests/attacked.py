"""The whole server inside the test's process, with little patience, for requests that mean no good; and those requests,
made of tests/corpus/requests.yaml."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import uvicorn
import yaml
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

import corpus
from mcpctl import config
from mcpctl.config_values import network
from mcpctl.identity import tokens, users
from mcpctl.server import run
from mcpctl.server.door import Door, Visitor
from mcpctl.server.parts import running
from site_of_mcpctl import Site

PATIENCE = 1.5
"""Seconds that a silent visitor, and a body, have here."""
WHOAMI = '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"whoami"}}'
Address = tuple[str, int]


@dataclass(frozen=True)
class Case:
    """Bytes for a connection of their own, and the statuses of all that may be answered there: one list of `want`."""

    name: str
    send: bytes
    want: tuple[list[int], ...]


@contextlib.asynccontextmanager
async def served(at: Site) -> AsyncIterator[Address]:
    """The address of a server with the site's files."""
    with Door() as door:
        door.bind(("127.0.0.1", 0))
        address: Address = door.getsockname()
        settings = config.load(at.config, at.limits)
        settings = replace(settings, server=replace(settings.server, port=address[1]))
        visitor = Visitor.of(settings.limits.request_bytes, PATIENCE)
        async with running(settings, files=True) as core, run._app(run.Listening(settings), core) as app:
            app.body_seconds = PATIENCE
            options: dict[str, Any] = {"lifespan": "off", "log_config": None, "access_log": False, "ws": "none"}
            options |= {"server_header": False, "proxy_headers": False}  # as in run.py
            server = uvicorn.Server(uvicorn.Config(app, http=visitor, timeout_keep_alive=1, **options))
            serving = asyncio.create_task(server.serve(sockets=[door]))
            while not server.started:
                await asyncio.sleep(0.01)
            yield address
            server.should_exit = True
            await serving


async def converse(address: Address, data: bytes) -> bytes:
    """All that is answered to these bytes, until the server closes the connection."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(data)
    answer = await hear(reader)
    writer.close()
    return answer


async def hear(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the connection ends, and no less of it where a reset ends it: who still writes when the
    server has closed gets one, behind the answer."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while more := await reader.read(65536):
            answer += more
    return answer


def answers(data: bytes) -> list[tuple[int, bytes, bytes]]:
    """(status, head, body) of each answer on one connection; an AssertionError for what is none."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 "), head[:200]
        status = int(head[9:12])
        size = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        length = int(size or 0) if status >= 200 else 0
        if status >= 200:
            found.append((status, head, data[:length]))
        data = data[length:]
    return found


# -- what the corpus says in few words -------------------------------------------------------------------------------


def cases(host: str, names: Mapping[str, str]) -> Iterator[Case]:
    """Those of the corpus; `names` stand for what is in angle brackets there."""
    texts: dict[str, Any] = yaml.safe_load((corpus.FOLDER / "requests.yaml").read_text(encoding="utf-8"))
    names = {**names, "HOST": host, "BODY": WHOAMI, "SIZE": str(len(WHOAMI)), **_large()}
    for kind in ("credentials", "headers"):
        for one in texts[kind]:
            lines = [*one["lines"], *([] if kind == "credentials" else [f"Authorization: Bearer {names['TOKEN']}"])]
            yield Case(one["name"], _post(one, lines, names), tuple([status] for status in one["want"]))
    for one in texts["wire"]:
        yield Case(one["name"], _filled(one["send"], names).encode("latin-1") * one.get("repeat", 1), (one["want"],))


def _post(one: dict[str, Any], lines: list[str], names: Mapping[str, str]) -> bytes:
    body = _filled(one.get("body", WHOAMI), names).encode(one.get("encoding", "utf-8"))
    usual = {
        "Content-Type": one.get("type", "application/json"),
        "Accept": one.get("accept", "application/json"),
        "Content-Length": one.get("size", str(len(body))),
    }
    head = [f"POST {one.get('path', '/mcp')} HTTP/1.1", "Host: <HOST>", "Connection: close"]
    if any(line.startswith("Connection:") for line in lines):
        head.pop()
    head += [f"{name}: {value}" for name, value in usual.items() if value is not None]
    text = _filled("\r\n".join([*head, *lines]), names)
    return text.encode("latin-1") + b"\r\n\r\n" + body


def _filled(text: str, names: Mapping[str, str]) -> str:
    for name, value in names.items():
        text = text.replace(f"<{name}>", value)
    return text


def _large() -> dict[str, str]:
    return {
        "LONG": "x" * 10_000,
        "GIANT": "x" * 100_000,
        "THOUSAND-HEADERS": "\r\n".join(f"X-{number}: a" for number in range(1000)),
        "TEN-THOUSAND-HEADERS": "\r\n".join(f"X-{number}: a" for number in range(10_000)),
    }


def credentials(at: Site) -> dict[str, str]:
    """Tokens of every kind of standing, made in the site's files, and what resembles one."""
    _, token = at.token()
    name, other = at.token()
    revoked_name, revoked = at.token()
    tokens.revoke(at.tokens, [revoked_name], datetime.now(UTC))
    for user in ("gone", "off"):
        at.user(user)
    found = {
        "TOKEN": token, "OTHER": other, "REVOKED": revoked, "EXPIRED": _expired(at),
        "DISABLED": at.token("off")[1], "REMOVED": at.token("gone")[1],
        "ELSEWHERE": at.token(allow_ips=(network("192.0.2.0/24"),))[1],
    }  # fmt: skip
    people = users.user_file(at.folder / "users.yaml")
    users.disable(people, "off", datetime.now(UTC))
    users.remove(people, "gone")
    _, mine, secret, crc = token.split("_")
    _, _, their_secret, their_crc = other.split("_")
    found |= {"ID": mine, "SECRET": secret, "CRC": crc, "OTHER-CRC": their_crc, "OTHER-SECRET": their_secret}
    found |= {
        "CUT": token[:-1], "UPPER": token.upper(), "LOWER": token.lower(),
        "SWAPPED": f"mcp_{name}_{secret}_{their_crc}", "SWAPPED-WELL": _whole(name, secret),
        "FORGED": _whole(name, "A" * 43), "NOBODY": _whole("00000000", "A" * 43),
        "PERCENT": "".join(f"%{ord(letter):02x}" for letter in token),
        "BASE64": base64.b64encode(token.encode()).decode(), "BASIC": base64.b64encode(f"a:{token}".encode()).decode(),
        "DIGITS": token.translate({0x30 + n: 0x660 + n for n in range(10)}).encode().decode("latin-1"),
    }  # fmt: skip
    return found | _jwts()


def _expired(at: Site) -> str:
    begun = datetime.now(UTC) - timedelta(days=2)
    return tokens.add(at.tokens, tokens.Wanted(user="alice", expires_at=begun + timedelta(days=1)), begun)[1]


def _whole(name: str, secret: str) -> str:
    body = f"mcp_{name}_{secret}"
    return f"{body}_{tokens._checksum(body)}"


def _jwts() -> dict[str, str]:
    """JSON Web Tokens as an attacker makes them. None of them is anything here: sign-in with them is not served."""
    claims = {"iss": "https://issuer.example", "sub": "alice", "aud": "mcpctl", "exp": 4102444800}
    key = rsa.generate_private_key(65537, 2048)
    stranger = {"alg": "RS256", "typ": "JWT"}
    deep = "[" * 4000 + "]" * 4000
    return {
        "JWT-NONE": _jwt({"alg": "none"}, claims),
        "JWT-NONE-CAPITALS": _jwt({"alg": "nOnE"}, claims),
        "JWT-HS256": _jwt({"alg": "HS256"}, claims, b"secret"),
        "JWT-HS256-EMPTY": _jwt({"alg": "HS256"}, claims, b""),
        "JWT-RS256": _jwt(stranger, claims, key),
        "JWT-JWK": _jwt({**stranger, "jwk": {"kty": "RSA", "n": "AQAB", "e": "AQAB"}}, claims, key),
        "JWT-JKU": _jwt({**stranger, "jku": "http://127.0.0.1:1/", "x5u": "file:///etc/passwd"}, claims, key),
        "JWT-KID-PATH": _jwt({"alg": "HS256", "kid": "../../../../dev/null"}, claims, b""),
        "JWT-KID-SQL": _jwt({"alg": "HS256", "kid": "' union select 'secret"}, claims, b"secret"),
        "JWT-ALICE": _jwt(stranger, {**claims, "permissions": ["*"], "roles": ["mcp-admin"]}, key),
        "JWT-LONG": _jwt({"alg": "none"}, {**claims, "note": "x" * 9000}),
        "JWT-DEEP": ".".join([_part(b'{"alg":"none"}'), _part(deep.encode()), ""]),
    }


def _part(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _jwt(header: dict[str, Any], claims: dict[str, Any], key: bytes | rsa.RSAPrivateKey | None = None) -> str:
    text = f"{_part(json.dumps(header).encode())}.{_part(json.dumps(claims).encode())}"
    signature = b""
    if isinstance(key, rsa.RSAPrivateKey):
        signature = key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
    elif key is not None:
        signature = hmac.digest(key, text.encode(), hashlib.sha256)
    return f"{text}.{_part(signature)}"
