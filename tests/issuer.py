"""An issuer of OpenID Connect: a real HTTP server on a free port of this machine, real keys, and what goes wrong."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs

import pytest
import trustme
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from jwt import PyJWS
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from mcpctl.config_sign_in import Oidc
from mcpctl.errors import UnauthorizedError
from mcpctl.identity.claims import Outside
from mcpctl.identity.oidc import Issuers

NOW = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)
AUDIENCE = "https://mcp.example.org"
DISCOVERY = "/.well-known/openid-configuration"


class Clock:
    """The time that is passed in."""

    def __init__(self) -> None:
        self.at = NOW

    def __call__(self) -> datetime:
        return self.at

    def pass_(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


@cache
def rsa_key(name: str = "one", bits: int = 2048) -> rsa.RSAPrivateKey:
    """One key for each name, since making one takes a while."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def jwk(private: Any, kid: str, **more: Any) -> dict[str, Any]:
    """A public key as a key set has it."""
    public = private.public_key()
    if isinstance(private, rsa.RSAPrivateKey):
        found: Any = RSAAlgorithm.to_jwk(public, as_dict=True)
    elif isinstance(private, ec.EllipticCurvePrivateKey):
        found = ECAlgorithm.to_jwk(public, as_dict=True)
    else:
        found = OKPAlgorithm.to_jwk(public, as_dict=True)
    found.pop("key_ops", None)
    return {**found, "kid": kid, "use": "sig"} | more


def signed(claims: Mapping[str, Any], private: Any, kid: str | None = "one", alg: str = "RS256", **header: Any) -> str:
    """A token as an issuer makes it."""
    more = {"kid": kid, **header} if kid is not None else header
    return PyJWS().encode(json.dumps(claims).encode(), private, alg, more)


def coded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def raw(header: bytes | Mapping[str, Any], claims: bytes | Mapping[str, Any], private: Any) -> str:
    """A token of any bytes, with a good RS256 signature."""
    parts = [coded(one if isinstance(one, bytes) else json.dumps(one).encode()) for one in (header, claims)]
    text = ".".join(parts)
    return f"{text}.{coded(private.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


@dataclass
class Answer:
    """What is answered at one path. `gate` is waited for before, and `drip` sends the body byte by byte until the
    other side has gone."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    gate: threading.Event | None = None
    drip: threading.Event | None = None


def as_json(value: Any, **more: Any) -> Answer:
    return Answer(json.dumps(value).encode(), **more)


class Issuer:
    """The running server. `answers` by path can be changed; `asked` has each path that was asked for."""

    def __init__(self, server: ThreadingHTTPServer, scheme: str) -> None:
        self.url = f"{scheme}://{'localhost' if scheme == 'https' else '127.0.0.1'}:{server.server_address[1]}"
        self.asked: list[str] = []
        self.forms: list[dict[str, list[str]]] = []
        self.logins: list[str] = []
        self.about: dict[str, Any] = {}
        self.answers: dict[str, Answer] = {}
        self.private: Any = rsa_key()
        self.answers[DISCOVERY] = as_json(self.metadata())
        self.publish(jwk(self.private, "one", alg="RS256"))

    def metadata(self, **more: Any) -> dict[str, Any]:
        endpoints = {"jwks_uri": f"{self.url}/keys", "introspection_endpoint": f"{self.url}/introspect"}
        return {"issuer": self.url, **endpoints, **more}

    def publish(self, *keys: dict[str, Any]) -> None:
        self.answers["/keys"] = as_json({"keys": list(keys)})

    def claims(self, **more: Any) -> dict[str, Any]:
        """Claims that are good; None takes one away."""
        seconds = int(NOW.timestamp())
        found = {
            "iss": self.url,
            "sub": "5f0c-alice",
            "aud": AUDIENCE,
            "exp": seconds + 300,
            "iat": seconds,
            "jti": "id-1",
            "typ": "Bearer",
            "preferred_username": "alice",
            "realm_access": {"roles": ["mcp-user", "offline_access"]},
        } | more
        return {name: value for name, value in found.items() if value is not None}

    def token(self, **more: Any) -> str:
        return signed(self.claims(**more), self.private)

    def config(self, **more: Any) -> Oidc:
        return Oidc(**{"issuer": self.url, "audience": (AUDIENCE,), "allow_http_loopback": True} | more)

    def count(self, path: str) -> int:
        return self.asked.count(path)


@contextmanager
def running(ca: trustme.CA | None = None) -> Iterator[Issuer]:
    """An issuer, with HTTPS where there is a CA."""
    issuer: Issuer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.asked.append(self.path)
            self.answer(issuer.answers.get(self.path, Answer(b"{}", 404)))

        def do_POST(self) -> None:
            issuer.asked.append(self.path)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            form = parse_qs(body.decode())
            issuer.forms.append(form)
            issuer.logins.append(base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode())
            about = issuer.about.get(form["token"][0], {"active": False})
            self.answer(issuer.answers.get(self.path, as_json(about)))

        def answer(self, answer: Answer) -> None:
            if answer.gate is not None:
                answer.gate.wait(30)
            try:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if answer.drip is None:
                    self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)
                while answer.drip is not None and not answer.drip.wait(0.05):
                    self.wfile.write(b" ")
            except OSError:
                pass  # who asked has gone
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass  # a TLS handshake that is refused

    server = Server(("127.0.0.1", 0), Handler)
    if ca is not None:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert("localhost").configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    issuer = Issuer(server, "http" if ca is None else "https")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield issuer
    finally:
        for answer in issuer.answers.values():
            for event in (answer.gate, answer.drip):
                if event is not None:
                    event.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def ca_file(ca: trustme.CA, folder: Path) -> Path:
    path = folder / "ca.pem"
    ca.cert_pem.write_to_path(path)
    return path


ED25519 = ed25519.Ed25519PrivateKey.generate()
P256 = ec.generate_private_key(ec.SECP256R1())


T = TypeVar("T")


def use(clock: Clock, config: dict[str, Oidc], work: Callable[[Issuers], Coroutine[Any, Any, T]]) -> T:
    """What `work` makes of these issuers."""

    async def run() -> T:
        issuers = Issuers(config, clock)
        try:
            return await work(issuers)
        finally:
            await issuers.close()

    return asyncio.run(run())


def verify(clock: Clock, config: Oidc, token: str) -> Outside:
    return use(clock, {"shop": config}, lambda issuers: issuers.verify(token))


def refusal(clock: Clock, config: Oidc, token: str) -> str:
    with pytest.raises(UnauthorizedError) as caught:
        verify(clock, config, token)
    assert caught.value.status == 401
    assert not token or token not in caught.value.message
    return caught.value.message
