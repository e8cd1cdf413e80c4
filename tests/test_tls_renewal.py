"""A certificate that is renewed under a running server, its end, and client certificates."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from mcpctl import certificates
from mcpctl.certificates import Pair
from mcpctl.cli import init
from mcpctl.config import load
from mcpctl.config_keys import Server, Settings, Tls
from mcpctl.errors import ConfigError
from mcpctl.server.tls import Certificates, aside
from site_of_mcpctl import Client, Shop, Site, eventually
from test_workers import children

MakeSite = Callable[..., Site]
START = datetime(2026, 1, 1, tzinfo=UTC)


class Authority:
    """A CA, and the files that a server is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        self.ca.cert_pem.write_to_path(folder / "ca.pem")
        self.tls = Tls(folder / "cert.pem", folder / "key.pem")
        self.renew()

    def issue(self, **options: Any) -> tuple[bytes, bytes]:
        made = self.ca.issue_cert("localhost", "127.0.0.1", **options)
        return made.cert_chain_pems[0].bytes(), made.private_key_pem.bytes()

    def renew(self, **options: Any) -> bytes:
        """Write a new pair, as a renewal does; the certificate as DER."""
        cert, key = self.issue(**options)
        self.write(key, "key.pem")
        self.write(cert, "cert.pem")
        return ssl.PEM_cert_to_DER_cert(cert.decode())

    def write(self, data: bytes, name: str) -> None:
        new = self.folder / f".{name}.new"
        new.touch(0o600)
        new.write_bytes(data)
        new.replace(self.folder / name)

    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "ca.pem"))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    folder = tmp_path / "tls"
    folder.mkdir()
    return Authority(folder)


class Eye:
    """The server's eye on the files, with times that the test sets."""

    def __init__(self, tls: Tls, last: Pair | None = None) -> None:
        self.now, self.clock = datetime.now(UTC), 0.0
        self.notes: list[tuple[str, str]] = []
        self.certificates = Certificates(
            Settings(server=Server(tls=tls)),
            lambda event, reason: self.notes.append((event, reason)),
            last,
            now=lambda: self.now,
            clock=lambda: self.clock,
        )

    def look(self, times: int = 2) -> None:
        for _ in range(times):
            self.certificates.look()

    def served(self, meanwhile: Callable[[], object] = lambda: None) -> bytes:
        """The certificate that a new connection gets, as DER, from a handshake in whose midst that is done."""
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        ways = [ssl.MemoryBIO() for _ in range(4)]
        one = client.wrap_bio(ways[0], ways[1])
        other = self.certificates.live.wrap_bio(ways[2], ways[3], server_side=True)
        for _ in range(4):
            for side, (source, sink) in ((one, (ways[1], ways[2])), (other, (ways[3], ways[0]))):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    pass
                sink.write(source.read())
            meanwhile()
        other.do_handshake()
        found = one.getpeercert(binary_form=True)
        assert found is not None
        return found


def test_files_that_are_out_of_order_at_the_start_of_a_further_worker_leave_what_was_served(
    authority: Authority,
) -> None:
    eye = Eye(authority.tls)
    old, last = eye.served(), eye.certificates._pair
    authority.write(authority.issue()[0], "cert.pem")
    with pytest.raises(ConfigError, match="cannot be used"):
        Eye(authority.tls)
    further = Eye(authority.tls, last)
    assert further.served() == old
    new = authority.renew()
    further.look()
    assert further.served() == new


def test_what_does_not_answer_is_no_certificate_and_holds_nobody_up(authority: Authority) -> None:
    (authority.folder / "cert.pem").unlink()
    os.mkfifo(authority.folder / "cert.pem")
    with pytest.raises(ConfigError, match="it is no regular file"):
        certificates.read(authority.tls)

    async def main() -> None:
        hangs, go_on = threading.Event(), threading.Event()
        task = asyncio.create_task(aside(lambda: (hangs.set(), go_on.wait())[1]))
        while not hangs.is_set():
            await asyncio.sleep(0)  # the loop goes on
        go_on.set()
        assert await task

    asyncio.run(main())


