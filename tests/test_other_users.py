"""Users who must not meet: alice tries everything to see one row of bob's, and everything that could let her.

`tests/corpus/other_users.yaml` holds what she tries. Whatever PostgreSQL makes of a statement, bob's row is in no
answer and in no error, and nothing of the statement is there in her next call.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

import corpus
import site_of_mcpctl as site
from corpus import Statement
from mcpctl import config, keyring
from mcpctl.identity import users
from mcpctl.identity.users import User
from mcpctl.postgres.logins import Logins
from site_of_mcpctl import Client, Shop, Site

STATEMENTS = corpus.statements("other_users")
CANARY = "heron-5vQ7xW-of-bob"
TOOLS = {"query": ("query_database", "query"), "execute": ("execute_statement", "statement")}
NOT_RUN = ("so it is no question, and was not run", "would not PREPARE this statement", "so it was rolled back")

BOB = f"""
GRANT TEMPORARY ON DATABASE shop TO PUBLIC; -- as PostgreSQL has it, and the demo has not
CREATE SCHEMA bob_data;
CREATE TABLE bob_data.secrets (key serial PRIMARY KEY, body text NOT NULL, body2 text, shared boolean DEFAULT false);
INSERT INTO bob_data.secrets (body, body2) SELECT '{CANARY}', '{CANARY}' FROM generate_series(1, 20);
INSERT INTO bob_data.secrets (body, body2, shared) VALUES ('said to all', 'said to all', true);
CREATE STATISTICS bob_data.both_bodies (mcv) ON body, body2 FROM bob_data.secrets;
CREATE TABLE bob_data.parted (key int, body text) PARTITION BY LIST (key);
CREATE TABLE bob_data.part_one PARTITION OF bob_data.parted FOR VALUES IN (1);
INSERT INTO bob_data.parted VALUES (1, '{CANARY}');
CREATE VIEW bob_data.shown AS SELECT body FROM bob_data.secrets;
CREATE MATERIALIZED VIEW bob_data.kept AS SELECT body FROM bob_data.secrets;
CREATE FUNCTION bob_data.told() RETURNS text LANGUAGE sql STABLE AS 'SELECT body FROM bob_data.secrets LIMIT 1';
ANALYZE bob_data.secrets, bob_data.parted;
"""
ALICE = """
CREATE SCHEMA alice_data;
CREATE TABLE alice_data.notes (id serial PRIMARY KEY, body text, secret int REFERENCES bob_data.secrets (key));
INSERT INTO alice_data.notes (body) VALUES ('mine'), ('mine too');
CREATE TABLE alice_data.plain (id serial PRIMARY KEY, body text);
INSERT INTO alice_data.plain (body) VALUES ('plain');
CREATE VIEW alice_data.through WITH (security_invoker) AS SELECT * FROM bob_data.secrets;
CREATE VIEW alice_data.walled WITH (security_barrier) AS SELECT key, body FROM bob_data.secrets WHERE shared;
CREATE TABLE alice_data.ruled (id int, body text);
INSERT INTO alice_data.ruled VALUES (1, 'ruled');
ALTER TABLE alice_data.ruled ENABLE ROW LEVEL SECURITY;
CREATE POLICY asks_bob ON alice_data.ruled USING (EXISTS (SELECT FROM bob_data.secrets s WHERE s.body LIKE 'h%'));
CREATE FUNCTION alice_data.told() RETURNS text LANGUAGE plpgsql STABLE AS
  $$ BEGIN RETURN (SELECT body FROM bob_data.secrets LIMIT 1); END $$;
CREATE FUNCTION alice_data.run(command text) RETURNS text LANGUAGE plpgsql AS
  $$ DECLARE found text; BEGIN EXECUTE command INTO found; RETURN found; END $$;
CREATE FUNCTION alice_data.does(command text) RETURNS text LANGUAGE plpgsql AS
  $$ BEGIN EXECUTE command; RETURN 'done'; END $$;
CREATE FUNCTION alice_data.leak(body text) RETURNS boolean LANGUAGE plpgsql COST 0.0001 AS
  $$ BEGIN RAISE EXCEPTION 'it is %', body; END $$;
