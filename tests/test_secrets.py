"""No secret is stored or shown twice: a session that does everything, and a search through all that it left.

Every database password (given or made), every token and every key is looked for in the files, in PostgreSQL's log with
all statements in it, in what the commands and the server printed, and in their command lines and environments.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from command_line import Done, on_a_terminal
from mcpctl.identity import users
from mcpctl.keyring import Keyring
from mcpctl.postgres import scram
from mcpctl.postgres.embedded import Binaries
from place import Place, place
from site_of_mcpctl import COMMAND, Client, environment

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at other processes in /proc")
LOUD = {
    "log_statement": "all",
    "log_min_error_statement": "debug5",
    "log_min_messages": "debug1",
    "log_connections": "on",
    "log_duration": "on",
    "log_parameter_max_length": "-1",
    "log_parameter_max_length_on_error": "-1",
}


class Sampler:
    """Looks at the command line and the environment of all processes of one installation, again and again."""

    def __init__(self, config: Path) -> None:
        self._mine = os.fsencode(config)
        self._there = set(Path("/proc").glob("[0-9]*"))
        self._stop = threading.Event()
        self.command_lines: set[bytes] = set()
        self.environments: set[bytes] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.05):  # a command takes some tenths of a second
            for folder in set(Path("/proc").glob("[0-9]*")) - self._there:  # who was there before is none of ours
                try:
                    line = (folder / "cmdline").read_bytes()
                    if self._mine in line and b"mcpctl" in line:
                        self.command_lines.add(line)
                        self.environments.add((folder / "environ").read_bytes())
                except OSError:  # it has ended meanwhile
                    continue

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)


class Session:
    """What was done, what was said, and what must not be found again. `allowed`: the files in which a secret's owner
    has put it, by what it is."""

    def __init__(self, here: Place) -> None:
        self.here = here
        self.secret: dict[str, str] = {}
        self.allowed: dict[str, set[str]] = {}
        self.said: list[tuple[str, str]] = []
        self.files: dict[str, bytes] = {}
        self.log = ""
        self.sampler = Sampler(here.config)

    def canary(self, what: str, *allowed: str) -> str:
        """A new password, as a hostile one would be."""
        return self.keep(what, f"canary'{what}@/:%{secrets.token_hex(8)}", *allowed)

    def keep(self, what: str, text: str, *allowed: str) -> str:
        self.secret[what], self.allowed[what] = text, set(allowed)
        return text

    def command(self, *arguments: str, stdin: str = "", code: int = 0, **env: str) -> str:
        """A command's stdout; both its outputs are kept for the search."""
        done = subprocess.run(
            [*COMMAND, "--config", str(self.here.config), *arguments],
            input=stdin, capture_output=True, text=True, timeout=60, env=environment(**env),
        )  # fmt: skip
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        self.said += [(f"stdout of {arguments}", done.stdout), (f"stderr of {arguments}", done.stderr)]
        self.look()
        return done.stdout

    def typed(self, *arguments: str, answers: list[tuple[str, str]]) -> Done:
        done = on_a_terminal(["--config", str(self.here.config), *arguments], answers=answers)
        assert done.code == 0, done
        self.said.append((f"the terminal of {arguments}", done.out))
        self.look()
        return done

    def look(self) -> None:
        """Learn every password and key that there is now, and keep every file as it is now."""
        folder = self.here.folder
        ring = Keyring(folder / "secret.key")
        for key in list(ring.keys()):
            self.keep(f"key {key[:4]}", key, "secret.key")
        for text, what in users.sealed_in(users.user_file(folder / "users.yaml").current()):
            password = ring.open(text, what)
            self.keep(f"{what} {password[:4]}", password)
        for path in folder.rglob("*"):
            if path.is_file():
                self.files[f"{path.name} {len(self.files)}"] = path.read_bytes()

    def found(self, text: str | bytes, where: str = "") -> list[str]:
        """What is in a text and must not be."""
        data = text if isinstance(text, bytes) else text.encode()
        return [
            what
            for what, value in self.secret.items()
            if where not in self.allowed[what]
            and any(form.encode() in data for form in {value, quote(value, safe=""), json.dumps(value)[1:-1]})
        ]


def calls(session: Session, url: str, token: str, expected: int) -> None:
    """Questions, errors and refusals of one token."""
    with Client(url, token) as client:
        for query in ("SELECT count(*) FROM orders", "SELECT 1/0", "SELECT nothing FROM nowhere", "DROP TABLE orders"):
            answer = client.call("query_database", {"query": query, "database": "shop"})
            assert answer.status_code == expected, answer.text
            session.said.append((f"the answer to {query}", answer.text))
        session.said.append(("whoami", client.call("whoami").text))


