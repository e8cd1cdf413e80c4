"""Hundreds of hostile statements, from tests/corpus/attacks.yaml and refused.yaml: as a login that may only read, as
the owner of the tables, and as one that may write one of them. After each one nothing is changed, nothing is left for
the next call of the token, nobody else's row or file was told, and it took little time and few bytes.

The same eyes are turned on a login that is a superuser, and on a server whose frame ends with COMMIT: they must see it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest

import corpus
import site_of_mcpctl as site
from mcpctl.postgres import harden
from site_of_mcpctl import Client, Shop, Site

ATTACKS = corpus.attacks()
ENOUGH, ENOUGH_HONEST = 250, 80
CANARY, IN_FILE = "heron-9tR2kM-of-the-victim", "heron-4bN8wZ-of-a-file"
PASSWORD = "of those who attack"
SECONDS, BYTES = 6.0, 3 << 20
"""What one call may take: the deadline of 300 ms, a second more for our own, and a slow machine's share."""
_TOGETHER = 20
_LEAVING = ("sessions", "writes", "refused, by a function")
"""Kinds after each of which it is looked for what it left for the next call."""
_ROLES = f"""
CREATE ROLE attack_reader LOGIN PASSWORD '{PASSWORD}';
CREATE ROLE attack_owner LOGIN PASSWORD '{PASSWORD}';
CREATE ROLE attack_victim LOGIN PASSWORD 'of somebody else';
"""
_SCHEMA = f"""
CREATE SCHEMA vault AUTHORIZATION attack_victim;
GRANT CREATE, USAGE ON SCHEMA public TO attack_owner, attack_victim;
SET ROLE attack_victim;
CREATE TABLE vault.secrets (key serial PRIMARY KEY, body text NOT NULL, more text);
INSERT INTO vault.secrets (body, more) SELECT '{CANARY}', '{CANARY}' FROM generate_series(1, 20);
CREATE STATISTICS vault.both (mcv) ON body, more FROM vault.secrets;
ANALYZE vault.secrets;
SET ROLE attack_owner;
CREATE TABLE ledger (id serial PRIMARY KEY, body text);
INSERT INTO ledger (body) SELECT 'entry ' || g FROM generate_series(1, 5) g;
CREATE VIEW total AS SELECT count(*) FROM ledger;
CREATE MATERIALIZED VIEW kept AS SELECT * FROM ledger;
CREATE FUNCTION run(command text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN EXECUTE command; RETURN 'done'; END $$;
CREATE FUNCTION stubborn() RETURNS int LANGUAGE plpgsql AS $$ BEGIN LOOP BEGIN PERFORM pg_sleep(60);
  EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END $$;
CREATE FUNCTION loud(size int) RETURNS int LANGUAGE plpgsql AS
  $$ BEGIN RAISE EXCEPTION '%', repeat('x', size) USING HINT = repeat('y', size), DETAIL = repeat('z', size); END $$;
CREATE FUNCTION notices(many int) RETURNS int LANGUAGE plpgsql AS
  $$ BEGIN FOR i IN 1..many LOOP RAISE NOTICE '%', repeat('x', 10000); END LOOP; RETURN 1; END $$;
CREATE PROCEDURE wipe(INOUT word text) LANGUAGE plpgsql AS $$ BEGIN DELETE FROM ledger; END $$;
CREATE PROCEDURE commits(INOUT word text) LANGUAGE plpgsql AS $$ BEGIN COMMIT; DELETE FROM ledger; COMMIT; END $$;
RESET ROLE;
GRANT USAGE ON SCHEMA public TO PUBLIC;
GRANT SELECT ON ledger, total, kept TO attack_reader;
GRANT TEMPORARY ON DATABASE attacked TO PUBLIC;
"""
_THERE = """
SELECT 'roles', string_agg(a::text, ';' ORDER BY oid) FROM pg_authid a
UNION ALL SELECT 'members', string_agg(concat_ws(' ', roleid, member), ';' ORDER BY roleid, member)
  FROM pg_auth_members
UNION ALL SELECT 'settings', string_agg(s::text, ';' ORDER BY s::text) FROM pg_db_role_setting s
UNION ALL SELECT 'databases', string_agg(concat_ws(' ', datname, datdba, datacl), ';' ORDER BY oid) FROM pg_database
UNION ALL SELECT 'relations', string_agg(concat_ws(' ', oid, relname, relowner, relacl, relfilenode, reltablespace,
  relrowsecurity, relhastriggers, relhasrules, relreplident), ';' ORDER BY oid) FROM pg_class
  WHERE oid >= 16384 AND relnamespace NOT IN (SELECT oid FROM pg_namespace WHERE nspname ~ '^pg_(toast_)?temp_')
UNION ALL SELECT 'temporary', count(*)::text FROM pg_class WHERE relpersistence = 't'
UNION ALL SELECT 'schemas', string_agg(concat_ws(' ', nspname, nspowner, nspacl), ';' ORDER BY nspname)
  FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp_'
UNION ALL SELECT 'functions', string_agg(concat_ws(' ', oid, proname, proowner, proacl, md5(prosrc)), ';' ORDER BY oid)
  FROM pg_proc WHERE oid >= 16384 OR proacl IS NOT NULL
UNION ALL SELECT 'other objects', concat_ws(' ', (SELECT count(*) FROM pg_type), (SELECT count(*) FROM pg_trigger),
  (SELECT count(*) FROM pg_rewrite), (SELECT count(*) FROM pg_extension), (SELECT count(*) FROM pg_cast),
  (SELECT count(*) FROM pg_default_acl), (SELECT count(*) FROM pg_event_trigger), (SELECT count(*) FROM pg_publication),
  (SELECT count(*) FROM pg_subscription), (SELECT count(*) FROM pg_tablespace), (SELECT count(*) FROM pg_description),
  (SELECT count(*) FROM pg_statistic_ext), (SELECT count(*) FROM pg_policy), (SELECT count(*) FROM pg_foreign_server),
  (SELECT count(*) FROM pg_replication_slots), (SELECT count(*) FROM pg_prepared_xacts),
  (SELECT count(*) FROM pg_seclabel))
UNION ALL SELECT 'large objects', md5(string_agg(l::text, ';' ORDER BY loid, pageno)) FROM pg_largeobject l
UNION ALL SELECT 'ledger', md5(string_agg(l::text, ';' ORDER BY id)) FROM ledger l
UNION ALL SELECT 'its numbers', last_value::text || is_called FROM ledger_id_seq
UNION ALL SELECT 'secrets', md5(string_agg(s::text, ';' ORDER BY key)) FROM vault.secrets s
UNION ALL SELECT 'kept', md5(string_agg(k::text, ';' ORDER BY id)) FROM kept k
UNION ALL SELECT 'locks', count(*)::text FROM pg_locks l JOIN pg_stat_activity a USING (pid)
  WHERE l.locktype = 'advisory' AND a.usename ~ '^(attack_|mcp_)'
UNION ALL SELECT 'the victim''s session', string_agg(concat_ws(' ', pid, state), ';') FROM pg_stat_activity
  WHERE usename = 'attack_victim'
UNION ALL SELECT 'started', pg_postmaster_start_time()::text
"""
"""What no statement may change."""
_LEFT = """
SELECT session_user::text, current_user::text, (SELECT count(*) FROM pg_prepared_statements),
  (SELECT count(*) FROM pg_cursors), (SELECT count(*) FROM pg_listening_channels()),
  (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
  (SELECT count(*) FROM pg_class WHERE relnamespace = pg_my_temp_schema()),
  coalesce(current_setting('mine.own', true), 'none'),
  (SELECT md5(string_agg(name || setting, ',' ORDER BY name)) FROM pg_settings
   WHERE context IN ('user', 'superuser') AND name <> 'lc_messages')
"""
"""What a statement could leave for the next call of its token."""


