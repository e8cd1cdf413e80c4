"""Tenants that must not meet: acme, widgets, and acme-x, whose name begins like another's. Each has a database of its
own, or a schema of its own in one database; each has one user with two devices, which are two tokens.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg

from site_of_mcpctl import Shop, Site, keep_out

KINDS = ("a database each", "a schema each")
ROWS = 40
"""Rows of each table at the beginning."""
HEADERS = {"Accept": "application/json", "Content-Type": "application/json"}


@dataclass(frozen=True)
class House:
    """One tenant: its user, its two tables, and where they are."""

    name: str
    user: str
    tables: tuple[str, str]

    @property
    def place(self) -> str:
        """The name of its database or schema in PostgreSQL."""
        return self.name.replace("-", "_")

    @property
    def words(self) -> tuple[str, ...]:
        """What nobody else may read of it in an answer."""
        roles = tuple(f"mcp_{self.user}_{suffix}" for suffix in "rw")
        return (self.name, self.place, self.user, *self.tables, *roles)


HOUSES = (
    House("acme", "ann", ("acme_users", "acme_products")),
    House("widgets", "wil", ("widgets_inventory", "widgets_orders")),
    House("acme-x", "xen", ("acme_x_users", "acme_x_products")),
)
ACME, WIDGETS, ACME_X = HOUSES


def traces(text: str, of: House) -> list[str]:
    """The words of a tenant that stand in a text, as words of their own: acme is none in acme_x."""
    return [word for word in of.words if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text)]


@dataclass
class Town:
    """A site with the three tenants. `devices` are the tokens of each tenant's user: (id, token), twice."""

    kind: str
    site: Site
    shop: Shop
    devices: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)

    @property
    def apart(self) -> bool:
        """Whether each has a database of its own."""
        return self.kind == KINDS[0]

    def database(self, house: House) -> str:
        """The name in the config of the database that a tenant's users ask."""
        return house.name if self.apart else "shop"

    def client(self, house: House, device: int = 0) -> Any:
        """A caller on one of the tenant's devices."""
        return self.site.client(self.devices[house.name][device][1])

    def admin(self, house: House) -> psycopg.Connection[tuple[Any, ...]]:
        """A superuser's connection to where the tenant's tables are, with its schema first in the path."""
        cluster = self.shop.cluster
        dbname = house.place if self.apart else "shop"
        options = {} if self.apart else {"options": f"-c search_path={house.place}"}
        dsn = cluster.dsn_for("postgres", cluster.superuser_password, dbname)
        return psycopg.connect(dsn, autocommit=True, **options)  # type: ignore[arg-type]


def settle(folder: Path, shop: Shop, kind: str, extra: str = "", houses: tuple[House, ...] = HOUSES) -> Town:
    """A site with those tenants, made by the command line alone; `shop` is theirs from now on."""
    keep_out(shop.cluster)
    host = f"host: {shop.cluster.host}, port: {shop.cluster.port}, roles: per_user"
    more = "".join(f"  {one.name}: {{{host}, dbname: {one.place}}}\n" for one in houses) if kind == KINDS[0] else ""
    town = Town(kind, Site(folder, shop, database=more, extra=extra, per_user=True), shop)
    for house in houses:
        _build(town, house)
        where = ["--database", town.database(house), *([] if town.apart else ["--schema", house.place])]
        town.said[house.name] = town.site.run("tenant", "add", house.name, *where).stderr
        town.site.run("user", "add", house.user, "--tenant", house.name, "--role", "mcp-tools")
        town.site.run("user", "grant", house.user, "--database", town.database(house), "--access", "write", "--apply")
        town.devices[house.name] = [town.site.token(house.user) for _ in range(2)]
    return town


def _build(town: Town, house: House) -> None:
    cluster = town.shop.cluster
    with psycopg.connect(cluster.dsn, autocommit=True) as connection:
        if town.apart:
            connection.execute(f'CREATE DATABASE "{house.place}"'.encode())
    if not town.apart:
        with town.shop.admin() as connection:
            connection.execute(f'CREATE SCHEMA "{house.place}"'.encode())
    with town.admin(house) as connection:
        for table in house.tables:
            connection.execute(
                f"CREATE TABLE {table} (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"
                f" owner text NOT NULL DEFAULT '{house.name}' CHECK (owner = '{house.name}'), device int, note text);"
                f"INSERT INTO {table} (note) SELECT '{house.name}''s ' || n FROM generate_series(1, {ROWS}) AS n;"
                f"ANALYZE {table}".encode()
            )