def test_another_client_ca_ends_the_connections_that_an_earlier_one_let_in(authority: Authority) -> None:
    eye, ended = Eye(authority.tls), []
    eye.certificates.hang_up = lambda: ended.append(1)
    authority.renew()
    eye.look()
    assert ended == []
    clients = trustme.CA()
    clients.cert_pem.write_to_path(authority.folder / "clients.pem")
    for number, how in ((1, "required"), (2, "optional")):
        tls = replace(authority.tls, client_ca=authority.folder / "clients.pem", client_certificate=how)
        eye.certificates.take(*eye.certificates.read(tls))
        assert len(ended) == number
    found = x509.load_pem_x509_certificate(clients.cert_pem.bytes())
    said = f"client_ca of server.tls; client_ca counts until {found.not_valid_after_utc.date()}, SHA-256 "
    assert eye.notes[-1] == ("config.certificate_renewed", f"{said}{found.fingerprint(hashes.SHA256()).hex()[:16]}…")


def test_a_handshake_that_was_begun_with_another_client_ca_lets_nobody_in(authority: Authority) -> None:
    eye = Eye(authority.tls)
    authority.renew()
    assert eye.served(eye.certificates.look)  # another certificate alone is no reason
    tls = replace(authority.tls, client_ca=authority.folder / "ca.pem", client_certificate="optional")
    with pytest.raises(ssl.SSLError, match="another client CA"):
        eye.served(lambda: eye.certificates.take(*eye.certificates.read(tls)))
    assert eye.served()


def test_a_client_ca_that_can_issue_nothing_is_refused(authority: Authority) -> None:
    tls = replace(authority.tls, client_ca=authority.tls.cert)
    with pytest.raises(ConfigError, match=r"the client CA .* is no CA"):
        certificates.read(tls).context()


def test_a_renewed_pair_is_taken_when_it_is_at_rest(authority: Authority) -> None:
    eye = Eye(authority.tls)
    old = eye.served()
    new = authority.renew()
    eye.look(1)
    assert eye.served() == old
    eye.look(1)
    assert eye.served() == new != old
    ((event, reason),) = eye.notes
    assert event == "config.certificate_renewed"
    assert reason.startswith("cert, key of server.tls; cert counts until ")
    os.utime(authority.folder / "cert.pem")
    eye.look(3)
    assert len(eye.notes) == 1  # touched, and nothing else


def test_an_ecdsa_certificate_takes_the_place_of_an_rsa_one(authority: Authority) -> None:
    authority.renew(key_type=trustme.KeyType.RSA)
    eye = Eye(authority.tls)
    new = authority.renew(key_type=trustme.KeyType.ECDSA)
    eye.look()
    assert eye.served() == new


