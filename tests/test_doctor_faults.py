"""mcpctl doctor: on a healthy installation it says nothing, and of each fault that is planted exactly that one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import trustme

from copied import PASSWORD, Copied
from mcpctl import config, keyring, private_file
from mcpctl.audit import late
from mcpctl.audit import log as audit_log
from mcpctl.cli import init
from mcpctl.diagnosis import mending
from mcpctl.diagnosis.examine import elsewhere, examine, here
from mcpctl.diagnosis.patient import FAIL, SKIP, WARN, Finding, Patient
from mcpctl.granting import Granting
from mcpctl.identity import tokens, users
from mcpctl.identity.blocked import Block, Blocked, store
from mcpctl.keyring import Keyring
from mcpctl.postgres import administrator
from mcpctl.postgres.administrator import Administrator
from mcpctl.postgres.embedded import Binaries, Cluster
from site_of_mcpctl import READER, Shop, command, keep_out, reload

ROOT = Path(__file__).parent.parent
NAME = "mcp.example.org"
END = datetime(2050, 1, 1, tzinfo=UTC)
HERE_ALONE = {"program.root", "program.writable"}
"""What is so wherever tests run."""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")


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


@pytest.fixture(scope="module")
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


def half_written(ward: Ward) -> None:
    left = ward.file(".tokens.yaml.0123456789ab.tmp")
    left.write_text("version: 1\n")
    os.utime(left, (0, 0))


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


# -- much at once, and the command itself ----------------------------------------------------------------------------


def doctor(ward: Ward, *arguments: str, **environ: str) -> tuple[int, Any]:
    """Exit code and answer of `mcpctl doctor --json`."""
    done = command("--config", str(ward.config), "doctor", "--json", *arguments, env={**ward.environ, **environ})
    return done.returncode, json.loads(done.stdout)


def test_with_much_broken_at_once_each_is_told_once_and_the_rest_is_looked_at(ward: Ward) -> None:
    ward.file("tokens.yaml").chmod(0o644)
    ward.file("state.db").write_text("junk")
    ward.file("lockdown").touch(0o600)
    ward.file(".reserve").unlink()
    ward.file("audit.key").write_text("junk")
    ward.edit("config.yaml", f"user: {READER}", "user: nobody_of_us")
    found = ward.wrong()
    assert {one.name for one in found} == {
        "modes.open", "state.broken", "lockdown.on", "leftovers.no-reserve", "audit.broken", "database.unreachable",
    }  # fmt: skip
    assert len(found) == 6


def test_a_check_that_hangs_is_left_and_says_so(ward: Ward) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        text = re.sub(r"databases:.*", "", ward.config.read_text(), flags=re.DOTALL)
        ward.config.write_text(
            f"{text}databases: {{mute: {{host: 127.0.0.1, port: {silent.getsockname()[1]}, user: u}}}}"
        )
        found = elsewhere(Patient(ward.settings, {}, None, ward.now(), ward.environ), patience=0.3)
    assert [(one.name, one.status) for one in found if one.status != SKIP] == [("database.slow", FAIL)]


def test_a_fault_of_a_check_is_told_as_one(ward: Ward) -> None:
    ward.changes["disk"] = lambda path: 1 / 0
    (found,) = ward.wrong()
    assert (found.name, found.status) == ("disk.broken", FAIL)
    assert "ZeroDivisionError" in found.what


def test_the_command_says_it_as_documented_and_exits_one_where_something_is_wrong(ward: Ward) -> None:
    code, told = doctor(ward)
    assert (code, told["ok"], told["mended"]) == (0, True, [])
    assert {one["status"] for one in told["checks"]} <= {"ok", "skipped", "warning"}
    assert all(one.keys() == {"name", "check", "status", "message", "hint", "fixable"} for one in told["checks"])
    ward.file("lockdown").touch(0o600)
    code, told = doctor(ward)
    assert (code, told["ok"]) == (1, False)
    (locked,) = [one for one in told["checks"] if one["status"] == "failed"]
    assert (locked["name"], locked["check"], locked["fixable"]) == ("lockdown.on", "lockdown", False)
    assert locked["hint"] == "mcpctl lockdown --lift"


def test_fix_mends_writes_down_what_it_did_and_a_second_one_has_nothing_to_do(ward: Ward) -> None:
    for name in ("config.yaml", "admin.dsn", "tokens.yaml"):
        ward.file(name).chmod(0o644)
    half_written(ward)
    code, told = doctor(ward)
    assert code == 1
    fixable = {one["message"].split(" ")[0] for one in told["checks"] if one["fixable"]}
    assert {str(ward.file(name)) for name in ("config.yaml", "admin.dsn", "tokens.yaml")} <= fixable
    code, told = doctor(ward, "--fix")
    assert (code, told["ok"]) == (0, True)
    assert sorted(one["name"] for one in told["mended"]) == ["leftovers.halves", *["modes.open"] * 3]
    assert not any(one["problem"] for one in told["mended"])
    lines = map(json.loads, ward.file("audit.jsonl").read_text().splitlines())
    reasons = [line["reason"] for line in lines if line["event"] == "doctor.mended"]
    assert len(reasons) == 4
    assert any(f"chmod 0600 {ward.file('tokens.yaml')}; by " in one for one in reasons)
    assert ward.config.stat().st_mode & 0o777 == 0o640
    code, told = doctor(ward, "--fix")
    assert (code, told["mended"]) == (0, [])


def test_fix_trusts_nothing_that_others_could_have_written(ward: Ward) -> None:
    users_file, tokens_file = ward.file("users.yaml"), ward.file("tokens.yaml")
    users_file.chmod(0o662)
    os.link(tokens_file, ward.file("another name"))
    tokens_file.chmod(0o644)
    code, told = doctor(ward, "--fix")
    assert code == 1
    assert users_file.stat().st_mode & 0o777 == 0o662
    assert tokens_file.stat().st_mode & 0o777 == 0o644
    assert [one["problem"] is None for one in told["mended"]] == [False]
    assert "mended" not in ward.file("audit.jsonl").read_text()


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (lambda ward: ward.config.unlink(), "config.broken"),
        (lambda ward: ward.config.write_text("a: ["), "config.broken"),
        (lambda ward: ward.config.chmod(0o666), "modes.written"),
        (lambda ward: ward.folder.chmod(0o777), "modes.folder"),
        (lambda ward: ward.add("junk: 1"), "config.broken"),
        (lambda ward: ward.file("admin.dsn").write_text("nonsense"), "administrator.broken"),
        (lambda ward: ward.file("admin.dsn").chmod(0o666), "modes.written"),
    ],
)
def test_what_cannot_be_read_at_all_is_told_and_does_not_stop_it(ward: Ward, plant: Plant, name: str) -> None:
    plant(ward)
    code, told = doctor(ward)
    assert (code, told["ok"]) == (1, False)
    assert [one["name"] for one in told["checks"] if one["status"] == "failed"] == [name]
    assert [one for one in told["checks"] if one["name"] == "versions"]


def test_of_a_server_that_runs_it_asks_what_a_client_would(ward: Ward, original: Original) -> None:
    """With its own certificate; then that one is renewed, and calls are locked out."""
    from site_of_mcpctl import UNLIMITED, _commands, environment

    text = re.sub(r"server: .*\n", "server: {tls: {cert: cert.pem, key: key.pem}}\n", ward.config.read_text())
    ward.config.write_text(text)
    ward.certificate("127.0.0.1")
    started = _commands().start(["--config", str(ward.config), "serve", "--port", "0"], environment(**UNLIMITED))
    try:
        assert started.stderr is not None
        assert any(line.startswith("serving at https://") for line in started.stderr)
        assert ward.wrong() == []
        assert [one.what for one in ward.look() if "is up and ready" in one.what]
        ward.environ = {}
        assert {one.name for one in ward.wrong()} == {"certificate.chain", "server.tls"}
        ward.environ = {"SSL_CERT_FILE": str(ward.file("ca.pem"))}
        ward.file("lockdown").touch(0o600)
        assert {one.name for one in ward.wrong()} == {"lockdown.on", "server.not-ready"}
    finally:
        started.kill()
        started.wait()
        started.stderr.close()