# -- many at once -----------------------------------------------------------------------------------------------------


class Wire:
    """One connection of a device, as cheap as it goes: the machine is to be busy with the server."""

    def __init__(self, url: str, token: str) -> None:
        parts = urlsplit(url)
        self._path = parts.path
        self._headers = {**HEADERS, "Authorization": f"Bearer {token}"}
        self._http = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)

    def close(self) -> None:
        self._http.close()

    def send(self, tool: str, arguments: dict[str, Any], number: int) -> None:
        params = {"name": tool, "arguments": arguments}
        body = json.dumps({"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params})
        self._http.request("POST", self._path, body, self._headers)

    def call(self, tool: str, arguments: dict[str, Any], number: int = 1) -> tuple[bool, Any, str]:
        """(whether it is an error, the structured content, the whole body); AssertionError for no answer to it."""
        self.send(tool, arguments, number)
        answer = self._http.getresponse()
        body = answer.read().decode()
        assert answer.status == 200, (answer.status, body)
        found = json.loads(body)
        assert found["id"] == number, (number, body)
        return found["result"]["isError"], found["result"].get("structuredContent"), body


class Device:
    """One of a tenant's devices, which asks a mix of everything and looks at every answer. `wrong` are the answers that
    were not as they must be, with the call; `done` counts the calls by kind, `written` the writes that were said to be
    done."""

    def __init__(self, town: Town, house: House, number: int, seed: int) -> None:
        self.house = house
        self.number = number
        self.others = [one for one in HOUSES if one is not house]
        self.wrong: list[Any] = []
        self.done: Counter[str] = Counter()
        self.written = 0
        self._town = town
        self._random = random.Random(seed)
        self._id, self._token = town.devices[house.name][number]
        self._wire = Wire(town.site.url, self._token)
        self._mix: dict[Callable[[int], bool], int] = {
            self._rows: 460, self._count: 200, self._nonce: 150, self._whoami: 50, self._databases: 50,
            self._schema: 30, self._plan: 10, self._foreign: 20, self._broken: 15, self._write: 8,
            self._leave: 5, self._health: 2,
        }  # fmt: skip

    def run(self, calls: int) -> None:
        """That many calls, one after the other."""
        kinds, weights = list(self._mix), list(self._mix.values())
        for number, kind in enumerate(self._random.choices(kinds, weights, k=calls), 1):
            name = kind.__name__.strip("_")
            self.done[name] += 1
            if not kind(number):
                self.wrong.append((self.house.name, self.number, name, number))
        self._wire.close()

    def _table(self) -> str:
        return self._random.choice(self.house.tables)

    def _ask(self, number: int, query: str, **more: Any) -> tuple[bool, Any, str]:
        failed, content, body = self._wire.call("query_database", {"query": query, **more}, number)
        return failed, content and content["rows"], body

    def _clean(self, body: str) -> bool:
        return not any(traces(body, of=other) for other in self.others)

    def _rows(self, number: int) -> bool:
        failed, rows, body = self._ask(number, f"select owner, note, id from {self._table()} order by id limit 5")
        wanted = [[self.house.name, f"{self.house.name}'s {n}", n] for n in range(1, 6)]
        return not failed and rows == wanted and self._clean(body)

    def _count(self, number: int) -> bool:
        failed, rows, _ = self._ask(number, f"select owner, count(*), min(id) from {self._table()} group by owner")
        return not failed and len(rows) == 1 and rows[0][0] == self.house.name and rows[0][1] >= ROWS

    def _nonce(self, number: int) -> bool:
        word = f"{self.house.name}:{self.number}:{self._random.getrandbits(60)}"
        failed, rows, _ = self._ask(number, f"select '{word}', session_user, owner from {self._table()} limit 1")
        return not failed and rows == [[word, f"mcp_{self.house.user}_r", self.house.name]]

    def _whoami(self, number: int) -> bool:
        failed, found, body = self._wire.call("whoami", {}, number)
        who = (found["user"], found["token"], found["tenant"], found["databases"])
        mine = (self.house.user, self._id, self.house.name, [self._town.database(self.house)])
        return not failed and who == mine and self._clean(body)

    def _databases(self, number: int) -> bool:
        failed, found, body = self._wire.call("list_databases", {}, number)
        names = [one["name"] for one in found["databases"]]
        return not failed and names == [self._town.database(self.house)] and self._clean(body)

    def _schema(self, number: int) -> bool:
        failed, found, body = self._wire.call("get_schema_info", {}, number)
        return not failed and {one["name"] for one in found["tables"]} == {*self.house.tables} and self._clean(body)

    def _plan(self, number: int) -> bool:
        table = self._table()
        failed, found, body = self._wire.call("explain_query", {"query": f"select * from {table}"}, number)
        return not failed and f"Seq Scan on {table}" in found["plan"][0] and self._clean(body)

    def _foreign(self, number: int) -> bool:
        other = self._random.choice(self.others)
        table = self._random.choice(other.tables)
        failed, _, body = self._ask(number, f"select * from {other.place}.{table}")
        return failed and set(traces(body, of=other)) <= {other.name, other.place, table}

    def _broken(self, number: int) -> bool:
        failed, _, body = self._ask(number, f"select 1 / (id - id) from {self._table()}")
        return failed and "division by zero" in body and self._clean(body)

    def _write(self, number: int) -> bool:
        table = self.house.tables[0]
        text = f"insert into {table} (device, note) values ({self.number}, 'n{number}') returning owner, device, note"
        failed, found, _ = self._wire.call("execute_statement", {"statement": text}, number)
        self.written += not failed
        return not failed and found["rows"] == [[self.house.name, self.number, f"n{number}"]]

    def _leave(self, number: int) -> bool:
        """Go away in the middle of an answer, and come back."""
        query = f"select owner, pg_sleep(0.05) from {self._table()} limit 3"
        self._wire.send("query_database", {"query": query}, number)
        self._wire.close()
        return True

    def _health(self, number: int) -> bool:
        failed, found, body = self._wire.call("database_health", {}, number)
        return not failed and found["tenant"] == self.house.name and self._clean(body)


def all_at_once(*work: Callable[[], None]) -> float:
    """Run each in a thread of its own; the seconds it took. Raises what the first of them raised."""
    problems: list[BaseException] = []

    def run(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as problem:  # noqa: BLE001 - raised again below
            problems.append(problem)

    threads = [threading.Thread(target=run, args=(one,), daemon=True) for one in work]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return time.perf_counter() - begun


# -- what isolation costs ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shared(folder: Path, town: Town) -> Iterator[tuple[Site, str]]:
    """A site on the same PostgreSQL where all have one login, one token and so one pool: (the site, the token)."""
    site = Site(folder, town.shop)
    with town.shop.admin() as connection:
        connection.execute(
            "CREATE SCHEMA IF NOT EXISTS together; GRANT USAGE ON SCHEMA together TO shop_reader;"
            "CREATE TABLE IF NOT EXISTS together.acme_users AS SELECT n AS id, 'acme' AS owner, 'acme''s ' || n AS note"
            f" FROM generate_series(1, {ROWS}) AS n; GRANT SELECT ON together.acme_users TO shop_reader;"
            "ANALYZE together.acme_users"
        )
    site.start()
    try:
        yield site, site.token()[1]
    finally:
        site.stop()


def ask_again(url: str, token: str, table: str, calls: int) -> None:
    """The same small question that many times."""
    wire = Wire(url, token)
    for number in range(calls):
        failed, _, body = wire.call("query_database", {"query": f"select owner, note from {table} limit 5"}, number)
        assert not failed, body
    wire.close()


def cost(town: Town, folder: Path, calls: int, rounds: int = 3) -> list[tuple[float, float]]:
    """(seconds with a pool, a login and a token each, seconds with one for all) of the same calls by four clients, in
    turn, that many rounds; a first round that warms both up does not count."""
    devices = [(house, text) for house in (ACME, WIDGETS) for _, text in town.devices[house.name]]
    found = []
    with shared(folder, town) as (site, token):
        for number in range(rounds + 1):
            share = calls // 4 if number else 50
            apart = [
                lambda text=text, house=house, n=share: ask_again(town.site.url, text, house.tables[1], n)  # type: ignore[misc]
                for house, text in devices
            ]
            one = [lambda n=share: ask_again(site.url, token, "together.acme_users", n)] * 4  # type: ignore[misc]
            found.append((all_at_once(*apart), all_at_once(*one)))
    return found[1:]