"""
LEFT = """
SELECT session_user::text, current_user::text, current_setting('role'), current_setting('session_authorization'),
  current_setting('search_path'), current_setting('statement_timeout'), current_setting('row_security'),
  current_setting('default_transaction_read_only'), coalesce(current_setting('mine.own', true), 'none'),
  (SELECT count(*) FROM pg_prepared_statements), (SELECT count(*) FROM pg_cursors),
  (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
  (SELECT count(*) FROM pg_class WHERE relnamespace = pg_my_temp_schema()),
  (SELECT count(*) FROM pg_listening_channels())
"""
"""What a statement could leave for the next call of its token."""
THERE = """
SELECT 'roles', coalesce(string_agg(concat_ws(' ', rolname, rolsuper, rolcreaterole, rolcreatedb, rolreplication,
  rolbypassrls, rolcanlogin, rolpassword, rolconnlimit), '; ' ORDER BY rolname), '') FROM pg_authid
UNION ALL SELECT 'settings', coalesce(string_agg(s::text, '; ' ORDER BY s::text), '') FROM pg_db_role_setting s
UNION ALL SELECT 'members', coalesce(string_agg(concat_ws(' ', roleid, member), '; ' ORDER BY roleid, member), '')
  FROM pg_auth_members
UNION ALL SELECT 'relations', string_agg(concat_ws(' ', c.relname, c.relowner, c.relacl, c.relrowsecurity), '; '
  ORDER BY c.oid) FROM pg_class c WHERE c.relpersistence <> 't' AND c.oid >= 16384 AND c.relkind <> 't'
UNION ALL SELECT 'schemas', string_agg(concat_ws(' ', nspname, nspowner, nspacl), '; ' ORDER BY nspname)
  FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp_'
UNION ALL SELECT 'functions', string_agg(concat_ws(' ', oid, proname, proowner, prosecdef, proacl), '; ' ORDER BY oid)
  FROM pg_proc WHERE oid >= 16384 AND pronamespace <> ALL (SELECT oid FROM pg_namespace WHERE nspname ~ '^pg_temp_')
UNION ALL SELECT 'rules', count(*)::text FROM pg_rewrite
UNION ALL SELECT 'triggers', count(*)::text FROM pg_trigger
UNION ALL SELECT 'defaults', coalesce(string_agg(d::text, '; ' ORDER BY oid), '') FROM pg_default_acl d
UNION ALL SELECT 'slots', count(*)::text FROM pg_replication_slots
UNION ALL SELECT 'prepared', count(*)::text FROM pg_prepared_xacts
UNION ALL SELECT 'large objects', string_agg(m::text, '; ' ORDER BY oid) FROM pg_largeobject_metadata m
UNION ALL SELECT 'secrets', md5(string_agg(s::text, '; ' ORDER BY key)) FROM bob_data.secrets s
UNION ALL SELECT 'sequence', last_value::text FROM bob_data.secrets_key_seq
UNION ALL SELECT 'bob', string_agg(concat_ws(' ', pid, state, query), '; ') FROM pg_stat_activity
  WHERE usename = 'mcp_bob_w' AND query LIKE '%pg_sleep(3600)%'
"""
"""What no statement of hers may change."""


def _traces(secret: str) -> list[str]:
    """A text, and what of it would be left in hex or in base64, wherever it starts."""
    raw = secret.encode()
    inner = [base64.b64encode(raw[start:])[:-4].decode() for start in range(3)]
    return [secret, raw.hex(), *inner]


TRACES = _traces(CANARY)


def _told(text: str) -> list[str]:
    return [trace for trace in TRACES if trace.lower() in text.lower()]


@dataclass
class Walls:
    """A site whose roles are per user, with alice, her two tokens, and bob, who has a session of his own."""

    at: Site
    major: int
    clients: tuple[Client, Client]
    admin: psycopg.Connection[Any]
    bob: psycopg.Connection[Any]
    names: dict[str, str]

    def there(self) -> dict[str, str]:
        return {row[0]: row[1] for row in self.admin.execute(THERE.encode()).fetchall()}

    def left(self, tool: str) -> list[Any]:
        """What her next calls of a tool find: that of the same token, and that of her other one."""
        return [_answer(client, tool, LEFT)["rows"] for client in self.clients]


def _answer(client: Client, tool: str, statement: str) -> Any:
    name, argument = TOOLS[tool]
    answer = client.call(name, {argument: statement}).json()["result"]
    assert not answer["isError"], answer["content"][0]["text"]
    return answer["structuredContent"]


def _end(client: Client, tool: str, statement: str) -> tuple[str, str]:
    """(how it ended, the whole answer) of a statement."""
    name, argument = TOOLS[tool]
    answer = client.call(name, {argument: statement})
    if answer.status_code != 200:
        return str(answer.status_code), answer.text
    result = answer.json()["result"]
    text: str = result["content"][0]["text"]
    if not result["isError"]:
        return "rows", answer.text
    if any(words in text for words in NOT_RUN):
        return "none", answer.text
    states = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("SQLSTATE: ")]
    return (states[0] if states else text), answer.text


def _people(at: Site) -> dict[str, User]:
    return dict(users.user_file(at.folder / "users.yaml").current())


def _dsn(at: Site, name: str, access: str) -> str:
    """The connection string of a user's own login role, as the server has it."""
    settings = config.load(at.config, at.limits)
    logins = Logins(settings.databases, keyring.Keyring(settings.keyring.file))
    return logins.of_user(name, _people(at)[name].grants["shop"], "shop", access).dsn()


@pytest.fixture(scope="session")
def walls(login_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walls]:
    other = f"    default: true\n  hr:\n    host: {login_shop.cluster.host}\n    port: {login_shop.cluster.port}\n"
    other += "    dbname: postgres\n    roles: per_user\n"
    at = Site(tmp_path_factory.mktemp("walls") / "site", login_shop, per_user=True, database=other)
    at.edit_user("alice", roles=("mcp-tools",))
    with login_shop.admin() as admin:
        admin.execute(BOB + ALICE)
    at.grant("alice", "--schema", "alice_data")
    at.grant("alice", "--table", "alice_data.notes", access="write")
    at.grant("bob", "--schema", "bob_data", access="write")
    at.run("database", "harden", "shop", "--apply")
    at.start()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(at.client(at.token("alice")[1])) for _ in range(2)]
        bob = stack.enter_context(contextlib.closing(psycopg.connect(_dsn(at, "bob", "write"), autocommit=True)))
        with login_shop.admin() as admin:
            large = admin.execute("SELECT lo_from_bytea(0, %s::bytea)", (CANARY,)).fetchone()
            assert large is not None
            admin.execute(f"ALTER LARGE OBJECT {large[0]} OWNER TO mcp_bob_w")
        bob.execute("SET statement_timeout = 0")
        bob.execute(f"CREATE TEMPORARY TABLE held AS SELECT '{CANARY}' AS body")
        temp = bob.execute("SELECT pg_my_temp_schema()::regnamespace::text").fetchone()
        assert temp is not None
        pid = bob.info.backend_pid
        bob.pgconn.send_query(f"SELECT '{CANARY}', pg_sleep(3600)".encode())
        names = {"$BOB_PID": str(pid), "$TEMP": temp[0], "$LARGE": str(large[0])}
        looking = stack.enter_context(login_shop.admin())
        try:
            yield Walls(at, login_shop.cluster.version[0], (clients[0], clients[1]), looking, bob, names)
        finally:
            with login_shop.admin() as admin:
                admin.execute("SELECT pg_terminate_backend(%s)", (pid,))
            at.stop()