def test_what_does_not_fit_is_waited_out_and_said_when_it_lasts(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    eye = Eye(authority.tls)
    old = eye.served()
    cert, key = authority.issue()
    authority.write(cert, "cert.pem")
    eye.look()
    for clock, warnings in ((0.0, 0), (9.0, 0), (10.5, 1), (60.0, 1)):
        eye.clock = clock
        eye.look()
        assert [record.levelno for record in caplog.records].count(logging.WARNING) == warnings
    assert sum("not in order yet" in record.message for record in caplog.records) == 1
    assert (eye.served(), eye.notes) == (old, [])
    authority.write(key, "key.pem")
    eye.look()
    assert eye.served() == ssl.PEM_cert_to_DER_cert(cert.decode())


def test_half_a_file_a_lost_one_and_a_key_for_all_are_not_taken(authority: Authority) -> None:
    eye = Eye(authority.tls)
    old = eye.served()
    cert, key = authority.issue()
    for name, spoil in (
        ("cert.pem", lambda path: path.write_bytes(cert[: len(cert) // 2])),
        ("cert.pem", lambda path: path.unlink()),
        ("key.pem", lambda path: path.write_bytes(key[: len(key) // 2])),
        ("key.pem", lambda path: path.chmod(0o644)),
        ("cert.pem", lambda path: path.write_bytes(authority.issue(not_after=START - timedelta(days=9))[0])),
    ):
        authority.write(cert, "cert.pem")
        authority.write(key, "key.pem")
        spoil(authority.folder / name)
        eye.look()
        assert eye.served() == old
    authority.write(key, "key.pem")
    authority.write(cert, "cert.pem")
    eye.look()
    assert eye.served() != old


def test_one_that_counts_no_longer_takes_no_place(authority: Authority) -> None:
    eye = Eye(authority.tls)
    old = eye.served()
    authority.renew(not_after=datetime.now(UTC) - timedelta(days=1))
    eye.look()
    assert eye.served() == old
    eye.now = datetime(3001, 1, 1, tzinfo=UTC)  # the one that is served has ended, too
    eye.look()
    assert eye.served() != old


def test_the_end_is_told_30_14_7_and_1_days_before_once_each(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    end = (datetime.now(UTC) + timedelta(days=90)).replace(microsecond=0)
    authority.renew(not_after=end)
    eye = Eye(authority.tls)
    said = []
    for hours in range(24 * 40, -24, -1):
        caplog.clear()
        eye.now = end - timedelta(hours=hours)
        eye.certificates.remind()
        said += [(hours, record.message) for record in caplog.records]
    assert [hours for hours, _ in said] == [30 * 24, 14 * 24, 7 * 24, 24, 0]
    assert "ends within 30 days, on " in said[0][1]
    assert "has ended on " in said[-1][1]


def test_expires_tells_the_end_and_nothing_where_there_is_none(authority: Authority) -> None:
    end = datetime(2035, 5, 6, 7, 8, 9, tzinfo=UTC)
    authority.renew(not_after=end)
    assert certificates.expires(Settings(server=Server(tls=authority.tls))) == end
    assert certificates.expires(Settings()) is None
    (authority.folder / "cert.pem").write_text("nothing")
    assert certificates.expires(Settings(server=Server(tls=authority.tls))) is None


def test_nothing_of_the_key_is_left_on_disk_or_shown(authority: Authority, tmp_path: Path) -> None:
    pair = certificates.read(authority.tls)
    pair.context()
    assert "PRIVATE" not in repr(pair)
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("cert.pem", "key.pem", "ca.pem", "tls")]


@pytest.fixture
def served(make_site: MakeSite, newest_shop: Shop, authority: Authority) -> Site:
    text = f"server:\n  tls: {{cert: {authority.tls.cert}, key: {authority.tls.key}}}\n"
    return make_site(newest_shop, extra=text).start("--workers", "2")


def handshake(at: Site, context: ssl.SSLContext, name: str | None, session: Any = None) -> tuple[bytes, Any, bool]:
    """(certificate, session, whether it was resumed) of a connection that asks /health."""
    port = urlsplit(at.url).port
    with socket.create_connection(("127.0.0.1", port), 10) as wire:  # noqa: SIM117
        with context.wrap_socket(wire, server_hostname=name, session=session) as secure:
            secure.sendall(f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            assert secure.recv(65536).startswith(b"HTTP/1.1 200")
            found = secure.getpeercert(binary_form=True)
            assert found is not None
            return found, secure.session, bool(secure.session_reused)


def test_no_handshake_fails_while_certificates_are_renewed(served: Site, authority: Authority) -> None:
    context, without_name = authority.client(), authority.client()
    without_name.check_hostname = False
    with Client(served.url, served.token()[1], verify=context) as open_one:
        assert open_one.rows("select 1") == [[1]]
        newest = b""
        session = None
        seen = set()
        for number in range(200):
            if number % 50 == 10:
                newest = authority.renew()
            found, session, _ = handshake(served, context, "localhost", session)
            seen.add(found)
            assert open_one.rows("select 1") == [[1]]
        eventually(lambda: handshake(served, context, "localhost")[0] == newest)
        eventually(lambda: handshake(served, without_name, None)[0] == newest)
        assert open_one.rows("select 1") == [[1]]
    eventually(lambda: any(line["event"] == "config.certificate_renewed" for line in served.audit()))


def test_a_session_is_resumed(make_site: MakeSite, newest_shop: Shop, authority: Authority) -> None:
    text = f"server:\n  tls: {{cert: {authority.tls.cert}, key: {authority.tls.key}}}\n"
    at = make_site(newest_shop, extra=text).start()
    context = authority.client()
    _, session, _ = handshake(at, context, "localhost")
    assert handshake(at, context, "localhost", session)[2]
    newest = authority.renew()
    eventually(lambda: handshake(at, context, "localhost")[0] == newest)
    assert handshake(at, context, "localhost", session)[0] == newest


def test_client_certificates_stand_beside_the_token(
    make_site: MakeSite, newest_shop: Shop, authority: Authority
) -> None:
    clients, strangers = trustme.CA(), trustme.CA()
    clients.cert_pem.write_to_path(authority.folder / "clients.pem")
    extra = f"server:\n  tls: {{cert: {authority.tls.cert}, key: {authority.tls.key}, "
    extra += f"client_ca: {authority.folder / 'clients.pem'}, client_certificate: "
    for wanted, without in (("required", False), ("optional", True)):
        at = make_site(newest_shop, extra=f"{extra}{wanted}}}\n")
        token = at.start().token()[1]

        def answers(ca: trustme.CA | None, text: str | None, at: Site = at) -> int | None:
            context = authority.client()
            if ca is not None:
                ca.issue_cert("a@example.org").configure_cert(context)
            try:
                with Client(at.url, text, verify=context) as a:
                    return a.call("whoami").status_code
            except httpx.HTTPError:
                return None

        assert answers(clients, token) == 200
        assert answers(clients, None) == 401
        assert answers(strangers, token) is None
        assert answers(None, token) == (200 if without else None)


def test_a_client_ca_is_checked_with_the_config(tmp_path: Path, authority: Authority) -> None:
    (authority.folder / "empty.pem").touch()
    tls = Tls(authority.tls.cert, authority.tls.key, client_ca=authority.folder / "empty.pem")
    with pytest.raises(ConfigError, match=r"the client CA .* cannot be used"):
        certificates.read(tls).context()
    init.make(tmp_path / "site", "databases: {shop: {host: /x, dbname: x}}\n")
    config = tmp_path / "site" / "config.yaml"
    config.write_text(config.read_text() + "server: {tls: {client_certificate: optional}}\n")
    with pytest.raises(ConfigError, match=r"server\.tls\.client_certificate: goes with client_ca"):
        load(config, {})


def test_a_reload_takes_other_files_and_renewed_ones_at_once(served: Site, authority: Authority) -> None:
    context = authority.client()
    other = authority.folder / "other"
    other.mkdir()
    for name in ("cert.pem", "key.pem"):
        (authority.folder / name).rename(other / name)
    wrong = served.run("config", "reload", check=False)
    assert (wrong.returncode, "cannot be used: No such file" in wrong.stderr) == (1, True)
    old, _, _ = handshake(served, context, "localhost")
    cert, key = authority.issue()
    (other / "key.pem").write_bytes(key)
    (other / "cert.pem").write_bytes(cert)
    served.config.write_text(served.config.read_text().replace("tls/", "tls/other/"))
    assert served.run("config", "reload").stdout == "changed: server\n"
    assert handshake(served, context, "localhost")[0] == ssl.PEM_cert_to_DER_cert(cert.decode()) != old
    (line,) = [line for line in served.audit() if line["event"] == "config.certificate_renewed"]
    assert line["reason"].startswith("cert, key of server.tls; cert counts until ")
    newest, newest_key = ssl.PEM_cert_to_DER_cert(cert.decode()), key
    expired, key = authority.issue(not_after=datetime.now(UTC) - timedelta(days=1))
    (other / "key.pem").write_bytes(key)
    (other / "cert.pem").write_bytes(expired)
    assert "counts from" in served.run("config", "reload", check=False).stderr
    assert handshake(served, context, "localhost")[0] == newest
    (other / "cert.pem").write_bytes(cert)
    (other / "key.pem").write_bytes(newest_key)
    with Client(served.url, served.token()[1], verify=context) as open_one:
        assert open_one.rows("select 1") == [[1]]
        ca = authority.folder / "ca.pem"
        served.config.write_text(served.config.read_text().replace("key: ", f"client_ca: {ca}, key: "))
        served.run("config", "reload")
        with pytest.raises(httpx.HTTPError):  # it has shown no certificate
            open_one.call("whoami")


def test_files_that_are_broken_keep_no_worker_from_taking_a_dead_ones_place(served: Site, authority: Authority) -> None:
    context, token = authority.client(), served.token()[1]
    newest = authority.renew()
    eventually(lambda: handshake(served, context, "localhost")[0] == newest)
    eventually(lambda: any(line["event"] == "config.certificate_renewed" for line in served.audit()))
    authority.write(b"half", "cert.pem")
    entries = served.tokens.path.read_text()
    served.tokens.path.write_text("broken: [")
    dead = children(served)
    for pid in dead:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(list(served.folder.glob("control.*.sock"))) == 2 and not set(dead) & set(children(served)))
    eventually(lambda: len([one for one in children(served) if list(served.folder.glob(f"control.{one}.*"))]) == 2)
    assert handshake(served, context, "localhost")[0] == newest
    with Client(served.url, token, verify=context) as a:
        assert a.call("whoami").status_code == 503
        served.tokens.path.write_text(entries)
        eventually(lambda: a.call("whoami").status_code == 200)
