"""A healthy installation for the doctor, and copies of it in which something can be made wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trustme

from copied import PASSWORD, Copied
from mcpctl import config, private_file
from mcpctl.audit import log as audit_log
from mcpctl.cli import init
from mcpctl.diagnosis.examine import elsewhere, examine, here
from mcpctl.diagnosis.patient import FAIL, WARN, Finding, Patient
from mcpctl.granting import Granting
from mcpctl.identity import tokens, users
from mcpctl.keyring import Keyring
from mcpctl.postgres import administrator
from mcpctl.postgres.administrator import Administrator
from mcpctl.postgres.embedded import Binaries, Cluster
from site_of_mcpctl import READER, Shop, command, keep_out

NAME = "mcp.example.org"
END = datetime(2050, 1, 1, tzinfo=UTC)
HERE_ALONE = {"program.root", "program.writable"}
"""What is so wherever tests run."""


class Ward:
    """A healthy installation, and what would be different when the doctor comes."""

    def __init__(self, folder: Path, cluster: Cluster, authority: trustme.CA) -> None:
        self.folder, self.cluster, self.authority = folder, cluster, authority
        self.config = folder / "config.yaml"
        self.changes: dict[str, Any] = {}
        self.environ: Mapping[str, str] = {"SSL_CERT_FILE": str(folder / "ca.pem")}
        self.now: Callable[[], datetime] = tokens.utcnow
        self.alone = False

    @property
    def settings(self) -> Any:
        return config.load(self.config, {}, mode=0o644)

    def file(self, name: str) -> Path:
        return self.folder / name

    def edit(self, name: str, before: str, after: str) -> None:
        text = self.file(name).read_text()
        assert before in text
        self.file(name).write_text(text.replace(before, after, 1))

    def add(self, text: str) -> None:
        self.config.write_text(f"{self.config.read_text()}{text}\n")

    def do(self, *statements: str, dbname: str = "shop") -> None:
        dsn = self.cluster.dsn_for("postgres", self.cluster.superuser_password, dbname)
        with psycopg.connect(dsn, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def log(self, now: Callable[[], datetime] = tokens.utcnow) -> audit_log.AuditLog:
        key = audit_log.read_key(self.file("audit.key"))
        return audit_log.AuditLog(self.file("audit.jsonl"), key, now, spare=self.folder)

    def note(self, event: str, now: Callable[[], datetime] = tokens.utcnow, **fields: Any) -> None:
        log = self.log(now)
        log.append(event, transport="http", **fields)
        log.close()

    def token(self, age: int = 0, **fields: Any) -> str:
        made = tokens.utcnow() - timedelta(days=age)
        wanted = {"user": "alice", "expires_at": tokens.utcnow() + timedelta(days=80), **fields}
        entry, _ = tokens.add(tokens.token_file(self.file("tokens.yaml")), tokens.Wanted(**wanted), made)
        return entry.id

    def grow_older(self, age: int) -> None:
        """alice is as old as her token."""
        with users.user_file(self.file("users.yaml")).edit() as entries:
            entries["alice"] = replace(entries["alice"], created_at=tokens.utcnow() - timedelta(days=age + 1))

    def certificate(self, *names: str, days: int = 400, authority: trustme.CA | None = None) -> None:
        end = datetime.now(UTC) + timedelta(days=days) if days != 400 else END
        issued = (authority or self.authority).issue_cert(*(names or (NAME,)), not_after=end)
        issued.cert_chain_pems[0].write_to_path(self.file("cert.pem"))
        issued.private_key_pem.write_to_path(self.file("key.pem"))
        self.file("key.pem").chmod(0o600)

    @property
    def dsns(self) -> dict[str, str]:
        file = self.file("admin.dsn")
        return administrator.by_database(file, administrator.lines(file), self.settings)

    def look(self) -> list[Finding]:
        patient = Patient(self.settings, self.dsns, None, self.now(), self.environ, units=())
        patient = replace(patient, **self.changes)
        if self.alone:  # PostgreSQL, which takes most of the time, has nothing to do with it
            bare = replace(patient, settings=replace(patient.settings, databases={}))
            return [*(found := here(patient)), *elsewhere(bare, found)]
        return examine(patient)

    def wrong(self) -> list[Finding]:
        return [one for one in self.look() if one.status in (WARN, FAIL) and one.name not in HERE_ALONE]


@dataclass
class Original:
    """The healthy installation that all others are copies of."""

    folder: Path
    cluster: Cluster
    authority: trustme.CA


@pytest.fixture(scope="session")
def original(newest: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Original]:
    with Copied.start(newest) as cluster:
        Shop(cluster)
        keep_out(cluster)
        yield Original(_healthy(tmp_path_factory.mktemp("doctor") / "site", cluster), cluster, _AUTHORITY)


_AUTHORITY = trustme.CA()


def _healthy(folder: Path, cluster: Cluster) -> Path:
    superuser = cluster.dsn_for("postgres", cluster.superuser_password, "shop")
    with psycopg.connect(superuser, autocommit=True) as connection:
        connection.execute("CREATE DATABASE team")
    here = f"host: {cluster.host}, port: {cluster.port}"
    init.make(
        folder,
        f"server: {{public_url: https://{NAME}, tls: {{cert: cert.pem, key: key.pem}}}}\n"
        "databases:\n"
        f"  shop: {{{here}, dbname: shop, user: {READER}, password_file: shop.password, default: true}}\n"
        f"  team: {{{here}, dbname: team, roles: per_user}}\n",
    )
    ward = Ward(folder, cluster, _AUTHORITY)
    _AUTHORITY.cert_pem.write_to_path(folder / "ca.pem")
    ward.certificate()
    sealed = Keyring(folder / "secret.key").seal(PASSWORD)
    private_file.create(folder / "shop.password", sealed.encode())
    private_file.create(folder / "admin.dsn", f"{superuser}\n".encode())
    people = users.user_file(folder / "users.yaml")
    users.add(people, "alice", None, tokens.utcnow())
    ward.do("CREATE TABLE things (id int)", dbname="team")
    command("--config", str(folder / "config.yaml"), "database", "harden", "team", "--apply")
    key = audit_log.read_key(folder / "audit.key")
    granting = Granting(ward.settings, Keyring(folder / "secret.key"), audit_log.installation(key))
    host = granting.logins.host("team")
    granting.applied(
        "alice", "team", lambda old: old.more("read", ("public.things",)), Administrator.of(ward.dsns, host)
    )
    ward.token()
    ward.note("config.created")
    ward.note("server.started")
    return folder


@pytest.fixture
def ward(original: Original, tmp_path: Path) -> Ward:
    shutil.copytree(original.folder, tmp_path / "site")
    return Ward(tmp_path / "site", original.cluster, original.authority)


Plant = Callable[[Ward], Any]
"""Makes a fault, and answers what takes it away from PostgreSQL, if it is there."""


def half_written(ward: Ward) -> None:
    left = ward.file(".tokens.yaml.0123456789ab.tmp")
    left.write_text("version: 1\n")
    os.utime(left, (0, 0))