@pytest.fixture(scope="module")
def before(walls: Walls) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """What her calls find, and what is there, before she tries anything."""
    return {tool: walls.left(tool) for tool in TOOLS}, walls.there()


def test_the_corpus_of_attempts_is_large_enough() -> None:
    assert len(STATEMENTS) >= 60


def test_the_traces_of_a_secret_are_seen_however_it_is_written() -> None:
    for shown in (CANARY, CANARY.upper(), CANARY.encode().hex(), base64.b64encode(b"xy" + CANARY.encode()).decode()):
        assert _told(f"before {shown} after")
    assert not _told("somebody else's row")


def test_bob_reads_his_own_row(walls: Walls) -> None:
    """So it is there to be seen, by the same server."""
    with walls.at.client(walls.at.token("bob")[1]) as bob:
        assert CANARY in bob.call("query_database", {"query": "select * from bob_data.secrets"}).text


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("one", STATEMENTS, ids=lambda one: one.name)
def test_bobs_row_is_in_no_answer_and_nothing_of_the_attempt_is_left(
    walls: Walls, before: tuple[dict[str, list[Any]], dict[str, str]], one: Statement, tool: str
) -> None:
    text = one.statement
    for name, value in walls.names.items():
        text = text.replace(name, value)
    end, answer = _end(walls.clients[0], tool, text)
    assert not _told(answer), answer[:2000]
    assert walls.left(tool) == before[0][tool]
    assert walls.there() == before[1]
    assert end == one.end(tool, walls.major), answer[:600]