@dataclasses.dataclass
class Target:
    """A server, a token that may ask it, and eyes on the database behind it that are nobody's."""

    at: Site
    client: Client
    admin: psycopg.Connection[Any]
    names: dict[str, str]
    database: str
    ignored: frozenset[str] = frozenset()

    def there(self) -> dict[str, Any]:
        found = {row[0]: row[1] for row in self.admin.execute(_THERE.encode()).fetchall()}
        found["news"] = [note.payload[:80] for note in self.admin.notifies(timeout=0)]
        found["a file"] = (self.at.shop.cluster.folder / "data" / "made.txt").exists()
        return {name: value for name, value in found.items() if name not in self.ignored}

    def call(self, tool: str, text: str) -> httpx.Response:
        named = "statement" if tool == "execute_statement" else "query"
        more = {"analyze": True} if tool == "explain_query" else {}
        params = {"name": tool, "arguments": {named: text, "database": self.database, **more}}
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})  # \\ud800 is ASCII
        return self.client.http.post(self.client.url, content=body)

    def left(self, tool: str) -> Any:
        """What the next call of the same token finds: rows, or the text of an error."""
        answer = self.call("query_database" if tool == "explain_query" else tool, _LEFT)
        result = answer.json()["result"]
        return result["content"][0]["text"] if result["isError"] else result["structuredContent"]["rows"]

    def filled(self, text: str) -> str:
        for name, value in self.names.items():
            text = text.replace(name, value)
        return text

    def attack(self, tool: str, attacks: list[corpus.Attack]) -> list[str]:
        """What was breached, and by what; [] is what has to come back. What lasts is looked for after some, what a
        connection keeps after each."""
        before, clean = self.there(), self.left(tool)
        assert isinstance(clean, list), clean
        found = []
        for first in range(0, len(attacks), _TOGETHER):
            some = attacks[first : first + _TOGETHER]
            found += [f"{tool}: {one.text[:200]!r}: {breach}" for one in some for breach in self._try(tool, one, clean)]
            there = self.there()
            changed = [f"{name}: {str(there[name])[:300]}" for name in before if there[name] != before[name]]
            found += [f"{tool}: one of {[one.text[:80] for one in some]} changed {one}" for one in changed]
            before = there
        return found

    def _try(self, tool: str, one: corpus.Attack, clean: Any) -> Iterator[str]:
        begun = time.monotonic()
        answer = self.call(tool, self.filled(one.text))
        took = time.monotonic() - begun
        if took > SECONDS:
            yield f"it took {took:.1f} s"
        if len(answer.content) > BYTES:
            yield f"it was answered with {len(answer.content)} bytes"
        if answer.status_code not in (200, 400, 413):
            yield f"it was answered {answer.status_code}"
        for told in (CANARY, IN_FILE, CANARY.encode().hex(), IN_FILE.encode().hex()):
            if told in answer.text:
                yield f"it told {told}"
        if one.kind == "hardened" and '"isError":false' in answer.text:
            yield "it ran"
        if one.kind in _LEAVING and (left := self.left(tool)) != clean:
            yield f"it left {left}, not {clean}"


