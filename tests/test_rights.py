"""`mcpctl can` against what a real call does: users, roles, grants, tokens and PostgreSQL's own state by chance.

Each case asks `rights.Rights` first, and then does it, through the same objects that the server is made of. Worlds are
made from a seed, so a difference can be seen again: its message holds the SQL that made the world.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import psycopg
import pytest

import site_of_mcpctl as site
from mcpctl import config
from mcpctl.audit import log as audit_log
from mcpctl.config_keys import Settings
from mcpctl.granting import Granting
from mcpctl.identity import tokens, users
from mcpctl.identity.grants import EVERYTHING
from mcpctl.keyring import Keyring
from mcpctl.postgres.administrator import Administrator
from mcpctl.rights import Answer, Question, Rights
from mcpctl.server.parts import Core, running
from real_calls import Done, do, site_of_rights
from site_of_mcpctl import Shop, Site

CASES = {"newest": 500, "oldest": 150}
EACH = 56
"""Cases in one world."""
ROLES = (("mcp-tools",), ("mcp-developer",), ("mcp-admin",), ("editor",), ("mcp-tools", "no-such-role"))
ODD_ROLES = (None, ("mcp-user",), ("analyst",), ("analyst", "mcp-tools"), ("blind",), ("no-such-role",), ())
LIMITS: tuple[dict[str, tuple[str, ...]], ...] = (
    {"permissions": ("*",)},
    {"permissions": ("tools:*", "databases:*:read")},
    {"permissions": ("tools:query_database", "databases:shop:*")},
    {"permissions": ("tools:execute_statement", "databases:shop:write")},
    {"permissions": ("databases:*",)},
    {"permissions": ()},
    {"databases": ("shop",)},
    {"databases": ("all",)},
    {"databases": ("shop", "all"), "permissions": ("tools:*", "databases:all:read")},
    {"databases": ()},
)
POLICIES = (
    "AS PERMISSIVE USING (true)",
    "AS PERMISSIVE USING (false)",
    "AS PERMISSIVE USING (id > 1) WITH CHECK (true)",
    "AS RESTRICTIVE USING (true)",
    "AS RESTRICTIVE USING (false)",
    "AS PERMISSIVE FOR SELECT USING (true)",
    "AS PERMISSIVE FOR INSERT WITH CHECK (true)",
    "AS PERMISSIVE FOR UPDATE USING (true)",
    "AS PERMISSIVE FOR UPDATE WITH CHECK (true)",
    "AS PERMISSIVE FOR DELETE USING (true)",
    "AS PERMISSIVE FOR SELECT TO {role} USING (true)",
    "AS PERMISSIVE TO {role} USING (true)",
    "AS PERMISSIVE TO mcp_logins USING (true)",
    "AS PERMISSIVE TO pg_monitor USING (true)",
    "AS PERMISSIVE USING (EXISTS (SELECT FROM {other}))",
    "AS PERMISSIVE USING (current_user = {literal})",
)
BY_HAND = (
    "REVOKE SELECT ON {table} FROM {role}",
    "REVOKE INSERT ON {table} FROM {role}",
    "REVOKE UPDATE, DELETE ON {table} FROM {role}",
    "REVOKE USAGE ON SCHEMA {schema} FROM {role}",
    "REVOKE ALL ON {table} FROM {role}",
    "REVOKE SELECT ON {table} FROM {role}; GRANT SELECT (id) ON {table} TO {role}",
    "REVOKE SELECT ON {table} FROM {role}; GRANT SELECT (id, body, more) ON {table} TO {role}",
    "REVOKE UPDATE ON {table} FROM {role}; GRANT UPDATE (id) ON {table} TO {role}",
    "REVOKE UPDATE ON {table} FROM {role}; GRANT UPDATE (more) ON {table} TO {role}",
    "REVOKE INSERT ON {table} FROM {role}; GRANT INSERT (id, body, more) ON {table} TO {role}",
    "REVOKE INSERT ON {table} FROM {role}; GRANT INSERT (id) ON {table} TO {role}",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {role}",
    "GRANT SELECT ON {table} TO PUBLIC",
    "GRANT USAGE ON SCHEMA {schema} TO {role}",
    "REVOKE ALL ON ALL SEQUENCES IN SCHEMA {schema} FROM {role}",
    "ALTER ROLE {role} SET row_security = off",
    "ALTER ROLE {role} SET search_path = nowhere",
    "GRANT pg_read_all_data TO {role}",
    "GRANT pg_write_all_data TO {role}",
)
"""What somebody does to what a login role may, behind mcpctl's back."""
BREAKING = (
    "ALTER ROLE {role} NOLOGIN",
    "ALTER ROLE {role} PASSWORD 'another'",
    "ALTER ROLE {role} VALID UNTIL '2020-01-01'",
    "ALTER ROLE {role} CONNECTION LIMIT 0",
    "ALTER ROLE {role} BYPASSRLS",
    "ALTER ROLE {role} SUPERUSER",
    "REVOKE CONNECT ON DATABASE shop FROM {role}",
)
"""And to the role itself, so that it is no login, or none that is served."""


