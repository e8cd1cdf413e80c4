"""A place for grants: a cluster of its own with the shop in it, and an installation whose roles are per user."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg

import site_of_mcpctl as site
from copied import Copied
from mcpctl import config
from mcpctl.audit import log as audit_log
from mcpctl.granting import Granting
from mcpctl.identity import users
from mcpctl.identity.grants import Grant, parse
from mcpctl.keyring import Keyring
from mcpctl.postgres import administrator
from mcpctl.postgres.administrator import Administrator
from mcpctl.postgres.embedded import Binaries, Cluster

_ITEMS = "ARRAY(SELECT i::text FROM unnest({acl}) i ORDER BY 1)"
CATALOG = {
    "roles": "SELECT rolname, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication,"
    " rolbypassrls, rolconnlimit, rolconfig FROM pg_roles WHERE rolname !~ '^pg_'",
    "members": "SELECT roleid::regrole::text, member::regrole::text, admin_option FROM pg_auth_members",
    "settings": "SELECT setdatabase, setrole::regrole::text, setconfig FROM pg_db_role_setting",
    "relations": f"SELECT oid::regclass::text, {_ITEMS.format(acl='relacl')} FROM pg_class WHERE relacl IS NOT NULL",
    "columns": "SELECT attrelid::regclass::text, attname, attacl::text FROM pg_attribute WHERE attacl IS NOT NULL",
    "schemas": f"SELECT nspname, {_ITEMS.format(acl='nspacl')} FROM pg_namespace",
    "databases": f"SELECT datname, {_ITEMS.format(acl='datacl')} FROM pg_database",
    "defaults": "SELECT defaclrole::regrole::text, defaclnamespace::regnamespace::text, defaclobjtype::text,"
    f" {_ITEMS.format(acl='defaclacl')} FROM pg_default_acl",
    "dependencies": "SELECT dbid, classid::regclass::text, refobjid::regrole::text, deptype::text, count(*)"
    " FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND refobjid::regrole::text ~ 'mcp_'"
    " AND classid <> 'pg_auth_members'::regclass GROUP BY 1, 2, 3, 4",
    "comments": "SELECT objoid::regrole::text, description FROM pg_shdescription"
    " WHERE classoid = 'pg_authid'::regclass",
}
"""What a grant can change, as sets: the order of an acl says nothing."""


class Place:
    """One cluster with the databases shop and other, and the files of an installation that knows them as shop, other
    and, by another name of the same host, alias."""

    def __init__(self, folder: Path, cluster: Cluster, extra: str = "") -> None:
        self.shop = site.Shop(cluster)
        self.cluster = cluster
        site.keep_out(cluster)
        with self.admin() as connection:
            connection.execute("CREATE DATABASE other")
        with self.admin("other") as connection:
            connection.execute("CREATE TABLE things (id int GENERATED ALWAYS AS IDENTITY, what text)")
        link = folder.with_name(f"{folder.name}-host")
        link.symlink_to(cluster.host)
        named = "".join(
            f"  {name}:\n    host: {host}\n    port: {cluster.port}\n    dbname: {dbname}\n    roles: per_user\n"
            for name, host, dbname in (("other", cluster.host, "other"), ("alias", link, "other"))
        )
        self.site = site.Site(folder, self.shop, extra=extra, database=named, per_user=True)
        with (folder / "admin.dsn").open("a") as file:
            file.write(f"alias: {self.site.admin_dsn()}\n")
        self.config = self.site.config
        self.users = users.user_file(folder / "users.yaml")
        self.folder = folder

    def admin(self, dbname: str = "shop") -> psycopg.Connection[tuple[Any, ...]]:
        cluster = self.cluster
        return psycopg.connect(cluster.dsn_for("postgres", cluster.superuser_password, dbname), autocommit=True)

    def settings(self) -> Any:
        return config.load(self.config, {})

    def granting(self) -> Granting:
        found = self.settings()
        key = audit_log.read_key(found.audit.key_file)
        return Granting(found, Keyring(found.keyring.file), audit_log.installation(key))

    @property
    def dsns(self) -> dict[str, str]:
        file = self.folder / "admin.dsn"
        return administrator.by_database(file, administrator.lines(file), self.settings())

    def who(self, database: str = "shop") -> Administrator:
        return Administrator.of(self.dsns, self.granting().logins.host(database))

    def add(self, user: str) -> str:
        users.add(self.users, user, None, datetime.now(UTC))
        return user

    def grant(self, user: str, access: str, *targets: str, database: str = "shop") -> Grant:
        """What `user grant --apply` does."""
        wanted = tuple(one if one == "*" else str(parse(one)) for one in targets or ("*",))
        return self.granting().applied(user, database, lambda old: old.more(access, wanted), self.who(database))

    def ungrant(self, user: str, access: str | None = None, *targets: str, database: str = "shop") -> Grant:
        """What `user ungrant --apply` does."""
        named = tuple(one if one == "*" else str(parse(one)) for one in targets)
        return self.granting().applied(user, database, lambda old: old.less(access, named), self.who(database))

    def recorded(self, user: str, database: str = "shop") -> Grant | None:
        return users.user_file(self.users.path).current()[user].grants.get(database)

    def disagreements(self, user: str, database: str = "shop") -> list[str]:
        """What `grant diff` says of that user there."""
        found, grant = self.granting(), self.recorded(user, database)
        return found.disagreements(found.user(user), grant or Grant(database), self.dsns)

    def password(self, user: str, access: str = "read", database: str = "shop") -> str:
        grant = self.recorded(user, database)
        assert grant is not None
        return Keyring(self.folder / "secret.key").open(grant.passwords[access], "a password")

    def connect(self, user: str, access: str = "read", database: str = "shop") -> psycopg.Connection[tuple[Any, ...]]:
        """As that user's own login role, with the password that is sealed."""
        role = f"mcp_{user}_{access[0]}"
        dbname = "shop" if database == "shop" else "other"
        dsn = self.cluster.dsn_for(role, self.password(user, access, database), dbname)
        return psycopg.connect(dsn, autocommit=True)

    def catalog(self, dbname: str = "shop") -> dict[str, list[str]]:
        with self.admin(dbname) as connection:
            return {
                name: sorted(str(row) for row in connection.execute(query.encode()).fetchall())
                for name, query in CATALOG.items()
            }

    def query(self, query: str, *parameters: Any, dbname: str = "shop") -> list[tuple[Any, ...]]:
        with self.admin(dbname) as connection:
            return connection.execute(query.encode(), parameters or None).fetchall()

    def do(self, *statements: str, dbname: str = "shop") -> None:
        with self.admin(dbname) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def psql(self, script: str, dbname: str = "shop") -> None:
        """Run a script as a DBA would: psql where there is one, else by the same simple protocol."""
        cluster = self.cluster
        program = shutil.which("psql")
        if program is None:
            self.do(script, dbname=dbname)
            return
        done = subprocess.run(
            [program, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", "-"],
            input=script, capture_output=True, text=True, timeout=60,
            env={
                "PGHOST": cluster.host, "PGPORT": str(cluster.port), "PGUSER": "postgres", "PGDATABASE": dbname,
                "PGPASSWORD": cluster.superuser_password, "PGCLIENTENCODING": "LATIN1",  # the script says its own
            },
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), done.stderr

    def close(self) -> None:
        self.shop.close()

    @contextlib.contextmanager
    def held_up(self) -> Iterator[None]:
        """Whoever sets default privileges in the shop waits, in the middle of its transaction, until this ends."""
        self.do(
            "CREATE FUNCTION hold_up() RETURNS event_trigger LANGUAGE plpgsql AS"
            " $$BEGIN PERFORM pg_catalog.pg_advisory_xact_lock(4711); END$$",
            "CREATE EVENT TRIGGER hold_up ON ddl_command_end WHEN TAG IN ('ALTER DEFAULT PRIVILEGES')"
            " EXECUTE FUNCTION hold_up()",
        )
        try:
            with self.admin() as holder:
                holder.execute("SELECT pg_advisory_lock(4711)")
                yield
        finally:
            self.do("DROP EVENT TRIGGER hold_up", "DROP FUNCTION hold_up()")

    def waiting(self) -> list[int]:
        """The pids of those who are held up."""
        rows = self.query("SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = 4711")
        return [row[0] for row in rows]


@contextlib.contextmanager
def place(folder: Path, binaries: Binaries, extra: str = "", **options: Any) -> Iterator[Place]:
    with Copied.start(binaries, **options) as cluster:
        try:
            with contextlib.closing(Place(folder, cluster, extra)) as found:
                yield found
        except BaseException:
            print(cluster.log()[-4000:])
            raise