def _databases(shop: Shop, name: str) -> str:
    """Lines of the config for the same database with each login."""
    text = ""
    for login, user in (("reader", "attack_reader"), ("owner", "attack_owner"), ("root", "postgres")):
        text += f"  {login}:\n    host: {shop.cluster.host}\n    port: {shop.cluster.port}\n    dbname: {name}\n"
        text += f"    user: {user}\n    password_file: {login}.password\n"
        text += "    allow_privileged_login: true\n" if login == "root" else ""
    return text


def _prepare(shop: Shop, name: str) -> dict[str, str]:
    """A database to attack, and what its statements' names stand for."""
    with psycopg.connect(shop.cluster.dsn, autocommit=True) as root:
        if root.execute("SELECT FROM pg_roles WHERE rolname = 'attack_owner'").fetchone() is None:
            root.execute(_ROLES.encode())
        root.execute(f"CREATE DATABASE {name}".encode())
    with _admin(shop, name) as admin:
        admin.execute(_SCHEMA.replace("DATABASE attacked", f"DATABASE {name}").encode())
        admin.execute(harden.script().encode())
        row = admin.execute("SELECT lo_from_bytea(0, %s::bytea)", (CANARY,)).fetchone()
        assert row is not None
        admin.execute(f"ALTER LARGE OBJECT {row[0]} OWNER TO attack_victim".encode())
    data = shop.cluster.folder / "data"
    shop.cluster._write("data/canary.txt", IN_FILE.encode())
    return {"$LARGE": str(row[0]), "$FILE": str(data / "canary.txt"), "$MADE": str(data / "made.txt")}


def _admin(shop: Shop, name: str) -> psycopg.Connection[Any]:
    dsn = shop.cluster.dsn_for("postgres", shop.cluster.superuser_password, name)
    return psycopg.connect(dsn, autocommit=True)


_EXTRA = "limits: {statement_timeout: 300ms}\n"


def _site(folder: Any, shop: Shop, name: str) -> Site:
    at = Site(folder, shop, per_user=True, database="    default: true\n" + _databases(shop, name), extra=_EXTRA)
    at.config.write_text(at.config.read_text().replace("dbname: shop\n", f"dbname: {name}\n"))
    for login, secret in (("reader", PASSWORD), ("owner", PASSWORD), ("root", shop.cluster.superuser_password)):
        (at.folder / f"{login}.password").touch(0o600)
        (at.folder / f"{login}.password").write_text(secret + "\n")
    return at


@contextlib.contextmanager
def _watched(
    shop: Shop, at: Site, name: str, names: dict[str, str], user: str = "alice"
) -> Iterator[dict[str, Target]]:
    """The server's targets, by who logs in. The victim is there too, and has said something."""
    with (
        _admin(shop, name) as admin,
        psycopg.connect(shop.cluster.dsn_for("attack_victim", "of somebody else", name), autocommit=True) as victim,
        at.client(at.token(user)[1]) as client,
    ):
        admin.execute("LISTEN news")
        victim.execute(f"SELECT '{CANARY}'".encode())
        names = {**names, "$PID": str(victim.info.backend_pid)}
        targets = {login: Target(at, client, admin, names, login) for login in ("reader", "owner", "root")}
        written = frozenset({"ledger", "its numbers", "news"})
        yield {**targets, "writer": Target(at, client, admin, names, "shop", written)}