# -- what she may do, and what it does not open -------------------------------------------------------------------


def test_a_function_that_acts_for_its_owner_reads_for_her_and_doctor_reports_it(walls: Walls) -> None:
    """No wall of mcpctl's: whoever makes such a function has opened the door."""
    with walls.at.shop.admin() as admin:
        admin.execute(
            "CREATE FUNCTION alice_data.peek() RETURNS text LANGUAGE sql SECURITY DEFINER"
            " AS 'SELECT body FROM bob_data.secrets LIMIT 1'"
        )
        try:
            assert CANARY in _end(walls.clients[0], "query", "select alice_data.peek()")[1]
            found = json.loads(walls.at.run("doctor", "--json", check=False).stdout)["findings"]
        finally:
            admin.execute("DROP FUNCTION alice_data.peek()")
    assert [one for one in found if "peek()" in one["what"] and "(SECURITY DEFINER)" in one["what"]], found


def test_what_she_makes_with_select_into_is_rolled_back_though_she_may_create(walls: Walls) -> None:
    with walls.at.shop.admin() as admin:
        admin.execute("GRANT CREATE ON SCHEMA alice_data TO mcp_alice_w")
        try:
            for statement in (
                "select * into alice_data.taken from alice_data.notes",
                "with made as (insert into alice_data.notes (body) values ('taken') returning *)"
                " select * into alice_data.taken from made",
            ):
                assert _end(walls.clients[0], "execute", statement)[0] == "none"
        finally:
            admin.execute("REVOKE CREATE ON SCHEMA alice_data FROM mcp_alice_w")
        assert admin.execute("SELECT to_regclass('alice_data.taken')").fetchone() == (None,)
        assert admin.execute("SELECT count(*) FROM alice_data.notes WHERE body = 'taken'").fetchone() == (0,)


def test_a_password_that_a_user_gave_her_own_role_opens_nothing(walls: Walls) -> None:
    """She has a function of the DBA's that runs what it is given, so ALTER ROLE is within her reach."""
    at, known = walls.at, "known by heart"
    at.user("dora", "mcp-tools")
    at.grant("dora", "--schema", "alice_data", access="write")
    token_id, token = at.token("dora")

    def refused() -> str:
        with pytest.raises(psycopg.OperationalError) as problem:
            psycopg.connect(at.shop.cluster.dsn_for("mcp_dora_w", known, "shop", tcp=True))
        return str(problem.value)

    with at.client(token) as dora:
        change = f"alter role current_user password '{known}'"
        assert _end(dora, "execute", change)[0] == "none"
        quoted = change.replace("'", "''")
        assert _end(dora, "execute", f"select alice_data.does('{quoted}')")[0] == "rows"
        with at.shop.login("mcp_dora_w", known) as own:
            assert own.execute("SELECT current_user::text").fetchone() == ("mcp_dora_w",), "it is her password now"
        assert "pg_hba.conf rejects connection" in refused()
        at.run("token", "revoke", token_id)
        assert dora.call("whoami").status_code == 401
    assert "pg_hba.conf rejects connection" in refused()
    at.grant("dora", "--schema", "alice_data", access="write")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        at.shop.login("mcp_dora_w", known)


