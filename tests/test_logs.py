"""The server's own log: text, JSON, the journal's protocol; a file; statements; and whose request a line belongs to."""

from __future__ import annotations

import array
import json
import logging
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from command_line import Home
from mcpctl.config_keys import Log
from mcpctl.errors import ConfigError
from mcpctl.server import journal, logs
from site_of_mcpctl import Shop, Site, eventually

SECRET = "mcp_abcdefgh_" + "x" * 43 + "_AbC123"
HOSTILE = f"a\x1b[31m\x9b\u2028\u202e\n2026-01-01 00:00:00,000 ERROR mcpctl: forged {SECRET}"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """The loggers belong to all tests of this process."""
    root, names = logging.getLogger(), ("mcpctl", "mcpctl.sql", "psycopg", "mcp", "uvicorn", "uvicorn.error")
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in names}
    filters = list(logging.getLogger("uvicorn.error").filters)
    yield
    for one in set(root.handlers) - set(handlers):
        one.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("uvicorn.error").filters[:] = filters
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


@pytest.fixture
def receiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket that listens as journald's does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as found:
        found.bind(str(tmp_path / "socket"))
        found.settimeout(5)
        monkeypatch.setattr(journal.Journal.__init__, "__defaults__", (str(tmp_path / "socket"),))
        yield found


def entries(data: bytes) -> dict[str, str]:
    """An entry of the native protocol, read as its specification has it."""
    found = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, data = rest[8 : 8 + size], rest[8 + size + 1 :]
        else:
            data = rest
        found[name.decode()] = value.decode()
    return found


def log_into(file: Path, form: str, **more: Any) -> None:
    logs.set_up(Log(format=form, file=file, **more))


def test_text_is_one_line_that_nobody_can_forge_or_make_tell_a_secret(tmp_path: Path) -> None:
    log_into(tmp_path / "log", "text")
    logging.getLogger("mcpctl.audit").warning("Unauthorized: %s client=%s", HOSTILE, "192.0.2.7")
    logging.getLogger("uvicorn.error").error("boom")
    text = (tmp_path / "log").read_text(encoding="utf-8")
    ours, theirs = text.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING mcpctl\.audit: Unauthorized: a.+", ours)
    assert ours.endswith(" client=192.0.2.7")
    assert theirs.endswith(" ERROR uvicorn.error: boom")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]", text)
    assert "x" * 20 not in text
    assert "mcp_abcdefgh_…" in text


def test_json_is_an_object_a_line_with_whose_request_it_was(tmp_path: Path) -> None:
    log_into(tmp_path / "log", "json")
    whose = {"request_id": "abc", "token": "tok", "user": "alice", "tenant": None, "statement": "select 1"}
    logging.getLogger("mcpctl.audit").warning("%s", HOSTILE, extra={"about": whose})
    try:
        raise ValueError(SECRET)
    except ValueError:
        logging.getLogger("mcpctl").exception("failed")
    raw = (tmp_path / "log").read_bytes()
    assert not re.search(b"[^\x20-\x7e\n]", raw)
    assert b"x" * 20 not in raw
    first, second = (json.loads(line) for line in raw.splitlines())
    assert datetime.fromisoformat(first["time"]).utcoffset() is not None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert (first["level"], first["logger"], first["pid"]) == ("warning", "mcpctl.audit", os.getpid())
    assert (first["request_id"], first["token"], first["user"]) == ("abc", "tok", "alice")
    assert not {"tenant", "statement"} & first.keys()
    assert first["message"].startswith("a\x1b[31m")
    assert "ValueError" in second["exception"]


def test_the_journal_gets_fields(receiver: socket.socket) -> None:
    logs.set_up(Log(format="journald"))
    whose = {"request_id": "abc", "token": "tok", "user": "alice"}
    logging.getLogger("mcpctl.audit").warning(
        "Unauthorized: %s client=%s", HOSTILE, "192.0.2.7", extra={"about": whose}
    )
    found = entries(receiver.recv(1 << 20))
    assert found["PRIORITY"] == "4"
    assert found["MESSAGE"].endswith("client=192.0.2.7")
    assert "\n" not in found["MESSAGE"]
    assert "x" * 20 not in found["MESSAGE"]
    named = ("SYSLOG_IDENTIFIER", "MCPCTL_LOGGER", "MCPCTL_REQUEST_ID", "MCPCTL_TOKEN", "MCPCTL_USER")
    assert [found[name] for name in named] == ["mcpctl", "mcpctl.audit", "abc", "tok", "alice"]
    try:
        raise ValueError("wrong")
    except ValueError:
        logging.getLogger("mcpctl").exception("failed")
    lines = entries(receiver.recv(1 << 20))
    assert lines["PRIORITY"] == "3"
    assert lines["MESSAGE"].splitlines()[0] == "failed"
    assert lines["MESSAGE"].splitlines()[-1] == "ValueError: wrong"


def test_an_entry_that_is_too_large_for_a_datagram_comes_in_a_sealed_file(receiver: socket.socket) -> None:
    logs.set_up(Log(format="journald"))
    logging.getLogger("mcpctl").warning("%s", "y" * (8 << 20))
    data, passed, _, _ = receiver.recvmsg(16, socket.CMSG_SPACE(4))
    assert data == b""
    (file,) = array.array("i", passed[0][2])
    with os.fdopen(file, "rb") as found:
        found.seek(0)
        assert entries(found.read())["MESSAGE"] == "y" * (8 << 20)
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(file, 0)