@pytest.fixture(scope="module")
def session(newest: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with place(tmp_path_factory.mktemp("secrets") / "site", newest, settings=LOUD) as here:
        found = Session(here)
        try:
            do_everything(found)
        finally:
            here.site.stop()
            found.sampler.stop()
        found.said.append(("the server", "".join(here.site.stderr)))
        found.log = here.cluster.log()
        found.look()
        yield found


def do_everything(session: Session) -> None:
    here = session.here
    session.keep("the administrator's password", here.cluster.superuser_password, "admin.dsn")
    session.keep("audit.key", (here.folder / "audit.key").read_text().strip(), "audit.key")
    _add_databases(session)
    # grants, applied and printed
    shop = ("--database", "shop")
    session.command("user", "grant", "alice", *shop, "--table", "public.orders", "--access", "write", "--apply")
    session.command("user", "grant", "bob", *shop, "--schema", "public", "--access", "read", "--print-sql")
    session.command("user", "grant", "bob", *shop, "--schema", "public", "--access", "read", "--apply", "--json")
    session.command("user", "grant", "bob", *shop, "--table", "public.nothing", "--access", "read", "--apply", code=4)
    session.command("grant", "diff")
    # users' own passwords, from stdin and by prompt; the hash is where its owner keeps it
    passwd = ("user", "passwd")
    session.command(*passwd, "alice", "--password-file", "-", stdin=session.canary("alice's"))
    his = session.canary("bob's")
    session.typed(*passwd, "bob", answers=[("new password for bob:", f"{his}\n"), ("the same again:", f"{his}\n")])
    for name, user in users.user_file(here.folder / "users.yaml").current().items():
        session.keep(f"hash {name}", str(user.password), "users.yaml")
    # tokens: one on stdout, once; one in a file
    shown = session.command("token", "add", "--user", "alice", "--expiry", "1d").strip()
    assert session.said.pop(-2) == (f"stdout of {('token', 'add', '--user', 'alice', '--expiry', '1d')}", f"{shown}\n")
    session.keep("alice's token", shown)
    out = here.folder / "bob.token"
    session.command("token", "add", "--user", "bob", "--expiry", "1d", "--out", str(out))
    written = session.keep("bob's token", out.read_text().strip(), "bob.token")
    # a server, calls, errors, a stranger
    here.site.start("--workers", "2", anew=True)
    for token in (shown, written):
        calls(session, here.site.url, token, 200)
    stranger = session.keep("a stranger's token", shown[:20] + "x" * 10 + shown[30:])
    calls(session, here.site.url, stranger, 401)
    session.command("key", "rotate")
    calls(session, here.site.url, shown, 200)
    # looking
    session.command("can", "alice", "select", "public.orders", "--database", "shop")
    for noun in (
        ("database", "list", "--json"),
        ("user", "list", "--json"),
        ("user", "show", "alice"),
        ("token", "list"),
    ):
        session.command(*noun)
    session.command("database", "test", code=1)  # nobody has a grant in other
    session.command("database", "harden", "shop", "--apply")
    url = session.canary("url")
    doctor = session.command("doctor", "--json", code=1, MCPCTL_DATABASE_URL=f"postgresql://u:{quote(url, safe='')}@/x")
    session.doctor = json.loads(doctor)["findings"]  # type: ignore[attr-defined]
    session.command("config", "check")
    session.command("support-bundle")
    # the end
    session.command("user", "disable", "alice", "--reason", "on leave")
    calls(session, here.site.url, shown, 401)
    session.command("user", "enable", "alice")
    session.command("user", "ungrant", "alice", *shop, "--access", "write", "--apply")
    session.command("user", "ungrant", "alice", *shop, "--print-sql")
    session.command("token", "revoke", written.split("_")[1])
    session.command("user", "remove", "bob", "--yes")
    session.command("database", "remove", "stdin", "--yes")


def _add_databases(session: Session) -> None:
    """Passwords by prompt, by file and by stdin; a wrong one; and one that its owner leaves in the open."""
    here = session.here
    where = ["--host", here.cluster.host, "--port", str(here.cluster.port), "--dbname", "shop"]
    for what in ("prompt", "file", "stdin", "plain"):
        password = session.canary(what, *(["plain.password"] if what == "plain" else []))
        verifier = scram.verifier(f"reader_{what}", password)
        here.do(f"CREATE ROLE reader_{what} LOGIN PASSWORD '{verifier}'",
                f"GRANT CONNECT ON DATABASE shop TO reader_{what}")  # fmt: skip
    add = ("database", "add")
    session.typed(
        *add, "prompt", *where, "--user", "reader_prompt", "--ask-password",
        answers=[("password for prompt:", session.secret["prompt"] + "\n")],
    )  # fmt: skip
    given = here.folder.parent / "given"
    given.touch(0o600)
    given.write_text(session.secret["file"])
    session.command(*add, "file", *where, "--user", "reader_file", "--password-file", str(given))
    given.unlink()
    login = ("--user", "reader_stdin", "--password-file", "-")
    session.command(*add, "stdin", *where, *login, stdin=session.secret["stdin"])
    session.command(*add, "wrong", *where, *login, stdin=session.canary("wrong"), code=1)
    plain = here.folder / "plain.password"
    plain.touch(0o600)
    plain.write_text(session.secret["plain"])
    entry = f"  plain: {{host: {here.cluster.host}, dbname: shop, user: reader_plain, password_file: plain.password}}\n"
    here.config.write_text(here.config.read_text().replace("databases:\n", f"databases:\n{entry}"))


# -- the search ---------------------------------------------------------------------------------------------------


def test_the_session_used_what_is_looked_for(session: Session) -> None:
    """Else nothing would be found because nothing was there."""
    kinds = [what.split()[0] for what in session.secret]
    assert kinds.count("users.yaml:") >= 3  # alice reads and writes, bob reads
    assert kinds.count("key") >= 2  # before and after the rotation
    assert {"prompt", "file", "stdin", "plain", "wrong", "url", "alice's", "bob's"} <= set(kinds)
    assert [what for what, text in session.secret.items() if "$argon2id$v=19$m=65536" in text]
    for what, allowed in session.allowed.items():
        for name in allowed:  # the same search finds it where its owner has put it
            kept = [data for file, data in session.files.items() if file.split()[0] == name]
            assert any(what in session.found(data) for data in kept), (what, name)
    logged = session.log
    assert "SCRAM-SHA-256$4096:" in logged
    for role in ("reader_prompt", "reader_file", "reader_stdin", "reader_plain", "mcp_alice_r", "mcp_bob_r"):
        assert f"user={role} " in logged, role
    assert 'password authentication failed for user "reader_stdin"' in logged
    assert "SELECT count(*) FROM orders" in logged


def test_no_secret_is_in_any_file_but_where_its_owner_put_it(session: Session) -> None:
    names = {file.split()[0] for file in session.files}
    assert {"users.yaml", "tokens.yaml", "audit.jsonl", "config.yaml", "prompt.password"} <= names
    for file, data in session.files.items():
        assert not session.found(data, file.split()[0]), file


def test_no_secret_is_in_postgresqls_log(session: Session) -> None:
    assert not session.found(session.log)


def test_no_secret_is_in_what_commands_and_servers_say(session: Session) -> None:
    assert any(what == "the server" and text for what, text in session.said)
    for what, text in session.said:
        assert not session.found(text), what


def test_no_secret_is_in_a_command_line(session: Session) -> None:
    lines = session.sampler.command_lines
    assert any(b"serve" in line for line in lines)
    assert any(b"--ask-password" in line for line in lines)
    assert len(lines) > 15
    for line in lines:
        assert not session.found(line), line


def test_no_secret_is_in_an_environment_but_in_the_variable_that_its_owner_set(session: Session) -> None:
    environments = session.sampler.environments
    named = [one for one in environments if b"MCPCTL_DATABASE_URL=" in one]
    assert named
    assert all(session.found(one) == ["url"] for one in named)
    assert len(environments) > len(named)
    for one in environments - set(named):
        assert not session.found(one)


def test_the_doctor_names_each_secret_in_the_open(session: Session) -> None:
    findings: list[dict[str, Any]] = session.doctor  # type: ignore[attr-defined]
    told = [one["what"] for one in findings if one["status"] == "warn"]
    assert any("MCPCTL_DATABASE_URL" in what for what in told)
    assert any("plain.password holds the password of plain as plain text" in what for what in told)
    assert any("admin.dsn belongs to the user whom the server runs as" in what for what in told)
    assert not any("prompt.password" in what for what in told)
