"""In an incident: a full disk, a log that was tampered with, an interrupt; what takes a right away still does."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from command_line import Home
from mcpctl import private_file
from mcpctl.errors import FullError
from mcpctl.identity import tokens
from site_of_mcpctl import COMMAND, environment


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def _audited(home: Home) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home.folder / "audit.jsonl").read_bytes().splitlines()]


def test_a_revocation_is_on_record_before_the_wait_for_its_proof(home: Home) -> None:
    name, _ = home.token()
    with socket.socket(socket.AF_UNIX) as silent:  # a server that hangs
        silent.bind(str(home.folder / "control.1.abcd1234.sock"))
        silent.listen()
        command = [*COMMAND, "--config", str(home.config), "token", "revoke", name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
            silent.settimeout(30)
            asking, _ = silent.accept()  # and gets no answer
            assert [line["event"] for line in _audited(home)][-1] == "token.revoked"
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=20)
            asking.close()
    assert [line["event"] for line in _audited(home)].count("token.revoked") == 1


def test_a_token_is_revoked_and_removed_on_a_full_disk_and_none_is_added(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, other = home.token()[0], home.token()[0]
    file = tokens.token_file(home.folder / "tokens.yaml")
    open_ = os.open

    def full(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if str(path).endswith(".tmp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open_(path, flags, *more, **others)

    monkeypatch.setattr(os, "open", full)
    now = tokens.utcnow()
    with pytest.raises(FullError, match="nothing was changed"):
        tokens.add(file, tokens.Wanted(), now)
    tokens.revoke(file, [name], now)
    tokens.remove(file, other)
    assert [(one.id, one.status(now)) for one in file.current().values()] == [(name, "revoked")]
    assert (home.folder / "tokens.yaml").stat().st_mode & 0o777 == 0o600

    def no_room(fd: int, offset: int, length: int) -> None:
        os.truncate(fd, offset + 1)  # as far as it came
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    before = private_file.read(file.path).data
    with private_file.edit(file.path) as held, pytest.raises(FullError, match="nothing was changed"):
        held.replace(before + b"# more\n", though_full=True)
    assert private_file.read(file.path).data == before


@pytest.mark.parametrize(
    "line",
    [
        '{"seq":1e999,"hash":"x"}',
        '{"seq":-5,"hash":"é"}',
        "[" * 200_000,
        '{"seq":true,"hash":null}',
        '{"seq":7}',
        "null",
    ],
    ids=lambda line: line[:20],
)
def test_a_log_whose_last_line_was_tampered_with_stops_no_revocation_and_crashes_nothing(home: Home, line: str) -> None:
    name, _ = home.token()
    with (home.folder / "audit.jsonl").open("a") as log:
        log.write(line + "\n")
    done = home("token", "revoke", name)
    assert f"{name} revoked" in done.good
    assert "not in the audit log" in done.err
    assert home("token", "add", "--expiry", "1d").code == 3
    done = home("audit", "tail")
    assert (done.code, "unreadable" in done.out or line.startswith("{")) == (1, True)
    assert "audit.jsonl: 1 lines cannot be read" in done.error


def test_a_follower_sees_that_the_log_was_removed_and_what_comes_after(home: Home) -> None:
    home("user", "add", "ann")
    home("user", "add", "ben")
    command = [*COMMAND, "--config", str(home.config), "audit", "tail", "-f", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        assert [json.loads(process.stdout.readline())["seq"] for _ in range(2)] == [1, 2]
        (home.folder / "audit.jsonl").unlink()
        home("user", "add", "cat")
        assert json.loads(process.stdout.readline())["seq"] == 1
        home("user", "add", "dan")
        assert json.loads(process.stdout.readline())["seq"] == 2
        process.send_signal(signal.SIGINT)
        assert "the chain begins anew" in process.communicate(timeout=20)[1]


def test_a_copy_of_the_log_beside_it_is_not_shown_twice(home: Home) -> None:
    for name in ("ann", "ben", "cat"):
        home("user", "add", name)
    log = home.folder / "audit.jsonl"
    whole = log.read_bytes()
    (home.folder / "audit.jsonl.bak").write_bytes(whole)
    (home.folder / "audit.jsonl.early").write_bytes(whole[: whole.index(b"\n") + 1])
    assert home("audit", "tail", "-n", "100").good.count("\n") == 3


def test_what_looks_like_a_token_is_kept_out_of_notes_and_reasons(home: Home) -> None:
    name, text = home.token()
    assert "holds a token" in home("token", "add", "--expiry", "1d", "--note", f"was {text}").error
    home("token", "revoke", name, "--reason", f"{text} was posted")
    assert text[13:56] not in (home.folder / "audit.jsonl").read_text()
    assert _audited(home)[-1]["reason"].startswith(f"mcp_{name}_… was posted; by ")


def test_a_token_whose_user_is_gone_is_neither_verified_nor_rotated(home: Home) -> None:
    home("user", "add", "alice")
    name, text = home.token("--user", "alice")
    assert home("token", "verify", stdin=text).code == 0
    (home.folder / "users.yaml").write_text("version: 1\nusers: {}\n")
    verified = home("token", "verify", stdin=text)
    assert (verified.code, "its user alice is gone" in verified.out) == (1, True)
    assert home("token", "rotate", name).code == 4
    home("user", "add", "alice")  # another one of that name
    before = (home.folder / "tokens.yaml").read_bytes()
    for more in ([], ["--overlap", "1h"]):
        rotated = home("token", "rotate", name, *more)
        assert (rotated.code, rotated.out) == (5, "")
        assert "was given to an earlier alice" in rotated.error
    assert (home.folder / "tokens.yaml").read_bytes() == before


def test_the_exit_code_tells_even_where_nobody_hears_the_error(home: Home) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "--config", str(home.config), "token", "show", "zzzzzzzz"],
            stderr=full, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=environment(), check=False,
        )  # fmt: skip
    assert done.returncode == 4
