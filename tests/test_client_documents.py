"""Client ID Metadata Documents: which are believed, and that we are not sent where nobody from outside may look."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import oauth_servers
from mcpctl.config_values import Network
from mcpctl.errors import UnavailableError
from mcpctl.identity import client_documents
from mcpctl.identity.client_documents import DocumentError, is_public
from mcpctl.identity.oauth_clients import Client
from mcpctl.server import loop
from oauth_servers import Documents as Served

HERE: tuple[Network, ...] = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    with oauth_servers.documents(tmp_path_factory.mktemp("documents")) as found:
        yield found


class Reader:
    """Reads documents; `now` is its clock, `addresses` what each host is resolved to."""

    def __init__(self, served: tuple[Served, Path], allow: tuple[Network, ...] = HERE) -> None:
        self.now = datetime(2026, 11, 28, tzinfo=UTC)
        self.addresses = ["127.0.0.1"]
        self.resolved = 0
        trusted = ssl.create_default_context(cafile=served[1])
        self.documents = client_documents.Documents(allow, (), lambda: self.now, self._resolve, trusted)

    async def _resolve(self, host: str, port: int) -> list[str]:
        self.resolved += 1
        return self.addresses

    def find(self, url: str) -> Client:
        return asyncio.run(self.documents.find(url))

    def why_not(self, url: str) -> str:
        with pytest.raises(DocumentError) as caught:
            self.find(url)
        assert caught.value.status == 400
        return caught.value.message


@pytest.fixture
def reader(served: tuple[Served, Path]) -> Reader:
    return Reader(served)


def test_a_document_in_order_is_a_client_whose_home_is_its_host(served: tuple[Served, Path], reader: Reader) -> None:
    url = served[0].client("/good.json")
    found = reader.find(url)
    assert (found.id, found.name, found.host) == (url, "Document client", "localhost")
    assert found.redirects == ("http://127.0.0.1:41234/back",)
    assert found.renews
    assert found.proven


@pytest.mark.parametrize(
    ("name", "changed", "told"),
    [
        ("id", {"client_id": "https://localhost/other.json"}, "its client_id is not its URL"),
        ("noid", {"client_id": None}, "its client_id is not its URL"),
        ("noname", {"client_name": None}, "it has no client_name"),
        ("noplace", {"redirect_uris": None}, "redirect_uris"),
        ("wild", {"redirect_uris": ["https://*.example/back"]}, "redirect_uris"),
        ("http", {"redirect_uris": ["http://a.example/back"]}, "redirect_uris"),
        ("secret", {"client_secret": "x"}, "token_endpoint_auth_method"),
        ("method", {"token_endpoint_auth_method": "client_secret_basic"}, "token_endpoint_auth_method"),
        ("grant", {"grant_types": ["implicit"]}, "grant_types"),
    ],
)
def test_a_document_that_is_not_in_order_is_no_client(
    served: tuple[Served, Path], reader: Reader, name: str, changed: dict[str, Any], told: str
) -> None:
    assert told in reader.why_not(served[0].client(f"/bad-{name}.json", **changed))


@pytest.mark.parametrize(
    ("document", "headers", "status", "told"),
    [
        (b"{", {}, 200, "no JSON"),
        (b"[]", {}, 200, "no JSON object"),
        (b'{"client_id":1,"client_id":2}', {}, 200, "a key twice"),
        (b"[" * 3000, {}, 200, "deeper"),
        (b'{"x":"' + b"a" * (17 << 10) + b'"}', {}, 200, "larger than"),
        (b"{}", {"content_type": "text/html"}, 200, "not said to be JSON"),
        (b"{}", {"content_encoding": "gzip"}, 200, "packed"),
        (b"{}", {"location": "https://169.254.169.254/"}, 302, "a redirect, which is not followed"),
        (b"{}", {}, 404, "status 404"),
        (b"{}", {}, 500, "status 500"),
    ],
)
def test_what_is_no_document_is_refused(
    served: tuple[Served, Path], reader: Reader, document: bytes, headers: dict[str, str], status: int, told: str
) -> None:
    url = served[0].put(f"/no-{told.split()[-1]}-{len(document)}.json", document, status, **headers)
    assert told in reader.why_not(url)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%1", "fc00::1",
        "fd12::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::a00:1",
        "2002:7f00:1::", "2001:0:7f00:1::", "::7f00:1", "2001:db8::1", "fec0::1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_public_is_never_asked(served: tuple[Served, Path], address: str) -> None:
    reader = Reader(served, allow=())
    reader.addresses = ["93.184.215.14", address]  # one that is not is enough
    url = served[0].client("/inwards.json").replace(served[0].base, "https://app.example.com")
    before = len(served[0].asked)
    assert reader.why_not(url) == "its host is not on the public network"
    assert len(served[0].asked) == before
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("host", ["a..example", f"{'a' * 64}.example", ".example", f"{'a.' * 200}example"])
def test_a_host_whose_name_cannot_be_one_is_not_found(host: str) -> None:
    for runner in (asyncio.run, loop.run):  # each looks names up in its own way
        with pytest.raises(DocumentError, match=r"cannot be found"):
            runner(client_documents.Documents().find(f"https://{host}/client.json"))


def test_documents_are_no_clients_while_too_many_hosts_are_being_looked_up() -> None:
    async def full(host: str, port: int) -> list[str]:
        raise UnavailableError("too many hosts are being looked up", "try again in a moment")

    with pytest.raises(DocumentError, match="too many hosts"):
        asyncio.run(client_documents.Documents(resolve=full).find("https://app.example/client.json"))


@pytest.mark.parametrize("address", ["93.184.215.14", "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"])
def test_an_address_of_the_public_network_is_one(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_the_address_that_was_looked_at_is_the_one_that_is_asked(served: tuple[Served, Path], reader: Reader) -> None:
    """A host that is resolved to something else the next time (DNS rebinding) gains nothing: it is resolved once."""
    reader.find(served[0].client("/pinned.json"))
    assert reader.resolved == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://app.example.com/c.json", "https://app.example.com", "https://app.example.com/",
        "https://user@app.example.com/c.json", "https://app.example.com/c.json#part", "https://127.0.0.1/c.json",
        "https://2130706433/c.json", "https://0x7f.1/c.json", "https://0177.0.0.1/c.json", "https://[::1]/c.json",
        "https://app.example.com/a/../c.json", "https://app.example.com/%2e%2e/c.json", "https://APP.example.com/c.json",
        "https://app.example.com./c.json", "https://app.example.com/c d.json", "https://app.example.com:99999/c.json",
        "https://app.example.com\\@evil.example/c.json", "https://app.example.com/" + "c" * 600,
    ],
)  # fmt: skip
def test_a_client_id_that_is_not_in_its_plainest_form_is_not_looked_for(reader: Reader, url: str) -> None:
    assert "client_id" in reader.why_not(url)
    assert reader.resolved == 0


def test_another_port_than_443_is_for_networks_that_the_config_allows(served: tuple[Served, Path]) -> None:
    reader = Reader(served, allow=())
    reader.addresses = ["93.184.215.14"]
    assert reader.why_not("https://app.example.com:8443/c.json") == "its port is not 443"


def test_a_certificate_of_another_host_is_not_believed(served: tuple[Served, Path], reader: Reader) -> None:
    url = served[0].client("/foreign.json")
    assert "cannot be read" in reader.why_not(url.replace("localhost", "app.example.com"))


def test_a_host_that_is_not_there_is_no_client(reader: Reader) -> None:
    reader.addresses = []
    assert reader.why_not("https://app.example.com/c.json") == "its host cannot be found"
    with pytest.raises(DocumentError) as caught:
        reader.find("https://app.example.com/c.json")
    assert "auth.oauth.metadata_documents: false" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("said", "fresh", "stale"),
    [
        ("max-age=7200", timedelta(hours=1, minutes=59), timedelta(hours=2, seconds=1)),
        ("max-age=99999999", timedelta(hours=23, minutes=59), timedelta(hours=24, seconds=1)),
        ("no-store", timedelta(minutes=4), timedelta(minutes=6)),
        ("", timedelta(minutes=4), timedelta(minutes=6)),
    ],
)
def test_a_document_is_remembered_as_its_headers_say_within_bounds(
    served: tuple[Served, Path], reader: Reader, said: str, fresh: timedelta, stale: timedelta
) -> None:
    path = f"/kept-{said or 'nothing'}.json"
    url = served[0].client(path)
    served[0].answers[path][1]["cache-control"] = said
    begun = reader.now
    reader.find(url)
    reader.now = begun + fresh
    reader.find(url)
    assert served[0].asked.count(path) == 1
    reader.now = begun + stale
    reader.find(url)
    assert served[0].asked.count(path) == 2


def test_what_was_wrong_is_asked_for_again(served: tuple[Served, Path], reader: Reader) -> None:
    url = served[0].put("/mended.json", b"{", 200)
    reader.why_not(url)
    assert reader.find(served[0].client("/mended.json")).id == url