@dataclass
class World:
    """Two schemas with all kinds of relations, users who are granted some of it, and their tokens."""

    seed: int
    at: Site
    settings: Settings
    rng: random.Random = field(init=False)
    sql: list[str] = field(default_factory=list)
    relations: list[str] = field(default_factory=list)
    people: list[str] = field(default_factory=list)
    tokens: list[tuple[str | None, str, str]] = field(default_factory=list)
    working: list[tuple[str | None, str, str]] = field(default_factory=list)
    """The tokens of users against whom nothing speaks before PostgreSQL is asked: most cases are theirs."""

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.schemas = [f"w{self.seed}_{letter}" for letter in "ab"]

    # -- what there is ---------------------------------------------------------------------------------------------

    def make(self, admin: psycopg.Connection[tuple[object, ...]]) -> None:
        """All of it, in PostgreSQL and in mcpctl's files."""
        self._run(admin, f"CREATE ROLE owner_{self.seed}")
        for schema in self.schemas:
            self._run(admin, f"CREATE SCHEMA {schema}")
            self._tables(admin, schema)
        for schema in self.schemas:
            self._others(admin, schema)
            self._run(admin, f"GRANT USAGE ON SCHEMA {schema} TO {site.READER}")
            for relation in self.rng.sample(self.relations, 6):
                self._run(admin, f"GRANT SELECT, INSERT ON {relation} TO {site.READER}")
        self._granted()
        for relation in self.relations:
            if "_t" in relation or "parted" in relation:
                self._row_security(admin, relation)
        with_login = [
            row[0] for row in admin.execute("SELECT rolname FROM pg_roles WHERE rolname ~ '^mcp_.*_[rw]$' ORDER BY 1")
        ]
        for role in with_login:
            if f"-{self.seed}_" in role or (self.seed == 0 and "reads-only" in role):
                for _ in range(self.rng.choice((0, 0, 1, 2, 4))):
                    self._by_hand(admin, role)
                if self.rng.random() < 0.12:
                    self._run(admin, self.rng.choice(BREAKING).format(role=f'"{role}"'))
        self._tokens()

    def _run(self, admin: psycopg.Connection[tuple[object, ...]], command: str) -> None:
        self.sql.append(command)
        admin.execute(command.encode())

    def _tables(self, admin: psycopg.Connection[tuple[object, ...]], schema: str) -> None:
        kinds = ("id int DEFAULT 1", "id serial", "id int GENERATED ALWAYS AS IDENTITY", "id int DEFAULT 1")
        rest = "body text DEFAULT 'x', more int DEFAULT 3"
        for name in ("_t0", "_t1", '"Odd _t"'):
            self._run(admin, f"CREATE TABLE {schema}.{name} ({self.rng.choice(kinds)}, {rest})")
            self.relations.append(f"{schema}.{name}")
        self._run(admin, f"CREATE TABLE {schema}.parted (id int DEFAULT 1, {rest}) PARTITION BY LIST (id)")
        self._run(admin, f"CREATE TABLE {schema}._tpart PARTITION OF {schema}.parted DEFAULT")
        self.relations += [f"{schema}.parted", f"{schema}._tpart"]
        for relation in self.relations[-5:-1]:
            self._run(admin, f"INSERT INTO {relation} (body) VALUES ('a'), ('b')")

    def _others(self, admin: psycopg.Connection[tuple[object, ...]], schema: str) -> None:
        """Views of each kind, whose owners may read what is underneath, or not; a materialized and a foreign table."""
        base = [one for one in self.relations if "view" not in one and ".far" not in one]
        for number in range(3):
            options = self.rng.choice(("", " WITH (security_invoker)", " WITH (security_barrier)"))
            columns = self.rng.choice(("*", "*", "count(*) AS id", "id + 1 AS id, body, more"))
            view = f"{schema}.view{number}"
            self._run(admin, f"CREATE VIEW {view}{options} AS SELECT {columns} FROM {self.rng.choice(base)}")
            self.relations.append(view)
            base += [view] if columns == "*" else []
            if self.rng.random() < 0.4:
                self._run(admin, f"ALTER VIEW {view} OWNER TO owner_{self.seed}")
        data = self.rng.choice(("", " WITH NO DATA"))
        self._run(admin, f"CREATE MATERIALIZED VIEW {schema}.kept AS SELECT * FROM {base[0]}{data}")
        self._run(admin, f"CREATE FOREIGN TABLE {schema}.far (id int, body text, more int) SERVER nowhere")
        self.relations += [f"{schema}.kept", f"{schema}.far"]

    def _granted(self) -> None:
        """Users, their roles, and what `mcpctl user grant --apply` makes of random grants."""
        key = audit_log.read_key(self.settings.audit.key_file)
        granting = Granting(self.settings, Keyring(self.settings.keyring.file), audit_log.installation(key))
        who = Administrator.of({"shop": self.at.admin_dsn()}, granting.logins.host("shop"))
        self.people = [f"{name}-{self.seed}" for name in ("ann", "ben", "cy", "dot")]
        for name in self.people:
            roles = self.rng.choice(ROLES if self.rng.random() < 0.8 else ODD_ROLES)
            self.at.user(name)
            self.at.edit_user(name, roles=roles)
            self.sql.append(f"-- {name} has the roles {roles}")
        if self.seed == 0:
            self.at.user("reads-only", "mcp-admin")
            self.people.append("reads-only")
        for name in self.people:
            for access in self.rng.choice(
                ((), ("read",), ("read", "write"), ("write",), ("write",), ("write", "write", "read"))
            ):
                everything = (*self.schemas * 8, *self.relations, EVERYTHING)
                targets = tuple(dict.fromkeys(self.rng.choices(everything, k=self.rng.choice((1, 2, 3)))))
                done = granting.applied(name, "shop", lambda old, a=access, t=targets: old.more(a, t), who)  # type: ignore[misc]
                self.sql.append(f"-- {name}: read {done.read} write {done.write}")

    def _row_security(self, admin: psycopg.Connection[tuple[object, ...]], relation: str) -> None:
        if self.rng.random() < 0.5:
            return
        self._run(admin, f"ALTER TABLE {relation} ENABLE ROW LEVEL SECURITY")
        if self.rng.random() < 0.3:
            self._run(admin, f"ALTER TABLE {relation} FORCE ROW LEVEL SECURITY")
        roles = [
            row[0]
            for row in admin.execute("SELECT rolname FROM pg_roles WHERE rolname ~ %s ORDER BY 1", (f"-{self.seed}_",))
        ]
        for number in range(self.rng.choice((0, 1, 1, 2, 3))):
            role = self.rng.choice(roles) if roles else "mcp_logins"
            policy = self.rng.choice(POLICIES).format(
                role=f'"{role}"', literal=f"'{role}'", other=self.rng.choice(self.relations[:4])
            )
            if policy.startswith("AS PERMISSIVE USING (EXISTS") and self.relations.index(relation) < 4:
                continue  # tables that policies read have none that reads a table, or PostgreSQL finds no end
            self._run(admin, f"CREATE POLICY p{number} ON {relation} {policy}")

    def _by_hand(self, admin: psycopg.Connection[tuple[object, ...]], role: str) -> None:
        relation = self.rng.choice(self.relations)
        command = self.rng.choice(BY_HAND)
        if "(" in command and relation.endswith((".view0", ".view1", ".view2")):
            relation = self.relations[0]  # views need not have these columns
        self._run(admin, command.format(table=relation, schema=relation.partition(".")[0], role=f'"{role}"'))

    def _tokens(self) -> None:
        people = users.user_file(self.at.folder / "users.yaml")
        if self.rng.random() < 0.3:
            users.disable(people, self.people[0], datetime.now(UTC))
            self.sql.append(f"-- {self.people[0]} is disabled")
        for name in [*self.people, *self.people, None, None]:
            limits = self.rng.choice(LIMITS) if self.rng.random() < 0.4 else {}
            seconds = -5 if self.rng.random() < 0.1 else 3600
            token_id, text = self.at.token(name, seconds=seconds, **limits)
            self.tokens.append((name, token_id, text))
            self.sql.append(f"-- token {token_id} of {name}: {limits}")
            if revoked := self.rng.random() < 0.1:
                tokens.revoke(self.at.tokens, [token_id], datetime.now(UTC))
            user = people.current()[name] if name is not None else None
            if not limits and not revoked and seconds > 0 and user and user.roles in ROLES and not user.disabled_at:
                self.working.append(self.tokens[-1])

    # -- what is asked -----------------------------------------------------------------------------------------------

    def cases(self, how_many: int) -> Iterator[tuple[str | None, str, str, Question]]:
        """(user, the token's id and text, a question)."""
        for _ in range(how_many):
            often = self.working if self.working and self.rng.random() < 0.8 else self.tokens
            name, token_id, text = self.rng.choice(often)
            action = self.rng.choice(("select", "select", "select", "insert", "insert", "update", "delete"))
            database = "all" if self.rng.random() < (0.1 if name else 0.8) else "shop"
            yield name, token_id, text, Question(action, self.rng.choice(self.relations), database)

    def end(self, admin: psycopg.Connection[tuple[object, ...]]) -> None:
        """The next world's grants on everything are none on this one's."""
        for schema in self.schemas:
            admin.execute(f"DROP SCHEMA {schema} CASCADE".encode())


