"""A site: mcpctl's files in a temporary folder, and its server as a process of its own."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg

import commands
import copied
from mcpctl import private_file
from mcpctl.cli import init
from mcpctl.identity import tokens, users
from mcpctl.identity.entry_file import EntryFile
from mcpctl.identity.grants import Grant
from mcpctl.postgres import hba
from mcpctl.postgres.embedded import Binaries, Cluster

COMMAND = [sys.executable, "-m", "mcpctl"]
READER = "shop_reader"
PASSWORD = copied.PASSWORD
_MANY = {"rate": 100000, "burst": 100000, "concurrent": 1000, "failed_sign_ins": 100000}
UNLIMITED = {f"MCPCTL_LIMITS__{name.upper()}": str(value) for name, value in _MANY.items()}
"""For the server of a site, which tests ask faster than people do."""


class Shop:
    """A cluster with the demo's shop in it, and a login role that can only read."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._looking: psycopg.Connection[tuple[Any, ...]] | None = None
        if not isinstance(cluster, copied.Copied):
            copied.fill(cluster)

    def admin(self) -> psycopg.Connection[tuple[Any, ...]]:
        """A superuser's connection to the shop."""
        return psycopg.connect(
            self.cluster.dsn_for("postgres", self.cluster.superuser_password, "shop"), autocommit=True
        )

    def login(self, role: str, password: str) -> psycopg.Connection[tuple[Any, ...]]:
        """A connection of some role's to the shop, over the socket."""
        return psycopg.connect(self.cluster.dsn_for(role, password, "shop"), autocommit=True)

    def backends(self, extra: str = "true") -> list[tuple[Any, ...]]:
        """(pid, application_name, state, query) of the reader's backends."""
        query = f"SELECT pid, application_name, state, query FROM pg_stat_activity WHERE usename = '{READER}'"
        return self.look(f"{query} AND {extra}")

    def look(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """What a superuser sees of the whole cluster, over a connection that stays open: a login takes ten times what
        a look takes, and who waits for something looks a hundred times a second. Anew where it was ended."""
        try:
            return self._looked(query, parameters)
        except psycopg.OperationalError:
            self.close()
            return self._looked(query, parameters)

    def _looked(self, query: str, parameters: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if self._looking is None:
            self._looking = psycopg.connect(self.cluster.dsn, autocommit=True)
        return self._looking.execute(query.encode(), parameters or None).fetchall()

    def close(self) -> None:
        """End what `look` has opened."""
        if self._looking is not None:
            self._looking.close()
        self._looking = None


def record(file: EntryFile[users.User], name: str, grant: Grant) -> None:
    """Write a grant into a user file, without PostgreSQL; a grant of nothing is taken out."""
    with file.edit() as entries:
        entries[name] = users.find(entries, name).with_grant(grant)


def keep_out(cluster: Cluster) -> None:
    """The lines of pg_hba.conf that let the users' login roles in over the socket alone."""
    file = cluster.folder / "data" / "pg_hba.conf"
    before = file.read_text(encoding="utf-8")
    with file.open("w", encoding="utf-8") as out:
        out.write("\n".join([*hba.lines("local"), before]))
    reload(cluster)


def reload(cluster: Cluster) -> None:
    """Have PostgreSQL read its files again, and wait until it has."""
    with psycopg.connect(cluster.dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_reload_conf()")

    def done() -> bool:
        with psycopg.connect(cluster.dsn, autocommit=True) as connection:
            query = "SELECT pg_conf_load_time() >= (pg_stat_file(current_setting('hba_file'))).modification"
            row = connection.execute(query).fetchone()
        return row == (True,)

    eventually(done)


@contextlib.contextmanager
def shop(binaries: Binaries, **options: Any) -> Iterator[Shop]:
    with copied.Copied.start(binaries, **options) as cluster:
        found = Shop(cluster)
        try:
            yield found
        except BaseException:
            print(cluster.log()[-4000:])
            raise
        finally:
            found.close()


class Site:
    """The folder of one installation. `start()` runs `mcpctl serve` on a free port."""

    def __init__(
        self,
        folder: Path,
        shop: Shop,
        extra: str = "",
        database: str = "",
        tcp: bool = False,
        per_user: bool = False,
    ) -> None:
        self.folder = folder
        self.shop = shop
        self.process: subprocess.Popen[str] | commands.Started | None = None
        self.url = ""
        self.limits = UNLIMITED
        self.stderr: list[str] = []
        host = "127.0.0.1" if tcp else shop.cluster.host
        text = f"databases:\n  shop:\n    host: {host}\n    port: {shop.cluster.port}\n    dbname: shop\n"
        text += "    roles: per_user\n" if per_user else f"    user: {READER}\n    password_file: shop.password\n"
        init.make(folder, text + database + extra)
        if per_user:
            private_file.create(folder / "admin.dsn", self.admin_dsn().encode() + b"\n")
        (folder / "shop.password").touch(0o600)
        (folder / "shop.password").write_text(PASSWORD + "\n")
        self.config = folder / "config.yaml"
        self.tokens = tokens.token_file(folder / "tokens.yaml")
        users.add(users.user_file(folder / "users.yaml"), "alice", None, datetime.now(UTC))
        users.add(users.user_file(folder / "users.yaml"), "bob", None, datetime.now(UTC))

    def admin_dsn(self) -> str:
        cluster = self.shop.cluster
        return cluster.dsn_for("postgres", cluster.superuser_password, "shop")

    def grant(self, user: str, *what: str, access: str = "read") -> None:
        """Let a user read or write in the database shop, as `--apply` does."""
        self.run("user", "grant", user, "--database", "shop", *what, "--access", access, "--apply")

    def user(self, name: str, *roles: str) -> None:
        """A further user with these roles, or the default one, whom nothing is granted."""
        users.add(users.user_file(self.folder / "users.yaml"), name, None, datetime.now(UTC), roles or None)

    def edit_user(self, name: str, **changed: Any) -> None:
        """Change a user's entry of users.yaml, as an operator may by hand."""
        with users.user_file(self.folder / "users.yaml").edit() as entries:
            entries[name] = replace(entries[name], **changed)

    def token(self, user: str | None = "alice", seconds: float = 3600, **limits: Any) -> tuple[str, str]:
        """(id, token) of a new token, written as `token add` writes it."""
        now = datetime.now(UTC)
        if user is None:
            limits.setdefault("databases", ("shop",))
        wanted = tokens.Wanted(user=user, expires_at=now + timedelta(seconds=seconds), **limits)
        entry, text = tokens.add(self.tokens, wanted, now)
        return entry.id, text

    def run(self, *arguments: str, check: bool = True, input: str | None = None) -> subprocess.CompletedProcess[str]:
        """mcpctl with these arguments, on this site."""
        done = command("--config", str(self.config), *arguments, input=input)
        if check and done.returncode:
            raise AssertionError(f"mcpctl {arguments}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def start(
        self, *arguments: str, wait: bool = True, before: Sequence[str] = (), anew: bool = False,
        python: str = sys.executable,
    ) -> Site:  # fmt: skip
        """`anew`: by a new interpreter (`python`), as an administrator starts it, which takes two seconds more; for who
        looks at the process itself, at its memory, command line or environment."""
        given = ["--config", str(self.config), "serve", "--port", "0", *arguments]
        if anew or before:
            self.process = subprocess.Popen(
                [*before, python, *COMMAND[1:], *given],
                stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(**self.limits),
            )  # fmt: skip
        else:
            self.process = starter().start(given, environment(**self.limits))
        up = threading.Event()

        def read() -> None:
            assert self.process is not None
            assert self.process.stderr is not None
            for line in self.process.stderr:
                self.stderr.append(line)
                if line.startswith("serving at "):
                    self.url = line.split()[-1]
                    up.set()
            up.set()

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()
        if wait:
            assert up.wait(30), "".join(self.stderr)
            assert self.url, "".join(self.stderr)
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(number)
        try:
            code = self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the server did not stop:\n{''.join(self.stderr)}") from None
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.process = None
        return code

    def audit(self) -> list[dict[str, Any]]:
        data = (self.folder / "audit.jsonl").read_bytes()
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]  # one may be written just now

    def client(self, token: str, **options: Any) -> Client:
        return Client(self.url, token, **options)


@functools.cache
def authorities() -> ssl.SSLContext:
    """Made once: to read the usual authorities takes ten times what a call takes."""
    return httpx.create_ssl_context()


def visit(method: str, url: str, **options: Any) -> httpx.Response:
    """One request of a client that is made for it, past every proxy."""
    return httpx.request(method, url, trust_env=False, verify=authorities(), **options)


class Client:
    """A caller with a token, over one connection that stays open."""

    def __init__(self, url: str, token: str | None, **options: Any) -> None:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        self.url = url
        options.setdefault("verify", authorities())
        self.http = httpx.Client(headers=headers, timeout=90, trust_env=False, **options)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def call(self, name: str, arguments: dict[str, Any] | None = None, id: int | str = 1) -> httpx.Response:
        body = {
            "jsonrpc": "2.0",
            "id": id,
            "method": "tools/call",
            "params": {"name": name, "arguments": arguments or {}},
        }
        return self.http.post(self.url, json=body)

    def ask(self, query: str, **arguments: Any) -> Any:
        """The structured answer of a query; AssertionError with the text for any other."""
        answer = self.call("query_database", {"query": query, **arguments})
        assert answer.status_code == 200, (answer.status_code, answer.text)
        result = answer.json()["result"]
        assert not result["isError"], result["content"][0]["text"]
        return result["structuredContent"]

    def rows(self, query: str, **arguments: Any) -> Any:
        return self.ask(query, **arguments)["rows"]

    def error(self, query: str, **arguments: Any) -> str:
        """The text of a query that must fail."""
        answer = self.call("query_database", {"query": query, **arguments})
        assert answer.status_code == 200, (answer.status_code, answer.text)
        result = answer.json()["result"]
        assert result["isError"], result
        text: str = result["content"][0]["text"]
        return text


@functools.cache
def starter() -> commands.Commands:
    """What forks this worker's commands and servers."""
    return commands.Commands(environment())


def command(
    *arguments: str, input: str | bytes | None = None, env: dict[str, str] | None = None, cwd: str | Path = ""
) -> subprocess.CompletedProcess[str]:
    """mcpctl with these arguments, without a terminal."""
    given = input.encode() if isinstance(input, str) else input or b""
    done = starter().run(arguments, given, environment(**(env or {})), 60, cwd)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what would steer mcpctl or libpq."""
    found = {key: value for key, value in os.environ.items() if not key.startswith(("MCPCTL_", "PG", "INVOCATION_ID"))}
    return {**found, **more}


def eventually(what: Any, seconds: float = 10.0, pause: float = 0.01) -> Any:
    """Wait, boundedly, until `what()` is true; returns what it said."""
    until = time.monotonic() + seconds
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < until, "it did not come true in time"
        time.sleep(pause)


def in_background(work: Any, *arguments: Any) -> Background:
    return Background(work, arguments)


class Background:
    """Something that runs in a thread; `result()` waits for it and raises what it raised."""

    def __init__(self, work: Any, arguments: Sequence[Any]) -> None:
        self._result: Any = None
        self._problem: BaseException | None = None

        def run() -> None:
            try:
                self._result = work(*arguments)
            except BaseException as problem:  # noqa: BLE001 - raised again in result()
                self._problem = problem

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def runs(self) -> bool:
        return self._thread.is_alive()

    def result(self, seconds: float = 30) -> Any:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "it still runs"
        if self._problem is not None:
            raise self._problem
        return self._result
