"""mcpctl doctor, the command: with much broken at once, what it says, and what --fix does."""

from __future__ import annotations

import json
import os
import re
import socket
from typing import Any

import pytest

from mcpctl.backup import restoring
from mcpctl.diagnosis.examine import elsewhere
from mcpctl.diagnosis.patient import FAIL, SKIP, Patient
from mcpctl.identity import tokens
from site_of_mcpctl import READER, command
from ward import END, Original, Plant, Ward, half_written


def doctor(ward: Ward, *arguments: str, **environ: str) -> tuple[int, Any]:
    """Exit code and answer of `mcpctl doctor --json`."""
    done = command("--config", str(ward.config), "doctor", "--json", *arguments, env={**ward.environ, **environ})
    return done.returncode, json.loads(done.stdout)


def test_with_much_broken_at_once_each_is_told_once_and_the_rest_is_looked_at(ward: Ward) -> None:
    ward.file("tokens.yaml").chmod(0o644)
    ward.file("state.db").write_text("junk")
    ward.file("lockdown").touch(0o600)
    ward.file(".reserve").unlink()
    ward.file("audit.key").write_text("junk")
    ward.edit("config.yaml", f"user: {READER}", "user: nobody_of_us")
    found = ward.wrong()
    assert {one.name for one in found} == {
        "modes.open", "state.broken", "lockdown.on", "leftovers.no-reserve", "audit.broken", "database.unreachable",
    }  # fmt: skip
    assert len(found) == 6


def test_a_check_that_hangs_is_left_and_says_so(ward: Ward) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        text = re.sub(r"databases:.*", "", ward.config.read_text(), flags=re.DOTALL)
        ward.config.write_text(
            f"{text}databases: {{mute: {{host: 127.0.0.1, port: {silent.getsockname()[1]}, user: u}}}}"
        )
        found = elsewhere(Patient(ward.settings, {}, None, ward.now(), ward.environ), patience=0.3)
    assert [(one.name, one.status) for one in found if one.status != SKIP] == [("database.slow", FAIL)]


def test_a_fault_of_a_check_is_told_as_one(ward: Ward) -> None:
    ward.changes["disk"] = lambda path: 1 / 0
    (found,) = ward.wrong()
    assert (found.name, found.status) == ("disk.broken", FAIL)
    assert "ZeroDivisionError" in found.what


def test_a_restore_that_has_taken_the_config_away_is_told_as_interrupted(ward: Ward) -> None:
    ward.config.rename(ward.file("aside.yaml"))
    ward.file(".restore").touch(0o600)
    code, told = doctor(ward)
    wrong = [one["name"] for one in told["checks"] if one["status"] == "failed"]
    assert (code, wrong) == (1, ["config.broken", "restores.unfinished"])


def test_folders_alone_are_taken_for_what_a_restore_has_unpacked(ward: Ward) -> None:
    folder = ward.file(".mcpctl-restore-0123")
    folder.mkdir(0o700)
    os.mkfifo(ward.file(".mcpctl-restore-pipe"))
    ward.file(".mcpctl-restore-link").symlink_to(ward.config.parent)
    assert restoring.unpacked(ward.settings) == [folder]


def test_the_command_says_it_as_documented_and_exits_one_where_something_is_wrong(ward: Ward) -> None:
    code, told = doctor(ward)
    assert (code, told["ok"], told["mended"]) == (0, True, [])
    assert {one["status"] for one in told["checks"]} <= {"ok", "skipped", "warning"}
    assert all(one.keys() == {"name", "check", "status", "message", "hint", "fixable"} for one in told["checks"])
    ward.file("lockdown").touch(0o600)
    code, told = doctor(ward)
    assert (code, told["ok"]) == (1, False)
    (locked,) = [one for one in told["checks"] if one["status"] == "failed"]
    assert (locked["name"], locked["check"], locked["fixable"]) == ("lockdown.on", "lockdown", False)
    assert locked["hint"] == "mcpctl lockdown --lift"