@pytest.fixture(scope="module")
def targets(login_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    names = _prepare(login_shop, "attacked")
    at = _site(tmp_path_factory.mktemp("attacked") / "site", login_shop, "attacked")
    at.user("mallory", "mcp-tools")
    at.grant("mallory", "--table", "public.ledger", access="write")
    at.start()
    try:
        with _watched(login_shop, at, "attacked", names, "mallory") as found:
            yield found
    finally:
        at.stop()


def test_there_are_enough_attacks_and_enough_honest_questions_that_look_like_one() -> None:
    """The latter are asked, and their answers compared, by test_two_lanes.py."""
    honest = {entry.name for entry in corpus.load() if entry.file == "nervous"}
    assert len(honest) >= ENOUGH_HONEST
    assert len({one.text for one in ATTACKS}) >= ENOUGH
    assert len(ATTACKS) == len({one.text for one in ATTACKS})


KINDS = tuple(dict.fromkeys(one.kind for one in ATTACKS))
BRIEF = tuple(kind for kind in KINDS if kind != "dear" and "refused" not in kind)
"""Those that are tried in each way; the others cost time, and differ little from one way to the next."""
WAYS = (
    *(("reader", "query_database", kind) for kind in ("others", "files", "refused, by a function")),
    *(("owner", "query_database", kind) for kind in KINDS),
    *(("owner", "explain_query", kind) for kind in ("writes", "sessions")),
)
ON_BOTH = tuple(("owner", "query_database", kind) for kind in KINDS if kind != "dear")
"""What is tried on the oldest PostgreSQL, too: each kind whose functions a version may have or not."""


@pytest.mark.parametrize(
    ("login", "tool", "kind"),
    [pytest.param(*way, marks=[] if way in ON_BOTH else [pytest.mark.newest]) for way in WAYS],
)
def test_no_question_breaches_anything(targets: dict[str, Target], login: str, tool: str, kind: str) -> None:
    assert targets[login].attack(tool, [one for one in ATTACKS if one.kind == kind]) == []


@pytest.mark.parametrize("kind", [*BRIEF, "refused"])
def test_what_may_be_written_is_the_one_table_and_nothing_else(targets: dict[str, Target], kind: str) -> None:
    """But for what a function that runs anything does with the caller's rights: docs/security.md says so."""
    attacks = [one for one in ATTACKS if one.kind == kind and "run(" not in one.text]
    assert targets["writer"].attack("execute_statement", attacks) == []


# -- the eyes see ---------------------------------------------------------------------------------------------------


def test_a_superusers_login_is_seen_to_breach(targets: dict[str, Target]) -> None:
    told = [one for one in ATTACKS if one.text in ("table vault.secrets", "select pg_read_file('$FILE')")]
    found = targets["root"].attack("query_database", told)
    assert len(told) == 2
    assert any(CANARY in breach for breach in found)
    assert any(IN_FILE in breach for breach in found)


_WEAKENED = """
import inspect, sys
from mcpctl.postgres import frame, framed
frame.BEGIN, frame.END = b"BEGIN READ WRITE", b"COMMIT"
text = inspect.getsource(framed)
assert "return self._clean and self._leaves_nothing" in text
text = text.replace("return self._clean and self._leaves_nothing", "return True")
exec(compile(text, framed.__file__, "exec"), framed.__dict__)
from mcpctl.cli.main import run
sys.argv[1:] = sys.argv[4:]
run()
"""


def test_a_frame_that_commits_is_seen_to_breach(newest: Any, make_site: Any, tmp_path: Any) -> None:
    with site.shop(newest) as shop:
        names = _prepare(shop, "weak")
        at = _site(tmp_path / "site", shop, "weak")
        at.start(before=(sys.executable, "-c", _WEAKENED))
        try:
            with _watched(shop, at, "weak", names) as found:
                tried = {one.text: one for one in ATTACKS if one.kind in ("writes", "sessions")}
                for text, seen in SEEN.items():
                    breaches = found["owner"].attack("query_database", [tried[text]])
                    assert any(seen in breach for breach in breaches), (text, json.dumps(breaches))
        finally:
            at.stop()


SEEN = {
    "insert into ledger (body) values ('mine') returning id": "changed ledger",
    "select nextval('ledger_id_seq')": "changed its numbers",
    "explain analyze create table made as select 1": "changed relations",
    "explain analyze create temporary table made as select 1": "changed temporary",
    "select set_config('mine.own', 'mine', false)": "it left",
    "select run('listen mine')": "it left",
    "select pg_notify('news', 'mine')": "changed news",
}
