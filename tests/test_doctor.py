"""mcpctl doctor: each finding is made to appear, and goes away again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
import trustme

import pg
from mcpctl import keyring, private_file
from mcpctl.config_keys import Server, Settings, Tls
from mcpctl.diagnosis import certificate
from mcpctl.diagnosis.examine import examine
from mcpctl.diagnosis.patient import FAIL, OK, WARN, Check, Finding, Patient
from mcpctl.errors import Error
from mcpctl.identity import tokens, users
from mcpctl.identity.grants import Grant
from mcpctl.postgres.embedded import Binaries
from place import Place, place
from site_of_mcpctl import PASSWORD, READER, eventually, record

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
NOBODY = 65534
END = datetime(2035, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def here(newest: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Databases whose roles are per user, and one, shared, in which all log in as the shop's reader."""
    with place(tmp_path_factory.mktemp("doctor") / "site", newest) as found:
        shared = f"{{host: {found.cluster.host}, dbname: shop, user: {READER}, password_file: shared.password}}"
        text = found.config.read_text().replace("databases:\n", f"databases:\n  shared: {shared}\n")
        found.config.write_text(text)
        ring = keyring.Keyring(found.folder / "secret.key")
        private_file.create(found.folder / "shared.password", ring.seal(PASSWORD).encode())
        yield found


