"""The lockdown: no call is answered by any worker from the moment that the command returns, until it is lifted."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from chain import lines
from command_line import Home
from mcpctl import config, control, private_file
from mcpctl.cli import taking
from mcpctl.errors import Error, LockedError
from mcpctl.identity import tokens
from mcpctl.identity.authenticate import Authenticator
from mcpctl.identity.lockdown import Lockdown
from mcpctl.identity.principal import LOCAL
from mcpctl.postgres.pools import ended
from site_of_mcpctl import COMMAND, Shop, Site, environment, eventually, in_background
from test_control import process

MakeSite = Callable[..., Site]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def lock(tmp_path: Path) -> Lockdown:
    return Lockdown(tmp_path / "tokens.yaml")


def test_it_is_on_from_one_command_to_the_other_and_twice_is_fine(home: Home) -> None:
    name, _ = home.token()
    before = {path: data for path, data in home.files().items() if "audit.jsonl" not in path}
    done = home("lockdown", "--reason", "somebody is in")
    assert (
        done.good
        == "locked: no call is answered\nno server answers here; one without tokens locks by itself within a second\n"
    )
    again = home("lockdown", "--reason", "another reason").good
    assert again.startswith("it was locked already: the server is locked")
    assert again.splitlines()[0].endswith(": somebody is in")
    listed = home("token", "list")
    assert name in listed.out
    assert "the server is locked" in listed.err
    assert "somebody is in" in listed.err
    assert any(
        one["check"] == "lockdown" and one["status"] == "fail"
        for one in json.loads(home("doctor", "--json").out)["findings"]
    )
    assert (home.folder / "lockdown").stat().st_mode & 0o777 == 0o600
    assert home("lockdown", "--lift", "--reason", "it was a drill").good == "calls are answered again\n"
    assert home("lockdown", "--lift").good == "it was not locked\n"
    assert "locked" not in home("token", "list").err
    assert before == {path: data for path, data in home.files().items() if "audit.jsonl" not in path}
    said = [(line["event"], line["reason"]) for line in lines(home.folder / "audit.jsonl")[-2:]]
    assert [event for event, _ in said] == ["server.locked", "server.unlocked"]
    assert [reason.partition("; by ")[0] for _, reason in said] == ["somebody is in", "it was a drill"]


def test_a_reason_is_a_short_line_of_text(home: Home) -> None:
    name, text = home.token()
    for reason, kept in (("two\nlines\tand\x1b", "two lines and; by "), ("x" * 1001, "x" * 1000), (" ", "by ")):
        assert home("lockdown", "--reason", reason).code == 0
        assert lines(home.folder / "audit.jsonl")[-1]["reason"].startswith(kept)
        assert home("lockdown", "--lift").code == 0
    assert home("token", "revoke", name, "--reason", f"look\tat {text}").good.startswith(f"{name} revoked\n")
    assert text not in (home.folder / "audit.jsonl").read_text()
    assert lines(home.folder / "audit.jsonl")[-1]["reason"].startswith(f"look at mcp_{name}_")


@pytest.mark.parametrize("how", ["empty", "garbage", "open to all", "a folder", "a link to nothing", "nested", "huge"])
def test_what_cannot_be_believed_locks_too(lock: Lockdown, how: str) -> None:
    match how:
        case "empty":
            lock.path.touch(0o600)
        case "garbage":
            lock.path.write_bytes(b"\xff{[")
        case "open to all":
            lock.path.touch(0o666)
        case "a folder":
            lock.path.mkdir()
        case "a link to nothing":
            lock.path.symlink_to("/nowhere/at/all")
        case "nested":
            lock.path.touch(0o600)
            lock.path.write_bytes(b"[" * 15_000)
        case _:
            lock.path.write_bytes(b"x" * (1 << 20))
    assert lock.on()
    assert lock.said() == "the server is locked, and answers no calls"
    assert not lock.begin("now", "me", None)


def test_what_is_open_ends_once_and_nobody_is_valid_until_it_is_lifted(home: Home) -> None:
    door = Authenticator(home.folder / "tokens.yaml", home.folder / "users.yaml")
    told: list[dict[str, str]] = []
    door.ended = told.append
    (home.folder / "tokens.yaml").unlink()
    (home.folder / "users.yaml").unlink()
    (home.folder / "tenants.yaml").unlink()
    caller = door.local()
    assert door.still_valid(caller)
    door.lockdown.path.touch()
    for _ in range(2):
        with pytest.raises(LockedError):
            door.local()
    assert told == [{"": "the server is locked"}]
    assert not door.still_valid(caller)
    door.lockdown.lift()
    assert door.still_valid(door.local())
    door.close()


@pytest.fixture
def two_workers(make_site: MakeSite, newest_shop: Shop) -> Site:
    return make_site(newest_shop, extra="server: {workers: 2}\n").start()


def test_no_worker_answers_a_call_after_it_and_what_runs_is_cut(two_workers: Site) -> None:
    at = two_workers
    name, text = at.token()
    with at.client(text) as a:
        assert a.rows("select 1") == [[1]]
        bobs, secret = at.token("bob")
        with at.client(secret) as b:  # it is cut, and no command asks what was
            other = in_background(b.call, "query_database", {"query": "select pg_sleep(20)"})
            eventually(lambda: at.shop.backends("query ~ 'pg_sleep' AND state = 'active'"))
            tokens.remove(tokens.token_file(at.folder / "tokens.yaml"), bobs)
            assert other.result().status_code == 401
        running = in_background(a.call, "query_database", {"query": "select pg_sleep(20)"})
        eventually(lambda: at.shop.backends("query ~ 'pg_sleep' AND state = 'active'"))
        done = at.run("lockdown", "--reason", "now")
        assert "cut: 1 query, 0 backends left" in done.stdout
        assert running.result().status_code == 503
        base = at.url.removesuffix("/mcp")
        for _ in range(20):  # a connection each, so that both workers are asked
            with at.client(text) as other:
                answer = other.call("whoami")
            assert (answer.status_code, "the server is locked" in answer.text) == (503, True)
            assert httpx.post(at.url, content=b"{}", trust_env=False).status_code == 401
            assert httpx.get(f"{base}/ready", trust_env=False).status_code == 503
            assert httpx.get(f"{base}/health", trust_env=False).status_code == 200
        knocked = next(line for line in reversed(at.audit()) if line.get("token") == name)
        assert (knocked["event"], knocked["user"], "is locked" in knocked["reason"]) == ("auth.refused", "alice", True)
        assert "Unauthorized: the server is locked" not in "".join(at.stderr)
        assert at.shop.backends("state = 'active'") == []
        assert "ON: the server is locked" in at.run("status").stdout
        at.stop()
        at.start()
        with at.client(text) as other:
            assert other.call("whoami").status_code == 503
            at.run("lockdown", "--lift")
            assert other.rows("select 2") == [[2]]
    assert "calls are answered again" in "".join(at.stderr)


def test_on_stdio_a_call_is_answered_with_an_error_of_the_tool(make_site: MakeSite, newest_shop: Shop) -> None:
    at = make_site(newest_shop)
    _, text = at.token()
    for variables in ({"MCPCTL_TOKEN": text}, {}):
        process = subprocess.Popen(
            [*COMMAND, "serve", "--stdio", "--config", str(at.config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=environment(**variables), text=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            results = []
            for locked in (False, True, False):
                at.run("lockdown", *([] if locked else ["--lift"]))
                meta = {
                    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
                    "io.modelcontextprotocol/clientCapabilities": {},
                }
                params = {"name": "whoami", "arguments": {}, "_meta": meta}
                call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
                process.stdin.write(json.dumps(call) + "\n")
                process.stdin.flush()
                results.append(json.loads(process.stdout.readline())["result"])
            assert [one.get("isError", False) for one in results] == [False, True, False]
            assert "the server is locked" in results[1]["content"][0]["text"]
            call["params"] = {**params, "name": "query_database", "arguments": {"query": "select pg_sleep(20)"}}
            process.stdin.write(json.dumps(call) + "\n")
            process.stdin.flush()
            eventually(lambda: at.shop.backends("query ~ 'pg_sleep' AND state = 'active'"))
            at.run("lockdown")
            assert "the server is locked" in process.stdout.readline()
        finally:
            process.stdin.close()
            process.stdout.close()
            process.wait(10)


def test_a_lockdown_by_hand_leaves_one_line_and_so_does_its_end_whoever_lifts_it(two_workers: Site) -> None:
    at = two_workers

    def told() -> list[tuple[str, bool]]:
        found = [line for line in at.audit() if line["event"] in ("server.locked", "server.unlocked")]
        return [(line["event"].partition(".")[2], line["reason"].endswith(" by hand")) for line in found]

    expected = [("locked", True), ("unlocked", True), ("locked", False), ("unlocked", True), ("locked", True)]
    for number, step in enumerate(("touch", "rm", "lockdown", "rm", "touch")):
        if step == "lockdown":
            at.run("lockdown")
        elif step == "touch":
            (at.folder / "lockdown").touch(0o600)
        else:
            (at.folder / "lockdown").unlink()
        eventually(lambda: len(told()) > number)  # noqa: B023
    at.run("lockdown", "--lift")
    at.stop()
    assert told() == [*expected, ("unlocked", False)]


def test_a_revocation_that_can_be_written_nowhere_is_done_by_the_servers_until_they_restart(
    make_site: MakeSite, newest_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = make_site(newest_shop).start()
    name, text = at.token()
    _, other = at.token("bob")
    with at.client(text) as a, at.client(other) as b:
        assert a.rows("select 1") == [[1]]
        before = (at.folder / "tokens.yaml").read_bytes()
        limited = ["prlimit", "--fsize=10", *COMMAND, "--config", str(at.config), "token", "revoke", name]
        done = subprocess.run(limited, capture_output=True, text=True, check=False, env=environment(), timeout=60)
        assert done.returncode == 1, done.stderr
        assert f"but the running servers keep {name} out until they restart" in done.stderr
        assert (at.folder / "tokens.yaml").read_bytes() == before
        assert [path for path in os.listdir(at.folder) if path.endswith(".tmp")] == []
        assert a.call("whoami").status_code == 401
        assert b.rows("select 1") == [[1]]
        assert f"kept out\t{name}: only until a restart" in at.run("status").stdout
        at.run("token", "revoke", name)
        assert "kept out" not in at.run("status").stdout
        assert [one["lifted"] for one in control.ask_all(at.folder, {"do": "lock", "now": True})] == [False]
        at.run("config", "reload")
        assert b.call("whoami").status_code == 503
        assert at.run("lockdown", "--lift").stdout == "calls are answered again\n"
        assert b.rows("select 1") == [[1]]
        assert a.call("whoami").status_code == 401
    at.stop()
    with at.start().client(text) as a:
        assert a.call("whoami").status_code == 401


def test_who_holds_the_token_file_is_named_and_the_servers_are_told_meanwhile(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, _ = home.token()
    found, file = config.load(home.config, {}), tokens.token_file(home.folder / "tokens.yaml")
    monkeypatch.setattr(taking, "WAITED", 0.05)
    monkeypatch.setattr(taking, "TOLD", 0.1)
    monkeypatch.setattr(private_file, "PATIENCE", 0.5)
    with process(home.folder, "1", b"{}\n") as asked, private_file.edit(file.path):
        with pytest.raises(Error, match=f"held by another .* keep {name} out"), taking.taking(found, [name], "by me"):
            tokens.revoke(file, [name], tokens.utcnow())
        assert asked == [{"do": "bar", "tokens": [name]}]
    assert f"waiting for process {os.getpid()} (" in capsys.readouterr().err


def test_a_token_file_that_may_not_be_written_is_no_obstacle_and_the_log_says_what_was_done(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home("user", "add", "alice")
    name, _ = home.token("--user", "alice")
    found, file = config.load(home.config, {}), tokens.token_file(home.folder / "tokens.yaml")
    with process(home.folder, "1", b"{}\n") as asked, monkeypatch.context() as patched:
        real = os.open

        def immutable(path: str | Path, flags: int, *more: int, **options: int) -> int:
            if flags & os.O_RDWR and Path(path) == file.path:
                raise PermissionError(1, "Operation not permitted")
            return real(path, flags, *more, **options)

        patched.setattr(os, "open", immutable)
        with (
            pytest.raises(Error, match=f"not permitted; but .* keep {name} out until they restart") as caught,
            taking.taking(found, [name], "a leak; by me"),
        ):
            tokens.revoke(file, [name], tokens.utcnow())
        assert (caught.value.exit_code, asked) == (1, [{"do": "bar", "tokens": [name]}])
    line = lines(home.folder / "audit.jsonl")[-1]
    assert (line["event"], line["token"], line["user"]) == ("token.revoked", name, "alice")
    assert line["reason"].startswith("by the running servers alone, until they restart, since tokens.yaml")
    assert line["reason"].endswith("; a leak; by me")


def test_a_fault_in_the_config_stops_nothing_that_an_incident_needs(home: Home) -> None:
    home("user", "add", "alice")
    name, _ = home.token("--user", "alice")
    home.config.write_text(home.config.read_text() + "limits: {max_rows: many}\n")
    assert home("token", "list").code == 3
    for command in (("token", "revoke", name), ("user", "disable", "alice"), ("lockdown",)):
        done = home(*command)
        assert (done.code, "limits.max_rows" in done.err) == (0, True), done.err
    for command in (("status",), ("session", "revoke", name), ("session", "list"), ("top", "--once")):
        assert home(*command).code == 1
    report = ("incident", "report", "--token", name)
    for command in (report, ("audit", "tail"), ("audit", "top", "--by", "ip"), ("audit", "who-read", "public.x")):
        done = home(*command)
        assert (done.code, "limits.max_rows" in done.err) == (0, True), done.err
    events = [line["event"] for line in lines(home.folder / "audit.jsonl")]
    assert events[-3:] == ["token.revoked", "user.disabled", "server.locked"]


def test_who_comes_without_a_token_is_told_that_the_server_was_locked() -> None:
    assert ended(LOCAL) == "the server was locked while the call ran"