def _difference(said: Answer, done: Done, question: Question) -> str | None:
    by_rows = ".view" in question.target or any("some rows only" in link.reason for link in said.links)
    if said.allowed is not (done.allowed or (done.by_policy and said.allowed and by_rows)):
        return f"can says {said.allowed}, and the call: {done.text[:300]}"
    if "of this server are in use" in done.text:
        return "no answer at all"
    if said.hides_all and done.allowed and done.rows != 0:
        return f"can says that row security hides all, and it was {done.rows} rows"
    if done.by_policy and question.action != "insert":
        return "only what is inserted is checked here"
    return None


@pytest.fixture(scope="session")
def at(login_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return site_of_rights(login_shop, tmp_path_factory.mktemp("rights") / "site")


def test_can_says_what_a_real_call_does(at: Site, newest: object, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = CASES["newest" if at.shop.cluster.binaries == newest else "oldest"]
    seen = asyncio.run(_worlds(at, wanted))
    with capsys.disabled():
        print(f"\ncan and {seen.total()} calls on {at.shop.cluster.binaries}: {dict(seen)}")
    assert seen.total() == wanted
    assert seen["yes"] > wanted / 8, "a test in which everything is refused sees little"
    assert seen["no, by PostgreSQL"] > wanted / 20
    assert seen["no row"] > 0


async def _worlds(at: Site, wanted: int) -> Counter[str]:
    settings = config.load(at.config, at.limits)
    seen: Counter[str] = Counter()
    async with running(settings, files=True) as core:
        with at.shop.admin() as admin:
            while (left := wanted - seen.total()) > 0:
                world = World(seen.total() // EACH, at, settings)
                world.make(admin)
                seen += await _one(world, core, settings, min(left, EACH))
                world.end(admin)
    return seen


async def _one(world: World, core: Core, settings: Settings, how_many: int) -> Counter[str]:
    """Every case of a world; what they came to."""
    rights = Rights(settings, tokens.utcnow())
    seen: Counter[str] = Counter()
    for name, token_id, text, question in world.cases(how_many):
        said = rights.ask(rights.principal(name, token_id), question)
        done = await do(core, text, question, whole=said.hides_all)
        chain = "\n".join(f"{link.name}: {link.allowed}: {link.reason}" for link in said.links)
        context = f"world {world.seed}: {name} with {token_id}: {question}\n{chain}\n{done}\n" + "\n".join(world.sql)
        assert (wrong := _difference(said, done, question)) is None, f"{wrong}\n{context}"
        last = next((link.name for link in said.links if not link.allowed), "")
        seen["no row" if said.allowed and said.hides_all else "yes" if said.allowed else
             "no, by PostgreSQL" if last == "postgresql" else "no, by mcpctl"] += 1  # fmt: skip
    return seen