class Doctor:
    """The doctor of one installation, and what would change between two visits."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.environ: Mapping[str, str] = {}
        self.admin = True

    def findings(self) -> list[Finding]:
        patient = Patient(
            self.place.settings(),
            self.place.dsns if self.admin else {},
            self.place.folder / "admin.dsn",
            datetime.now(UTC),
            self.environ,
        )
        return examine(patient)

    def found(self, status: str, text: str) -> list[Finding]:
        return [one for one in self.findings() if one.status == status and text in one.what]

    def appears(self, status: str, text: str, make: Callable[[], object], mend: Callable[[], object]) -> Finding:
        """The finding is not there, is there once `make` has run, and is gone once `mend` has."""
        assert not self.found(status, text)
        make()
        try:
            found = self.found(status, text)
            assert found, (text, [one.what for one in self.findings() if one.status == status])
            assert status == OK or found[0].hint
        finally:
            mend()
        assert not self.found(status, text)
        return found[0]


@pytest.fixture
def doctor(here: Place) -> Doctor:
    return Doctor(here)


_COUNT = iter(range(1000))


@pytest.fixture
def user(here: Place) -> Iterator[str]:
    found = here.add(f"d{next(_COUNT)}")
    yield found
    here.granting().end(found, here.dsns)
    users.remove(here.users, found)


def changed(path: Path, text: str) -> Callable[[], object]:
    """Puts another content into a file."""
    return lambda: path.write_text(text)


# -- files, keys, secrets, tokens ---------------------------------------------------------------------------------


def test_a_file_that_others_may_read_fails_and_the_other_checks_go_on(doctor: Doctor, here: Place) -> None:
    file = here.folder / "tokens.yaml"
    doctor.appears(FAIL, "has mode 0644", lambda: file.chmod(0o644), lambda: file.chmod(0o600))
    assert doctor.found(OK, "logs in")


def test_a_canary_that_guards_nothing_or_is_not_seen_through_another_name_is_warned_of(
    doctor: Doctor, here: Place
) -> None:
    def of(*tables: str) -> Callable[[], object]:
        return changed(here.config, f"{was}canaries: {{tables: [{', '.join(tables)}]}}\n")

    was = here.config.read_text()
    gone = changed(here.config, was)
    with here.admin("shop") as admin:
        admin.execute('CREATE TABLE "Honey.Pot" (); CREATE VIEW honey_view AS SELECT 1')
    for name in ("shared.public.honey.pot", "shop.public.orders_"):
        doctor.appears(WARN, f"the canary {name} is no table or view there", of(name), gone)
    of("shared.public.Honey.Pot", "shop.public.honey_view")()
    try:
        assert not [one for one in doctor.findings() if "canar" in one.what]
    finally:
        gone()
    said = "alias is in PostgreSQL the same as other, whose canaries are not seen there"
    doctor.appears(WARN, said, of("other.pg_catalog.pg_class"), of("other.a.b", "alias.a.b"))
    gone()


def test_a_second_name_of_a_tenants_database_fails_by_config_or_by_what_answers(doctor: Doctor, here: Place) -> None:
    file = here.folder / "tenants.yaml"
    lost = changed(file, file.read_text())

    def of(database: str) -> Callable[[], object]:
        entry = f"{{created_at: '2026-11-20T12:00:00Z', database: {database}}}"
        return changed(file, f"version: 1\ntenants:\n  acme: {entry}\n")

    # as the server, which does not start, sees it
    found = doctor.appears(FAIL, "acme: shop and shared of the config are one", of("shop"), lost)
    assert "mend the config, or the variable MCPCTL_…" in (found.hint or "")
    doctor.appears(FAIL, "alias is in PostgreSQL the same as other", of("other"), lost)
    doctor.admin = False
    doctor.appears(WARN, "nobody could see whether another database is", of("other"), lost)


def test_a_tenants_schema_that_everybody_may_use_fails(doctor: Doctor, here: Place) -> None:
    file = here.folder / "tenants.yaml"
    text = file.read_text()
    here.do("CREATE SCHEMA north")
    file.write_text(
        "version: 1\ntenants:\n  north: {created_at: '2026-11-20T12:00:00Z', database: shop, schema: north}\n"
    )
    try:
        doctor.appears(
            FAIL, "PUBLIC may use the schema north of shop, and so may every tenant",
            lambda: here.do("GRANT USAGE ON SCHEMA north TO PUBLIC"),
            lambda: here.do("REVOKE USAGE ON SCHEMA north FROM PUBLIC"),
        )  # fmt: skip
    finally:
        file.write_text(text)
        here.do("DROP SCHEMA north")


def test_a_name_in_the_configs_lists_that_no_user_has_is_told(doctor: Doctor, here: Place, user: str) -> None:
    text = here.config.read_text()
    listed = f"auth: {{admin_users: [{user}], read_only_users: [typo]}}\n"
    doctor.appears(FAIL, "read_only_users names typo", changed(here.config, listed + text), changed(here.config, text))


def test_an_administrators_file_of_the_servers_user_is_told(doctor: Doctor, here: Place) -> None:
    file, aside = here.folder / "admin.dsn", here.folder / "aside"
    doctor.admin = False
    file.rename(aside)
    doctor.appears(WARN, "could make roles with it", lambda: aside.rename(file), lambda: file.rename(aside))
    aside.rename(file)


def test_keys_that_are_missing_wrong_or_left_over_are_told(doctor: Doctor, here: Place) -> None:
    file = here.folder / "secret.key"
    key = file.read_text()
    doctor.appears(WARN, "an old key", changed(file, f"{keyring.new_key()}\n{key}"), changed(file, key))
    doctor.appears(FAIL, "cannot be opened with any key", changed(file, keyring.new_key()), changed(file, key))
    doctor.appears(FAIL, "is no Fernet key", changed(file, "junk"), changed(file, key))
    people = here.folder / "users.yaml"
    people.chmod(0o666)  # which no reader of what is sealed there goes on with
    doctor.appears(FAIL, "is no Fernet key", changed(file, "junk"), changed(file, key))
    people.chmod(0o600)
    assert doctor.found(OK, "1 sealed passwords open")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MCPCTL_DATABASE_URL", "postgresql://u:hunter2@h/db"),
        ("MCPCTL_DATABASE_URL", "host=h password=hunter2"),
        ("PGPASSWORD", "hunter2"),
        ("MCPCTL_TOKEN", "mcp_hunter2"),
    ],
)
def test_a_secret_in_the_environment_is_named_and_not_shown(doctor: Doctor, name: str, value: str) -> None:
    def set_to(environ: dict[str, str]) -> Callable[[], object]:
        return lambda: setattr(doctor, "environ", environ)

    found = doctor.appears(WARN, f"the variable {name}", set_to({name: value}), set_to({}))
    assert "hunter2" not in f"{found.what}{found.hint}"


def test_a_url_without_a_password_is_no_secret(doctor: Doctor) -> None:
    doctor.environ = {"MCPCTL_DATABASE_URL": "postgresql://h/db", "PGPASSWORD": ""}
    assert not doctor.found(WARN, "the variable")


def test_a_password_file_in_the_open_is_named_and_not_shown(doctor: Doctor, here: Place) -> None:
    file = here.folder / "shared.password"
    sealed = file.read_text()
    found = doctor.appears(WARN, "as plain text", changed(file, PASSWORD), changed(file, sealed))
    assert str(file) in found.what
    assert PASSWORD not in f"{found.what}{found.hint}"


def test_tokens_that_never_end_or_are_nobodys_or_for_nothing_are_told(doctor: Doctor, here: Place, user: str) -> None:
    file, now = here.site.tokens, datetime.now(UTC)

    def add(**fields: object) -> Callable[[], object]:
        wanted = {"user": user, "expires_at": now + timedelta(days=1), **fields}
        return lambda: tokens.add(file, tokens.Wanted(**wanted), now)  # type: ignore[arg-type]

    def clear() -> None:
        with file.edit() as entries:
            entries.clear()

    doctor.appears(WARN, "never expire: ", add(expires_at=None), clear)
    doctor.appears(WARN, "their user is gone: ", add(user="nobody-of-us"), clear)
    doctor.appears(WARN, "for no database that there is: ", add(databases=("elsewhere",)), clear)
    earlier = tokens.Wanted(user=user, expires_at=now + timedelta(days=1))
    tokens.add(file, earlier, now - timedelta(days=1))  # an earlier user's of that name
    assert doctor.found(WARN, "their user is gone: ")
    assert doctor.found(OK, "0 are alive")
    assert here.site.run("user", "show", user, "--json").stdout.count('"tokens": 0') == 1
    clear()
    add(expires_at=now - timedelta(days=1), user="nobody-of-us")()
    assert not doctor.found(WARN, "their user is gone: ")  # a dead token's user may be gone
    clear()
    assert doctor.found(OK, "0 are alive")


# -- databases ----------------------------------------------------------------------------------------------------


def test_a_login_that_fails_or_is_a_superuser_fails(doctor: Doctor, here: Place) -> None:
    def role(change: str) -> Callable[[], None]:
        return lambda: here.do(f"ALTER ROLE {READER} {change}")

    doctor.appears(FAIL, "is not permitted to log in", role("NOLOGIN"), role("LOGIN"))
    doctor.appears(FAIL, "can become a superuser", role("SUPERUSER"), role("NOSUPERUSER"))
    doctor.appears(FAIL, "can become a superuser", role("BYPASSRLS"), role("NOBYPASSRLS"))
    assert doctor.found(OK, f"{READER} logs in: PostgreSQL")


def test_functions_definers_and_views_behind_the_privileges_are_told_until_they_are_taken(
    doctor: Doctor, here: Place
) -> None:
    here.site.run("database", "harden", "shop", "--apply")
    doctor.appears(
        WARN, "may still execute",
        lambda: here.do("GRANT EXECUTE ON FUNCTION pg_export_snapshot() TO PUBLIC"),
        lambda: here.do("REVOKE EXECUTE ON FUNCTION pg_export_snapshot() FROM PUBLIC"),
    )  # fmt: skip
    here.do("CREATE FUNCTION raised() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    doctor.appears(
        WARN, "SECURITY DEFINER",
        lambda: here.do("ALTER FUNCTION raised() SECURITY DEFINER"),
        lambda: here.do("REVOKE EXECUTE ON FUNCTION raised() FROM PUBLIC"),
    )  # fmt: skip
    here.do(
        "CREATE TABLE walled (n int)",
        "ALTER TABLE walled ENABLE ROW LEVEL SECURITY",
    )
    doctor.appears(
        WARN, "public.window_in_it reads as postgres",
        lambda: here.do("CREATE VIEW window_in_it AS SELECT n FROM walled"),
        lambda: here.do("ALTER VIEW window_in_it SET (security_invoker = true)"),
    )  # fmt: skip
    here.do("DROP TABLE walled CASCADE", "DROP FUNCTION raised()")


def test_more_connections_than_there_are_is_told(doctor: Doctor, here: Place) -> None:
    text = here.config.read_text()
    more = changed(here.config, f"{text}limits: {{connections: 5000}}\n")
    found = doctor.appears(WARN, "limits.connections is 5000", more, changed(here.config, text))
    assert found.check == "database shared"


def test_a_database_that_does_not_show_who_it_is_is_told(tmp_path: Path, certificates: Path) -> None:
    system = [binaries for binaries in pg.supported() if not binaries.bundled]
    if not system:
        pytest.skip("the PostgreSQL of the wheel has no TLS")
    ssl = (certificates / "cert.pem", certificates / "key.pem")
    with place(tmp_path / "site", system[0], tcp=True, ssl=ssl) as found:
        login = f"port: {found.cluster.port}, dbname: shop, user: {READER}, password_file: shop.password"
        found.config.write_text(f"databases:\n  shop: {{host: '127.1', sslmode: require, {login}}}\n")
        doctor = Doctor(found)
        doctor.admin = False
        assert doctor.found(WARN, "nobody checks who the other side is")
        sure = f"host: localhost, sslmode: verify-full, sslrootcert: {certificates}/ca.pem"
        found.config.write_text(f"databases:\n  shop: {{{sure}, {login}}}\n")
        assert not doctor.found(WARN, "nobody checks who the other side is")
        assert doctor.found(OK, "TLSv1.3")


# -- grants -------------------------------------------------------------------------------------------------------


def test_a_grant_that_postgresql_does_not_have_fails(doctor: Doctor, here: Place, user: str) -> None:
    here.grant(user, "write", "public.orders")
    assert doctor.found(OK, f"{user}: PostgreSQL has what is recorded")
    role = f"mcp_{user}_r"
    for text, make, mend in (
        ("lacks SELECT on public.orders", "REVOKE SELECT ON orders FROM {}", "GRANT SELECT ON orders TO {}"),
        ("has SELECT on public.customers", "GRANT SELECT ON customers TO {}", "REVOKE SELECT ON customers FROM {}"),
        ("may not log in", "ALTER ROLE {} NOLOGIN", "ALTER ROLE {} LOGIN"),
        ("has been made more than a login", "ALTER ROLE {} CREATEDB", "ALTER ROLE {} NOCREATEDB"),
        ("is a member of pg_read_all_data", "GRANT pg_read_all_data TO {}", "REVOKE pg_read_all_data FROM {}"),
        ("lacks CONNECT", "REVOKE CONNECT ON DATABASE shop FROM PUBLIC, {}",
         "GRANT CONNECT ON DATABASE shop TO PUBLIC, {}"),
    ):  # fmt: skip
        makes, mends = (lambda make=make: here.do(make.format(role))), (lambda mend=mend: here.do(mend.format(role)))
        doctor.appears(FAIL, f"{role}: {text}", makes, mends)


def test_a_grant_that_is_pending_or_for_no_database_fails(doctor: Doctor, here: Place, user: str) -> None:
    def printed() -> None:
        here.granting().printed(user, "shop", lambda old: old.more("read", ("public.orders",)))

    def forgotten() -> None:
        record(here.users, user, Grant("shop"))

    doctor.appears(FAIL, "the grant is pending", printed, forgotten)

    def elsewhere() -> None:
        record(here.users, user, Grant("gone", read=("public",)))

    def removed() -> None:
        record(here.users, user, Grant("gone"))

    doctor.appears(FAIL, f"{user} has a grant in gone, which is not in the config", elsewhere, removed)


def test_what_waits_for_its_sql_is_not_to_be_granted_again(doctor: Doctor, here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    sql: list[str] = []

    def printed() -> None:
        sql[:] = here.granting().printed(user, "shop", lambda old: old.less(None, ()))[1:]
        assert not doctor.found(WARN, f"mcp_{user}_r: is there, and no grant needs it")

    def done() -> None:
        here.psql(*sql)
        here.site.run("grant", "diff", "--user", user)

    found = doctor.appears(FAIL, "the grant is revoking", printed, done)
    assert found.hint == "have the SQL run that `mcpctl user ungrant` printed in shop; then: mcpctl grant diff"


def test_functions_that_a_users_role_alone_may_execute_are_told(doctor: Doctor, here: Place, user: str) -> None:
    here.site.run("database", "harden", "shop", "--apply")
    here.grant(user, "read", "public.orders")
    role = f"mcp_{user}_r"
    doctor.appears(
        WARN, f"{role} may still execute",
        lambda: here.do(f"GRANT EXECUTE ON FUNCTION pg_export_snapshot() TO {role}"),
        lambda: here.do(f"REVOKE EXECUTE ON FUNCTION pg_export_snapshot() FROM {role}"),
    )  # fmt: skip


def test_a_login_role_that_no_grant_needs_is_told_once_a_cluster(doctor: Doctor, here: Place) -> None:
    stray = "mcp_stray_r: is there, and no grant needs it"

    def made() -> None:
        here.do("CREATE ROLE mcp_stray_r", f"COMMENT ON ROLE mcp_stray_r IS '{here.granting().mark('stray')}'")
        told = {one.check for one in doctor.found(WARN, stray)}
        assert told == {"database shop", "database alias"}  # of one cluster, which alias's address does not say

    doctor.appears(WARN, stray, made, lambda: here.do("DROP ROLE mcp_stray_r"))


def test_without_an_administrator_it_says_what_nobody_looked_at(doctor: Doctor, here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")

    def administered(yes: bool) -> Callable[[], object]:
        return lambda: setattr(doctor, "admin", yes)

    doctor.appears(WARN, "without an administrator", administered(False), administered(True))
    doctor.admin = False
    assert doctor.found(OK, f"{user}: PostgreSQL has what is recorded")  # by the user's own login


def test_users_that_could_fill_the_database_are_told(doctor: Doctor, here: Place, user: str) -> None:
    here.grant(user, "read", "public.orders")
    text = here.config.read_text()
    many = text.replace("roles: per_user", "roles: per_user\n    pool: {max_per_user: 1000}")
    doctor.appears(WARN, "could hold 1001 connections", changed(here.config, many), changed(here.config, text))
    assert doctor.found(OK, "could hold 9 connections")


def test_a_pg_hba_that_lets_the_roles_in_is_told(doctor: Doctor, here: Place) -> None:
    file = here.cluster.folder / "data" / "pg_hba.conf"
    text = file.read_text()
    bare = "".join(line for line in text.splitlines(keepends=True) if "mcp_logins" not in line)

    def set_to(content: str) -> Callable[[], object]:
        def work() -> None:
            file.write_text(content)
            here.do("SELECT pg_reload_conf()")

        return work

    doctor.appears(WARN, "pg_hba.conf lets the login roles of mcpctl in", set_to(bare), set_to(text))
    assert doctor.found(OK, "pg_hba.conf keeps the users' login roles")


def test_a_database_that_is_down_fails_and_says_so(doctor: Doctor, here: Place) -> None:
    doctor.appears(FAIL, "No such file", here.cluster.stop_server, here.cluster.start_server)
    eventually(lambda: psycopg.connect(here.cluster.dsn).close() is None)


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command_exits_one_only_where_something_is_wrong(here: Place) -> None:
    good = here.site.run("doctor", "--json")
    told = json.loads(good.stdout)
    assert told["ok"] is True
    assert {one["check"] for one in told["findings"]} >= {"files", "keys", "program", "tokens", "database shop"}
    file = here.folder / "users.yaml"
    file.chmod(0o644)
    bad = here.site.run("doctor", "--json", check=False)
    file.chmod(0o600)
    assert (bad.returncode, json.loads(bad.stdout)["ok"]) == (1, False)
    assert here.site.run("doctor").stdout.count("\n") == len(told["checks"])


@needs_root
def test_who_could_change_the_program_is_told(here: Place) -> None:
    assert "the server runs as root" in here.site.run("doctor").stdout
    everything = [here.folder, *(path for path in here.folder.iterdir() if path.name != "admin.dsn")]
    text = here.config.read_text()
    for path in everything:
        os.chown(path, NOBODY, NOBODY)
    try:
        for folder in here.folder.parents:
            if not folder.stat().st_mode & 0o001:
                folder.chmod(0o755)
        shown = here.site.run("doctor").stdout
        assert "the server runs as root" not in shown
        assert "the user that serves cannot change the program" in shown
        here.config.write_text(f"{text}\nbogus: 1\n")
        broken = here.site.run("doctor", check=False).stdout
        assert ("bogus" in broken, "sudo mcpctl doctor" in broken) == (True, False)
    finally:
        here.config.write_text(text)
        for path in everything:
            os.chown(path, 0, 0)


def test_a_certificate_of_six_days_is_warned_of_when_it_ought_to_have_been_renewed(tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("localhost", not_before=END - timedelta(days=6), not_after=END)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(cert)
    key.touch(0o600)
    issued.private_key_pem.write_to_path(key)
    settings = Settings(server=Server(tls=Tls(cert, key)))
    for left, status in ((3, OK), (1, WARN)):
        patient = Patient(settings, {}, None, END - timedelta(days=left), {})
        assert next(iter(certificate.certificate(patient))).status == status


def test_the_certificate_is_looked_at(tmp_path: Path) -> None:
    issued, other = trustme.CA().issue_cert("localhost", not_after=END), trustme.CA().issue_cert("localhost")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(cert)
    key.touch(0o600)
    settings = Settings(server=Server(tls=Tls(cert, key)))

    def found(now: datetime, right: bool = True) -> Finding:
        (issued if right else other).private_key_pem.write_to_path(key)
        patient = Patient(settings, {}, None, now, {})
        try:
            return next(iter(certificate.certificate(patient)))
        except Error as problem:
            return Check("certificate").broken(problem)

    assert found(END - timedelta(days=31)).status == OK
    assert (found(END - timedelta(days=29)).status, found(END).what) == (WARN, f"{cert} ends on {END.date()}")
    assert "clients refuse it" in found(END + timedelta(days=1)).what
    assert found(END + timedelta(days=1)).status == found(datetime(1990, 1, 1, tzinfo=UTC)).status == FAIL
    assert "cannot be used" in found(END - timedelta(days=31), right=False).what
