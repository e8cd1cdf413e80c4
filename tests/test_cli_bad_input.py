"""Whatever the command line is fed: one error, an exit code of its kind, no traceback, and nothing changed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from command_line import Home, run

ROOT = os.geteuid() == 0


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found = Home(tmp_path / "home")
    found("user", "add", "alice")
    return found


def all_of(home: Home, commands: list[list[str]], codes: set[int]) -> None:
    """Each of the commands fails with one of these codes, says why, and leaves every file as it is."""
    before = home.files()
    with ThreadPoolExecutor(4) as pool:
        for arguments, done in zip(commands, pool.map(lambda found: home(*found), commands), strict=True):
            assert done.code in codes, (arguments, done)
            assert done.out == "", (arguments, done)
            assert "mcpctl: hint: " in done.error, (arguments, done)
            assert "\x1b" not in done.err, (arguments, done)
    assert home.files() == before


ODD = [
    "",
    " ",
    "-",
    "--",
    "\x1b[31mred",
    "a\nb",
    "\udcff\udcfe",
    "é" * 500,
    "x" * 50_000,
    "%s%n{}",
    "../../etc",
    "'\";`$(id)",
]


def test_odd_expiries_are_usage_errors(home: Home) -> None:
    odd = [
        *ODD, "0", "0d", "-1d", "1", "d", "99999999999y", "9" * 5000 + "d", "1e5d", "0000-00-00", "2026-02-30",
        "1999-01-01", "9999-12-31T23:59:59-23:59", "2999-01-01T00:00:00", "nan", "infd", "NEVER", "null", "1d1d", "٣d",
    ]  # fmt: skip
    all_of(home, [["token", "add", "--user", "alice", "--expiry", text] for text in odd], {2})


def test_odd_durations_of_other_flags_are_usage_errors(home: Home) -> None:
    name, _ = home.token("--user", "alice")
    odd = ["", "1", "-1h", "99999999999y", "9" * 5000 + "y", "soon", "\udcff"]
    all_of(home, [["token", "rotate", name, "--overlap", text] for text in odd], {2})
    all_of(home, [["token", "rotate", name, "--expiry", text] for text in odd], {2})
    all_of(home, [["token", "list", "--expiring", text] for text in odd], {2})
    all_of(home, [["audit", "tail", "--since", text] for text in [*odd, "0000-00-00", "9999-99-99"]], {2})
    all_of(home, [["audit", "tail", "-n", text] for text in ["", "x", "-1", "1.5", "９" * 5000]], {2})


def test_odd_names_notes_and_limits_are_refused(home: Home) -> None:
    add = ["token", "add", "--expiry", "1d"]
    all_of(home, [["user", "add", "--", text] for text in [*ODD, "Alice", "a" * 32, "a_b", "root:x"]], {2})
    all_of(
        home,
        [["user", "add", "bob", "--note", text] for text in ODD if not text.isprintable() or not text.strip()],
        {2},
    )
    all_of(home, [["user", "add", "bob", "--note", "x" * 50_000]], {2})
    all_of(home, [[*add, "--user", text] for text in ODD], {4})
    all_of(home, [[*add, "--database", text] for text in ODD], {4})
    all_of(home, [[*add, "--note", text] for text in ["", "\x1b[31m", "a\nb", "\udcff", "x" * 1001]], {2})
    all_of(
        home, [[*add, "--permission", text] for text in [*ODD, "tools", "tools:", ":x", "tools: x", "a:b:c:d:e:f"]], {2}
    )
    all_of(
        home,
        [
            [*add, "--allow-ip", text]
            for text in [*ODD, "10.0.0.1/8", "300.1.1.1", "1", "::1/200", "fe80::1%eth0", "localhost"]
        ],
        {2},
    )


def test_odd_ids_exit_4_and_what_is_printed_cannot_steer_the_terminal(home: Home) -> None:
    for command in (["show"], ["rotate"], ["revoke"], ["remove", "--yes"]):
        all_of(home, [["token", *command, "--", text] for text in ODD], {4})


def test_typos_and_flags_that_do_not_go_together_are_usage_errors(home: Home) -> None:
    commands = [
        ["tokn"], ["token", "ad"], ["token", "add", "--expirey", "1d"], ["token", "add", "--user"], ["token", "show"],
        ["token", "show", "a", "b"], ["token", "list", "extra"], ["token", "revoke"], ["token", "revoke", "a", "--all"],
        ["user", "add"], ["user", "add", "a", "b"], ["config", "chekc"], ["audit", "tail", "-x"], ["--no-such-flag"],
        ["--\x1b[31m\n"], ["token", "list", "--json=maybe"], ["serve", "--port", "x"], ["serve", "--port", "70000"],
        ["serve", "--port", "-1"], ["serve", "--workers", "0"], ["serve", "--workers", "11"],
        ["serve", "--stdio", "--http"], ["serve", "--host", ""], ["serve", "--stdio", "--port", "1"],
        ["serve", "--stdio", "--no-auth"], ["serve", "--tls-cert", "x"], ["serve", "--tls-key", "x"],
        ["serve", "--tls-chain", "x"],
        ["demo", "--port", "-5"], ["init", "a", "b"], ["token", "verify", "mcp_on_the_command_line"],
    ]  # fmt: skip
    all_of(home, commands, {2})


def test_a_secret_on_the_command_line_is_not_repeated(home: Home) -> None:
    _, text = home.token()
    for arguments in (
        ["token", "show", text],
        ["token", "revoke", text],
        ["token", "add", "--user", text, "--expiry", "1d"],
        *(
            [*words, typo]
            for typo in (text[:-1] + "_", text[:40])
            for words in (["user", "add"], ["user", "disable"], ["user", "show"], ["tenant", "remove", "--yes"])
        ),
        ["tenant", "add", text[:50], "--database", "shop"],
    ):
        done = home(*arguments)
        assert done.code in (2, 4)
        assert text[13:40] not in done.err, arguments
    dsn = "postgresql://u:a-secret@h/db"
    for arguments in (
        ["user", "grant", "alice", "--access", "read", "--database", dsn],
        ["can", "alice", "select", "s.t", "--database", dsn],
        *(["database", one, dsn] for one in ("test", "remove", "harden", "add")),
    ):
        done = home(*arguments)
        assert done.code in (2, 4)
        assert "a-secret" not in done.err, arguments


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path, 0o600),
        lambda path: None,
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("/nowhere/at/all"),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: (path.touch(), path.chmod(0o644)),
        lambda path: path.write_bytes(b"\xff\xfe\x00") and path.chmod(0o600),
        lambda path: path.write_bytes(b"[" * 1_000_000) and path.chmod(0o600),
        lambda path: path.write_bytes(b"x" * (5 << 20)) and path.chmod(0o600),
    ],
)
def test_a_config_that_is_no_file_for_us_exits_3_at_once(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "config.yaml"
    make(path)
    for arguments in (["config", "check"], ["token", "list"], ["serve"], ["audit", "tail", "-f"]):
        done = run("--config", str(path), *arguments)
        assert (done.code, done.out) == (3, ""), (arguments, done)
        assert str(path) in done.error


def test_an_odd_name_of_a_config_exits_3(tmp_path: Path) -> None:
    for name in (
        "",
        " ",
        "/",
        ".",
        "x" * 5000,
        "\udcff",
        "a\nb",
        "/etc/passwd/x",
        "/dev/null",
        "/dev/tty",
        "/proc/self/mem",
    ):
        done = run("--config", name, "config", "check", cwd=tmp_path)
        assert (done.code, done.out) == (3, ""), (name, done)
        assert done.error
        done = run("config", "check", env={"MCPCTL_CONFIG": name} if name else {"MCPCTL_CONFIG": "/"}, cwd=tmp_path)
        assert (done.code, done.out) == (3, ""), (name, done)


@pytest.mark.skipif(ROOT, reason="root is kept out by no mode")
def test_a_config_in_a_folder_that_is_closed_exits_3(home: Home) -> None:
    home.folder.chmod(0)
    try:
        done = home("token", "list")
        assert (done.code, "mcpctl: hint: " in done.error) == (3, True)
    finally:
        home.folder.chmod(0o700)


@pytest.mark.parametrize("name", ["tokens.yaml", "users.yaml", "audit.key"])
@pytest.mark.parametrize("fault", ["fifo", "folder", "missing", "mode", "binary", "empty"])
def test_a_file_of_ours_that_is_none_exits_3_and_names_itself(home: Home, name: str, fault: str) -> None:
    path = home.folder / name
    path.unlink()
    match fault:
        case "fifo":
            os.mkfifo(path, 0o600)
        case "folder":
            path.mkdir()
        case "mode":
            path.touch(0o644)
            path.chmod(0o644)
        case "binary":
            path.write_bytes(os.urandom(1000))
            path.chmod(0o600)
        case "empty":
            path.touch(0o600)
    for arguments in (["config", "check"], ["token", "add", "--user", "alice", "--expiry", "1d"]):
        done = home(*arguments)
        assert (done.code, done.out) == (3, ""), done
        assert name in done.error
    assert sorted(found.name for found in home.folder.iterdir() if found.suffix == ".tmp") == []


def test_a_variable_with_a_typo_stops_every_command_but_those_of_an_incident(home: Home) -> None:
    for arguments in (["token", "list"], ["config", "check"], ["token", "prune"]):
        done = home(*arguments, env={"MCPCTL_SERVER__PROT": "1"})
        assert (done.code, "did you mean port?" in done.error) == (3, True)
    assert home("token", "revoke", "--all", env={"MCPCTL_SERVER__PROT": "1"}).code == 0  # which an incident needs
    assert home("token", "revoke", "--all", env={"MCPCTL_AUTH_TOKEN_FILE": "elsewhere.yaml"}).code == 3


def test_odd_places_for_a_new_installation_or_a_token_fail_and_leave_nothing(home: Home, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (str(tmp_path / "file"), "/dev/null", "/dev/null/x", "/proc/nowhere", str(tmp_path / ("x" * 300))):
        done = run("init", place)
        assert (done.code, done.out) == (3, ""), (place, done)
        assert "mcpctl: hint: " in done.error
    before = home.files()
    for place in (str(tmp_path / "no" / "x"), "/dev/null/x", "/proc/x", str(tmp_path / ("x" * 300))):
        done = home("token", "add", "--user", "alice", "--expiry", "1d", "--out", place)
        assert (done.code, done.out) == (3, ""), (place, done)
        assert done.error
    assert home.files() == before


def test_a_terminal_that_cannot_show_a_name_and_a_closed_stdin_or_stdout_are_no_crash(home: Home) -> None:
    home("user", "add", "bob", "--note", "Köln 東京")
    done = home("user", "list", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"})
    assert "K\\xf6ln" in done.good
    for descriptor in (0, 2):
        done = home("user", "list", preexec_fn=lambda descriptor=descriptor: os.close(descriptor))
        assert (done.code, done.err) == (0, ""), (descriptor, done)
        assert done.out.count("\n") == 2
    done = home("user", "list", preexec_fn=lambda: os.close(1))
    assert (done.code, "Bad file descriptor" in done.error) == (1, True)
    before = home.files()
    done = home("token", "rotate", "zzzzzzzz", preexec_fn=lambda: (os.close(0), os.close(1), os.close(2)))
    assert (done.code, done.out, done.err) == (4, "", "")
    assert home.files() == before
    done = home("token", "verify", preexec_fn=lambda: os.close(0))
    assert (done.code, done.err) == (1, "")


def test_a_full_disk_changes_nothing_and_says_so(home: Home) -> None:
    import resource

    def nearly_full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    before = {name: data for name, data in home.files().items() if "audit" not in name}
    done = home("token", "add", "--user", "alice", "--expiry", "1d", preexec_fn=nearly_full)
    assert (done.code, done.out) == (1, "")
    assert "nothing was changed" in done.error
    assert {name: data for name, data in home.files().items() if "audit" not in name} == before
    assert [path.name for path in home.folder.iterdir() if path.name.endswith(".tmp")] == []


def test_an_umask_of_zero_or_of_everything_makes_the_same_files(tmp_path: Path) -> None:
    for umask in (0, 0o777):
        folder = tmp_path / f"at-{umask:o}"
        done = run("init", str(folder), preexec_fn=lambda umask=umask: os.umask(umask))
        assert done.code == 0, done
        home = Home.__new__(Home)
        home.folder, home.config = folder, folder / "config.yaml"
        assert home("user", "add", "alice", preexec_fn=lambda umask=umask: os.umask(umask)).code == 0
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_disabled_users_token_is_not_rotated(home: Home) -> None:
    name, _ = home.token("--user", "alice")
    home("user", "disable", "alice")
    all_of(home, [["token", "rotate", name], ["token", "add", "--user", "alice", "--expiry", "1d"]], {5})