def test_who_is_granted_nothing_in_a_database_is_refused_there_and_never_logged_in(walls: Walls) -> None:
    at = walls.at
    at.user("carol", "mcp-admin")
    with at.client(at.token("carol")[1]) as carol:
        for tool in ("query", "execute"):
            assert "there is no default database for you" in _end(carol, tool, "select 1")[0]
        assert carol.call("list_databases").json()["result"]["structuredContent"]["databases"] == []
    called = [line for line in at.audit() if line.get("user") == "carol" and line["event"] == "tool.refused"]
    assert len(called) == 2
    assert all(line.get("role") is None and line.get("backend_pid") is None for line in called)
    answer = walls.clients[0].call("query_database", {"query": "select 1", "database": "hr"})
    assert "there is no database 'hr' for you" in answer.text, "her role is in that cluster, too"


def test_a_token_without_a_user_needs_a_login_of_its_own(walls: Walls, tmp_path: Path) -> None:
    with walls.at.client(walls.at.token(None)[1]) as service:
        for tool in TOOLS:
            end = _end(service, tool, "select 1")[0]
            assert "there is no default database" in end if tool == "query" else "has not the permission" in end, end
    cluster = walls.at.shop.cluster
    own = f"    service_dsn: postgresql://{site.READER}@/shop?host={cluster.host}&port={cluster.port}\n"
    at = Site(
        tmp_path / "site", walls.at.shop, per_user=True, database=own + "    service_password_file: shop.password\n"
    ).start()
    try:
        with at.client(at.token(None)[1]) as service:
            assert service.rows("select session_user::text") == [[site.READER]]
            assert _end(service, "query", "select * from bob_data.secrets")[0] == "42501"
            assert "has not the permission" in _end(service, "execute", "select 1")[0]
    finally:
        at.stop()


@pytest.mark.parametrize(
    "limits, reads, why",
    [
        ({"permissions": ("tools:query_database", "databases:*:read")}, True, "lacks the permission"),
        ({"permissions": ("tools:*", "databases:shop:read")}, True, "there is no database 'shop' for you"),
        ({"permissions": ("tools:execute_statement", "databases:shop:write")}, False, None),
        ({"databases": ("hr",)}, False, "there is no database 'shop' for you"),
        ({"databases": ()}, False, "there is no database 'shop' for you"),
    ],
)
def test_a_token_has_no_more_than_what_it_is_limited_to(
    walls: Walls, limits: dict[str, Any], reads: bool, why: str | None
) -> None:
    with walls.at.client(walls.at.token("alice", **limits)[1]) as narrow:
        asked = narrow.call("query_database", {"query": "select 1", "database": "shop"}).json()["result"]
        assert asked["isError"] is not reads
        done = narrow.call("execute_statement", {"statement": "select 1", "database": "shop"}).json()["result"]
        assert done["isError"] is (why is not None)
        assert why is None or why in done["content"][0]["text"]


def _tools(client: Client) -> list[str]:
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    return [tool["name"] for tool in client.http.post(client.url, json=body).json()["result"]["tools"]]


def test_who_only_reads_is_shown_no_execute_statement_and_refused_it(walls: Walls) -> None:
    at = walls.at
    at.user("erin", "mcp-tools")
    at.grant("erin", "--schema", "alice_data")
    assert "execute_statement" in _tools(walls.clients[0])
    for name, why in (("erin", "you have no write access in 'shop'"), ("bob", "has not the permission")):
        with at.client(at.token(name)[1]) as reader:
            assert "execute_statement" not in _tools(reader)
            assert "query_database" in _tools(reader)
            assert why in _end(reader, "execute", "select 1")[0]
            assert reader.rows("select 1") == [[1]]