def test_a_line_that_the_journal_does_not_take_goes_to_stderr(
    receiver: socket.socket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.set_up(Log(format="journald"))
    (tmp_path / "socket").unlink()
    logging.getLogger("mcpctl").warning("still here")
    assert "WARNING mcpctl: still here" in capsys.readouterr().err


def test_auto_is_the_journal_only_where_stderr_is_its_stream(
    receiver: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "stream").open("w") as stream:
        found = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        assert journal.is_stderr(stream.fileno())
        assert not journal.is_stderr()
    logs.set_up(Log())
    logging.getLogger("mcpctl").warning("as text")
    assert "WARNING mcpctl: as text" in capsys.readouterr().err
    monkeypatch.setattr(journal, "is_stderr", lambda: True)
    logs.set_up(Log())
    logging.getLogger("mcpctl").warning("with fields")
    assert entries(receiver.recv(1 << 20))["MESSAGE"] == "with fields"


def test_a_file_is_private_and_made_anew_when_it_was_moved_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, old = tmp_path / "sub" / "log", tmp_path / "old"
    file.parent.mkdir()
    log_into(file, "text")
    logging.getLogger("mcpctl").warning("first")
    file.rename(old)
    logging.getLogger("mcpctl").warning("second")
    assert ("first" in old.read_text(), "second" in file.read_text()) == (True, True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.unlink()
    file.parent.rmdir()
    logging.getLogger("mcpctl").warning("third")
    assert "third" in capsys.readouterr().err
    file.parent.mkdir()
    logging.getLogger("mcpctl").warning("fourth")
    assert "fourth" in file.read_text()


def test_a_log_that_cannot_be_written_is_a_fault_of_the_config(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    before = home.config.read_text()
    (home.folder / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(home.folder / "pipe")
    (home.folder / "open").touch()
    (home.folder / "open").chmod(0o664)
    wrong = {
        "{file: nowhere/log}": "nowhere/log cannot be written",
        "{file: audit.jsonl}": "which is another file of mcpctl's",
        "{file: secret.key}": "which is another file of mcpctl's",
        "{file: tokens.yaml}": "which is another file of mcpctl's",
        "{file: config.yaml}": "which is another file of mcpctl's",
        "{file: pipe}": "pipe cannot be written: No such device",
        "{file: open}": "open has mode 0664, which lets others in",
        "{file: link}": "link cannot be written",
        "{file: log, format: journald}": "goes with text or json",
        "{format: yaml}": "auto, text, json, journald",
        "{sql_debug: 1}": "true or false",
    }
    for text, said in wrong.items():
        home.config.write_text(f"{before}log: {text}\n")
        done = home("config", "check")
        assert (done.code, said in done.error) == (3, True), (text, done.err)
        assert "config.yaml:" in done.err
    assert not (tmp_path / "elsewhere").exists()
    if not Path(journal.SOCKET).exists():
        with pytest.raises(ConfigError, match="no journal listens"):
            logs.set_up(Log(format="journald"))


def lines(file: Path, logger: str) -> list[dict[str, Any]]:
    return [one for line in file.read_text().splitlines() if (one := json.loads(line))["logger"] == logger]


def test_a_server_logs_each_call_and_its_statement_where_the_config_wants_that(
    newest_shop: Shop, make_site: Callable[..., Site]
) -> None:
    extra = "log: {level: debug, format: json, file: server.log, sql_debug: true}\naudit: {statements: STATEMENTS}\n"
    site = make_site(newest_shop, extra=extra.replace("STATEMENTS", "full")).start("--workers", "2")
    (alice, token), file = site.token("alice"), site.folder / "server.log"
    with site.client(token) as client, site.client("mcp_nobody") as stranger:
        stranger.call("whoami")
        client.rows("select 'hidden'\n as word")
        client.error("create role bob password 'geheim'")
        call, failed = lines(file, "mcpctl.calls")
        audit = [line for line in site.audit() if line["event"].startswith("tool.")]
        assert [one["request_id"] for one in (call, failed)] == [line["request_id"] for line in audit]
        assert (call["token"], call["user"], call["database"], call["outcome"]) == (alice, "alice", "shop", "ok")
        assert call["message"].startswith("tool.called query_database: shop: ok, ")
        shown, kept = lines(file, "mcpctl.sql")
        assert "select 'hidden'\n as word" in shown["message"]
        assert "geheim" not in file.read_text()
        assert kept["message"].endswith(f"hmac {audit[1]['statement_hmac']}")
        (refused,) = lines(file, "mcpctl.audit")
        assert refused["message"].startswith("Unauthorized: ")
        assert refused["message"].endswith("client=127.0.0.1")
        assert refused["client_ip"] == "127.0.0.1"
        assert len(refused["request_id"]) == 16
        site.config.write_text(site.config.read_text().replace("sql_debug: true", "sql_debug: false"))
        site.run("config", "reload")
        client.rows("select 1")
        assert len(lines(file, "mcpctl.sql")) == 2
        text = site.config.read_text()
        for old, new in (("debug, f", "info, f"), ("server.log", "other.log"), ("full", "hash"), ("false}", "true}")):
            text = text.replace(old, new)
        site.config.write_text(text)
        site.run("config", "reload")
        client.rows("select 'hidden'")
        other = site.folder / "other.log"
        (hashed,) = eventually(lambda: lines(other, "mcpctl.sql"))
        assert re.search(r": hmac [0-9a-f]{64}$", hashed["message"])
        assert not lines(other, "mcpctl.calls")
        site.config.write_text(site.config.read_text().replace("other.log", "no/other.log"))
        kept_on = site.run("config", "reload", check=False)
        assert (kept_on.returncode, "log.file" in kept_on.stderr) == (1, True)