def test_fix_mends_writes_down_what_it_did_and_a_second_one_has_nothing_to_do(ward: Ward) -> None:
    for name in ("config.yaml", "admin.dsn", "tokens.yaml"):
        ward.file(name).chmod(0o644)
    half_written(ward)
    code, told = doctor(ward)
    assert code == 1
    fixable = {one["message"].split(" ")[0] for one in told["checks"] if one["fixable"]}
    assert {str(ward.file(name)) for name in ("config.yaml", "admin.dsn", "tokens.yaml")} <= fixable
    code, told = doctor(ward, "--fix")
    assert (code, told["ok"]) == (0, True)
    assert sorted(one["name"] for one in told["mended"]) == ["leftovers.halves", *["modes.open"] * 3]
    assert not any(one["problem"] for one in told["mended"])
    lines = map(json.loads, ward.file("audit.jsonl").read_text().splitlines())
    reasons = [line["reason"] for line in lines if line["event"] == "doctor.mended"]
    assert len(reasons) == 4
    assert any(f"chmod 0600 {ward.file('tokens.yaml')}; by " in one for one in reasons)
    assert ward.config.stat().st_mode & 0o777 == 0o640
    code, told = doctor(ward, "--fix")
    assert (code, told["mended"]) == (0, [])


def test_fix_trusts_nothing_that_others_could_have_written(ward: Ward) -> None:
    users_file, tokens_file = ward.file("users.yaml"), ward.file("tokens.yaml")
    users_file.chmod(0o662)
    os.link(tokens_file, ward.file("another name"))
    tokens_file.chmod(0o644)
    code, told = doctor(ward, "--fix")
    assert code == 1
    assert users_file.stat().st_mode & 0o777 == 0o662
    assert tokens_file.stat().st_mode & 0o777 == 0o644
    assert [one["problem"] is None for one in told["mended"]] == [False]
    assert "mended" not in ward.file("audit.jsonl").read_text()


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (lambda ward: ward.config.unlink(), "config.broken"),
        (lambda ward: ward.config.write_text("a: ["), "config.broken"),
        (lambda ward: ward.config.chmod(0o666), "modes.written"),
        (lambda ward: ward.folder.chmod(0o777), "modes.folder"),
        (lambda ward: ward.add("junk: 1"), "config.broken"),
        (lambda ward: ward.file("admin.dsn").write_text("nonsense"), "administrator.broken"),
        (lambda ward: ward.file("admin.dsn").chmod(0o666), "modes.written"),
    ],
)
def test_what_cannot_be_read_at_all_is_told_and_does_not_stop_it(ward: Ward, plant: Plant, name: str) -> None:
    plant(ward)
    code, told = doctor(ward)
    assert (code, told["ok"]) == (1, False)
    assert [one["name"] for one in told["checks"] if one["status"] == "failed"] == [name]
    assert [one for one in told["checks"] if one["name"] == "versions"]


def test_of_a_server_that_runs_it_asks_what_a_client_would(ward: Ward, original: Original) -> None:
    """With its own certificate; then that one is renewed, and calls are locked out."""
    from site_of_mcpctl import UNLIMITED, environment, starter

    text = re.sub(r"server: .*\n", "server: {tls: {cert: cert.pem, key: key.pem}}\n", ward.config.read_text())
    ward.config.write_text(text)
    ward.certificate("127.0.0.1")
    started = starter().start(["--config", str(ward.config), "serve", "--port", "0"], environment(**UNLIMITED))
    try:
        assert started.stderr is not None
        assert any(line.startswith("serving at https://") for line in started.stderr)
        assert ward.wrong() == []
        assert [one.what for one in ward.look() if "is up and ready" in one.what]
        wanted = tokens.Wanted(user="alice", expires_at=END)
        entry, text = tokens.add(tokens.token_file(ward.file("tokens.yaml")), wanted, tokens.utcnow())
        ward.changes["token"] = text
        ward.do("ALTER ROLE mcp_alice_r NOLOGIN")
        (answered,) = [one for one in ward.look() if one.name.startswith("calls")]
        ward.do("ALTER ROLE mcp_alice_r LOGIN")
        assert (answered.name, "in team" in answered.what) == ("calls.refused", True), answered
        (answered,) = [one for one in ward.look() if one.name.startswith("calls")]
        assert answered.what.endswith("answers calls: shop, team"), answered
        tokens.revoke(tokens.token_file(ward.file("tokens.yaml")), [entry.id], tokens.utcnow())
        (answered,) = [one for one in ward.look() if one.name.startswith("calls")]
        assert (answered.name, " 401 " in answered.what) == ("calls.refused", True), answered
        assert text not in f"{answered}"
        del ward.changes["token"]
        ward.environ = {}
        assert {one.name for one in ward.wrong()} == {"certificate.chain", "server.tls"}
        ward.environ = {"SSL_CERT_FILE": str(ward.file("ca.pem"))}
        ward.file("lockdown").touch(0o600)
        assert {one.name for one in ward.wrong()} == {"lockdown.on", "server.not-ready"}
    finally:
        started.kill()
        started.wait()
        started.stderr.close()
