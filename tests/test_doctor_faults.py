"""mcpctl doctor: on a healthy installation it says nothing, and of each fault that is planted exactly that one."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme

from copied import PASSWORD
from mcpctl import keyring
from mcpctl.audit import late
from mcpctl.backup import names
from mcpctl.diagnosis import mending
from mcpctl.diagnosis.machine import UNIT
from mcpctl.identity import tokens, users
from mcpctl.identity.blocked import Block, Blocked, store
from mcpctl.keyring import Keyring
from mcpctl.postgres import administrator
from site_of_mcpctl import READER, reload
from ward import NAME, Plant, Ward, half_written

ROOT = Path(__file__).parent.parent
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")


def sql(fault: str, mend: str, dbname: str = "shop") -> Plant:
    """A fault that is made in PostgreSQL, and is taken away there."""

    @contextlib.contextmanager
    def planted(ward: Ward) -> Iterator[None]:
        ward.do(*fault.split(";"), dbname=dbname)
        try:
            yield
        finally:
            ward.do(*mend.split(";"), dbname=dbname)

    return planted


def mode(name: str, value: int) -> Plant:
    return lambda ward: ward.file(name).chmod(value)


def edited(name: str, before: str, after: str) -> Plant:
    return lambda ward: ward.edit(name, before, after)


def added(text: str) -> Plant:
    return lambda ward: ward.add(text)


def token(**fields: Any) -> Plant:
    return lambda ward: ward.token(**fields)


def disk(**fields: int) -> Plant:
    """A disk that is as real ones are but for this."""

    def statvfs(path: Path) -> Any:
        found = os.statvfs(path)
        roomy = {"f_bavail": (8 << 30) // found.f_frsize, "f_favail": 10**6, "f_flag": 0}
        real = {name: getattr(found, name) for name in ("f_frsize", "f_files")}
        return SimpleNamespace(**{**real, **roomy, **fields})

    return lambda ward: ward.changes.update(disk=statvfs)


def old_token(ward: Ward) -> None:
    ward.grow_older(400)
    ward.note("auth.ok", token=ward.token(age=400), user="alice", client_ip="127.0.0.1")


def unused_token(ward: Ward) -> None:
    ward.grow_older(60)
    ward.token(age=60)


def shared_token(ward: Ward) -> None:
    name = ward.token()
    for number in range(8):
        ward.note("auth.ok", token=name, user="alice", client_ip=f"192.0.2.{number}")


def blocked_token(ward: Ward) -> None:
    with contextlib.closing(store(ward.settings)) as state:
        Blocked(state).block({ward.token(): Block("2026-01-01T00:00:00Z", "it was used")})


def dead_socket(ward: Ward) -> None:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(ward.file("control.1.abcd.sock")))
    made.close()


def changed_log(ward: Ward) -> None:
    ward.edit("audit.jsonl", "config.created", "config.changed")


def member_of_nothing(ward: Ward) -> None:
    with users.user_file(ward.file("users.yaml")).edit() as entries:
        entries["alice"] = replace(entries["alice"], tenant="gone")


def without_grant(ward: Ward) -> None:
    lines = ward.config.read_text().splitlines(keepends=True)
    ward.config.write_text("".join(line for line in lines if not line.startswith("  shop:")))
    users.add(users.user_file(ward.file("users.yaml")), "bob", None, tokens.utcnow())


def without_databases(ward: Ward) -> None:
    ward.config.write_text(ward.config.read_text().partition("databases:")[0])
    with users.user_file(ward.file("users.yaml")).edit() as entries:
        entries["alice"] = replace(entries["alice"], grants={})


def a_unit(ward: Ward) -> None:
    ward.file("mcpctl.service").write_text("[Service]\nExecStart=/bin/true\n")
    ward.changes["units"] = (ward.folder,)


def short_password(ward: Ward) -> Any:
    ward.file("shop.password").write_text(Keyring(ward.file("secret.key")).seal("hunter2"))
    role = f"ALTER ROLE {READER} PASSWORD"
    return sql(f"{role} 'hunter2'", role + " '" + PASSWORD.replace("'", "''") + "'")(ward)


@contextlib.contextmanager
def open_hba(ward: Ward) -> Iterator[None]:
    file = ward.cluster.folder / "data" / "pg_hba.conf"
    text = file.read_text()
    file.write_text("".join(line for line in text.splitlines(keepends=True) if "mcp_logins" not in line))
    reload(ward.cluster)
    try:
        yield
    finally:
        file.write_text(text)
        reload(ward.cluster)


@contextlib.contextmanager
def running(ward: Ward, **answer: Any) -> Iterator[None]:
    """A server process that answers so, and with nothing only listens."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(ward.file("control.4711.abcd.sock")))
        made.listen(8)

        def serve() -> None:
            while True:
                try:
                    connection, _ = made.accept()
                except OSError:
                    return
                with connection:
                    if connection.recv(4096) and answer:
                        connection.sendall(json.dumps(answer).encode() + b"\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        made.shutdown(socket.SHUT_RDWR)
        thread.join(5)


STATUS = {"version": __import__("mcpctl").__version__, "url": None, "config_changed": False}


def server(**fields: Any) -> Plant:
    return lambda ward: running(ward, **({**STATUS, **fields} if fields else {}))


def later(ward: Ward, **delta: int) -> None:
    ward.now = lambda: datetime.now(UTC) + timedelta(**delta)


def environ(**values: str) -> Plant:
    return lambda ward: setattr(ward, "environ", {**ward.environ, **values})


def backups(days: float | None, *, recipient: bool = True, folder: bool = True) -> Plant:
    """A folder for backups, whose newest is so many days old."""

    def planted(ward: Ward) -> None:
        place = ward.folder / "backups"
        key = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"
        ward.add(f"backup: {{directory: {place}, recipients: [{key if recipient else ''}]}}")
        if folder:
            place.mkdir(0o700)
        if days is not None:
            for age in (days, days + 1):
                (place / names.of(tokens.utcnow() - timedelta(days=age))).touch(0o600)

    return planted


AS_BEFORE = "GRANT EXECUTE ON FUNCTION pg_export_snapshot() TO PUBLIC"
FAULTS: list[Any] = [
    # files: name → what plants it, what else it brings with it, and whether --fix mends it
    ("modes.open", mode("tokens.yaml", 0o644), True),
    ("modes.open", mode("audit.key", 0o640), True),
    ("modes.open", mode("shop.password", 0o604), True),
    ("modes.open", mode("config.yaml", 0o644), True),
    ("modes.written", mode("users.yaml", 0o666), False),
    pytest.param(
        "modes.owner", lambda ward: os.chown(ward.file("tokens.yaml"), 65534, 65534), False, marks=needs_root
    ),
    ("modes.tls-key", mode("key.pem", 0o644), True),
    ("modes.certificate", mode("cert.pem", 0o666), False),
    ("modes.no-folder", edited("config.yaml", "server: {", "server: {runtime_dir: run, "), True),
    ("modes.folder-group", lambda ward: ward.folder.chmod(0o770), False),
    ("leftovers.halves", half_written, True),
    ("leftovers.sockets", dead_socket, True),
    ("leftovers.no-reserve", lambda ward: ward.file(".reserve").unlink(), True),
    ("disk.full", disk(f_bavail=100), False),
    ("disk.low", disk(f_bavail=100_000), False),
    ("disk.inodes", disk(f_favail=7), False),
    ("disk.read-only", disk(f_flag=os.ST_RDONLY), False),
    ("backups.no-recipient", backups(0.5, recipient=False), False),
    ("backups.no-folder", backups(None, folder=False), False),
    ("backups.none", backups(None), False),
    ("backups.old", backups(2.1), False),
    ("restores.unfinished", lambda ward: ward.file(".restore").touch(0o600), False),
    ("restores.unpacked", lambda ward: ward.file(".mcpctl-restore-0123").mkdir(0o700), True),
    ("files.broken", edited("users.yaml", "version: 1", "version: 1\njunk: 1"), False),
    ("files.unknown-user", added("auth: {admin_users: [typo]}"), False),
    ("files.tenant-gone", member_of_nothing, False),
    ("files.database-gone", edited("config.yaml", "  team:", "  other:"), False),
    ("state.broken", lambda ward: ward.file("state.db").write_text("junk"), False),
    ("files.no-database", without_databases, False),
    ("administrator.owner", lambda ward: ward.changes.update(admin=ward.file("admin.dsn")), False),
    ("lockdown.on", lambda ward: ward.file("lockdown").touch(0o600), False),
    ("keys.old", lambda ward: ward.edit("secret.key", "", f"{keyring.new_key()}\n"), False),
    ("keys.broken", lambda ward: ward.file("secret.key").write_text(keyring.new_key()), False),
    ("secrets.variable", environ(PGPASSWORD="hunter2"), False),
    ("secrets.plain", lambda ward: ward.file("shop.password").write_text(PASSWORD), False),
    ("secrets.short", short_password, False),
    ("certificate.dates", lambda ward: ward.certificate(days=-1), False),
    ("certificate.ends", lambda ward: ward.certificate(days=20), False),
    ("certificate.names", lambda ward: ward.certificate("mcp.example.net"), False),
    ("certificate.chain", lambda ward: ward.certificate(authority=trustme.CA()), False),
    ("certificate.broken", lambda ward: trustme.CA().issue_cert(NAME).private_key_pem.write_to_path(
        ward.file("key.pem")), False),
    pytest.param("unit.exposed", a_unit, False, marks=needs_systemd),
    # people
    ("users.no-grants", without_grant, False),
    ("tokens.never-expire", token(expires_at=None), False),
    ("tokens.expiring", token(expires_at=datetime.now(UTC) + timedelta(days=5)), False),
    ("tokens.old", old_token, False),
    ("tokens.no-user", token(user="nobody-of-us"), False),
    ("tokens.no-database", token(databases=("elsewhere",)), False),
    ("tokens.no-canary", added("canaries: {tokens: [abcd1234]}"), False),
    ("tokens.blocked", blocked_token, False),
    ("tokens.shared", shared_token, False),
    ("tokens.unused", unused_token, False),
    # the log and the clock
    ("audit.changed", changed_log, False),
    ("audit.late", lambda ward: late.keep(ward.file("audit.jsonl"), ward.folder, "user.added", {"user": "x"}), True),
    ("clock.backwards", lambda ward: ward.note("server.stopped", lambda: tokens.utcnow() + timedelta(hours=1)), False),
    ("clock.skew", lambda ward: later(ward, minutes=10), False),
    # the running server
    ("server.silent", server(), False),
    ("server.older", server(version="0.0.1"), False),
    ("server.config-changed", server(config_changed=True), False),
    ("server.audit", server(audit="the disk is full"), False),
    ("server.kept-out", server(kept_out=["abcd1234"]), False),
    ("server.certificate", server(tls_not_after=1.0), False),
    ("server.unreachable", server(url="http://127.0.0.1:1/mcp"), False),
    # PostgreSQL
    ("database.unreachable", sql(f"ALTER ROLE {READER} NOLOGIN", f"ALTER ROLE {READER} LOGIN"), False),
    ("database.privileged", sql(f"ALTER ROLE {READER} BYPASSRLS", f"ALTER ROLE {READER} NOBYPASSRLS"), False),
    ("database.privileged", sql(f"GRANT pg_read_server_files TO {READER}",
                                f"REVOKE pg_read_server_files FROM {READER}"), False),
    ("database.can-write", sql(f"GRANT DELETE ON orders TO {READER}", f"REVOKE DELETE ON orders FROM {READER}"), False),
    ("database.functions", sql(AS_BEFORE, AS_BEFORE.replace("GRANT", "REVOKE").replace(" TO ", " FROM ")), False),
    ("database.definer", sql("CREATE FUNCTION raised() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1'",
                             "DROP FUNCTION raised()"), False),
    ("database.view", sql(f"CREATE VIEW seen AS SELECT 1 AS one; GRANT SELECT ON seen TO {READER}",
                          "DROP VIEW seen"), False),
    ("database.no-canary", added("canaries: {tables: [shop.public.nothing]}"), False),
    ("database.connections", added("limits: {connections: 5000}"), False),
    ("grants.differ", sql("REVOKE SELECT ON things FROM mcp_alice_r", "GRANT SELECT ON things TO mcp_alice_r", "team"),
     False),
    ("grants.connections", edited("config.yaml", "roles: per_user", "roles: per_user, pool: {max_per_user: 900}"),
     False),
    ("grants.hba", open_hba, False),
    ("grants.no-administrator", lambda ward: ward.changes.update(dsns={}), False),
]  # fmt: skip


def test_on_a_healthy_installation_it_says_nothing(ward: Ward) -> None:
    assert [(one.name, one.what) for one in ward.wrong()] == []
    looked = {one.name for one in ward.look() if one.status == "ok"}
    assert looked >= {
        "modes",
        "disk",
        "files",
        "keys",
        "certificate",
        "versions",
        "users",
        "tokens",
        "audit",
        "database",
    }


def test_a_backup_of_last_night_is_well(ward: Ward) -> None:
    backups(1.1)(ward)
    assert [one.what for one in ward.wrong()] == []
    assert [one.status for one in ward.look() if one.check == "backups"] == ["ok"]


@pytest.mark.parametrize(("name", "plant", "fixable"), FAULTS)
def test_of_a_planted_fault_it_names_that_one_alone_and_what_to_do(
    ward: Ward, name: str, plant: Plant, fixable: bool
) -> None:
    planted, ward.alone = plant(ward), name.partition(".")[0] not in ("database", "grants", "keys", "clock", "files")
    with planted if hasattr(planted, "__enter__") else contextlib.nullcontext():
        found = ward.wrong()
        assert {one.name for one in found} == {name}, [(one.name, one.what, one.hint) for one in found]
        assert all(one.hint for one in found)
        assert all((one.mend is not None) == fixable for one in found)
        if fixable:
            assert [one.problem for one in mending.mend(found)] == [None] * len(found)
            if name == "audit.late":  # the line that tells of it takes in those that wait
                ward.note("doctor.mended")
            assert ward.wrong() == []


def test_every_fault_has_its_line_in_the_documentation_and_no_other() -> None:
    names = {
        node.value
        for path in (ROOT / "src" / "mcpctl" / "diagnosis").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(r"[a-z-]+\.[a-z-]+", node.value) and node.value not in (UNIT, administrator.FILE)
    }
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    table = {name for cell in cells for name in re.findall(r"`([a-z-]+\.[a-z-]+)`", cell)}
    documented = {name for name in table if name != "issuer.unreachable"}
    every_checks = (".broken", ".slow")
    assert {one for one in documented if not one.endswith(every_checks)} == {
        one for one in names if not one.endswith(every_checks)
    }
    fixable = {line.split("`")[1] for line in page.splitlines() if line.endswith("| yes |")}
    assert fixable == {fault[0] for fault in FAULTS if isinstance(fault, tuple) and fault[2]}
