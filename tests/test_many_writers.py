"""Done-when 6: many commands at once beside a running server, and root on the files of the service's user."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chain import verify
from command_line import Done, Home, run
from mcpctl.audit import log as audit_log
from mcpctl.identity import tokens, users
from site_of_mcpctl import Shop, Site, environment, starter

FILES = [
    ".reserve", "audit.jsonl", "audit.jsonl.lock", "audit.key", "config.yaml", "secret.key", "state.db",
    "tenants.yaml", "tokens.yaml", "users.yaml",
]  # fmt: skip
ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="only root can work on the files of another user")
PROCESSES, EACH = 20, 10

_ADD = """
import os, sys
from mcpctl.cli import main
processes, each = int(sys.argv[1]), int(sys.argv[2])
children = []
for _ in range(processes):
    if (pid := os.fork()) == 0:
        sys.exit(max(main._run(["--config", *sys.argv[3:]]) for number in range(each)))
    children.append(pid)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255 for pid in children))
"""


def test_twenty_processes_add_ten_tokens_each_while_the_server_runs_and_all_of_them_work(
    make_site: Callable[..., Site], newest_shop: Shop, tmp_path: Path
) -> None:
    at = make_site(newest_shop).start()
    first_id, first = at.token()
    add = [str(at.config), "token", "add", "--user", "alice", "--expiry", "1d"]
    with (tmp_path / "added").open("a+") as out:  # each line at once, at the end of what is there
        adding = subprocess.Popen(
            [sys.executable, "-c", _ADD, str(PROCESSES), str(EACH), *add],
            stdout=out, stderr=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        asked = 0
        with at.client(first) as client:
            while adding.poll() is None:
                assert client.rows("select 1") == [[1]]  # whoever asks meanwhile notices nothing
                asked += 1
                time.sleep(0.02)
        _, err = adding.communicate(timeout=120)
        assert adding.returncode == 0, err
        out.seek(0)
        texts = out.read().split()
    assert asked > 0
    assert (len(set(texts)), len(texts)) == (PROCESSES * EACH, PROCESSES * EACH)

    def works(text: str) -> bool:
        with at.client(text) as client:
            answer = client.call("whoami")
            return answer.status_code == 200 and text.split("_")[1] in answer.text

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(works, texts))
    found = at.tokens.current()
    assert set(found) == {first_id, *(text.split("_")[1] for text in texts)}
    assert stat.S_IMODE(at.tokens.path.stat().st_mode) == 0o600
    added = [line["token"] for line in at.audit() if line["event"] == "token.added"]
    assert sorted(added) == sorted(text.split("_")[1] for text in texts)
    verify(at.folder / "audit.jsonl", key=bytes.fromhex((at.folder / "audit.key").read_text()))
    assert [path.name for path in at.folder.iterdir() if path.name.endswith(".tmp")] == []


# -- root, and the files of the service's user -------------------------------------------------------------------

State = dict[str, tuple[int, int, int]]


class Service(Home):
    """An installation that belongs to an ordinary user, in a folder of that user's."""

    def __init__(self, folder: Path, uid: int, gid: int) -> None:
        super().__init__(folder)
        self.uid, self.gid = uid, gid
        now = tokens.utcnow()
        users.add(users.user_file(folder / "users.yaml"), "alice", None, now)
        tokens.add(tokens.token_file(folder / "tokens.yaml"), tokens.Wanted(), now)
        log = audit_log.AuditLog(folder / "audit.jsonl", audit_log.read_key(folder / "audit.key"), tokens.utcnow)
        log.append("user.added", user="alice")
        log.close()
        for path in (folder, *folder.iterdir()):
            os.chown(path, uid, gid)

    def state(self) -> State:
        """Owner, group and mode of every file."""
        found = {path.name: path.lstat() for path in self.folder.iterdir()}
        return {name: (about.st_uid, about.st_gid, about.st_mode) for name, about in found.items()}

    def add(self) -> Done:
        return self("token", "add", "--user", "alice", "--expiry", "1d")

    def as_user(self, uid: int, gid: int, *arguments: str) -> Done:
        """mcpctl as a user who may not even be able to read this Python: what it needs is imported before."""
        done = starter().run(["--config", str(self.config), *arguments], b"", environment(), 60, user=(uid, gid))
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    def as_its_user(self, *arguments: str) -> Done:
        return self.as_user(self.uid, self.gid, *arguments)


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder that another user can come into, as tmp_path is not."""
    found = Path(tempfile.mkdtemp(prefix="mcpctl-test-"))
    found.chmod(0o755)
    yield found
    shutil.rmtree(found)


@pytest.fixture(params=["its own group", "another group", "root's group", "no entry"])
def service(request: pytest.FixtureRequest, outside: Path) -> Service:
    import pwd

    entry = pwd.getpwnam("nobody")
    uid, gid = {
        "its own group": (entry.pw_uid, entry.pw_gid),
        "another group": (entry.pw_uid, 4711),
        "root's group": (entry.pw_uid, 0),
        "no entry": (54321, 54321),
    }[request.param]
    return Service(outside / "service", uid, gid)


@needs_root
def test_root_adds_a_token_and_every_file_keeps_its_owner_and_mode(service: Service) -> None:
    before = service.state()
    assert sorted(before) == FILES
    for _ in range(2):
        assert service.add().good.startswith("mcp_")
    assert service("user", "add", "bob").code == 0
    assert service("token", "revoke", "--all").code == 0
    assert service.state() == before
    verify(service.folder / "audit.jsonl", key=bytes.fromhex((service.folder / "audit.key").read_text()))


@needs_root
def test_what_root_makes_anew_belongs_to_the_service(service: Service) -> None:
    (service.folder / "audit.jsonl").unlink()
    (service.folder / "audit.jsonl.lock").unlink()
    assert service.add().code == 0
    for name in ("audit.jsonl", "audit.jsonl.lock"):
        uid, _, mode = service.state()[name]
        assert (uid, stat.S_IMODE(mode)) == (service.uid, 0o600)
    assert service.as_its_user("token", "list").good.count("\n") == 2


@needs_root
def test_the_services_user_can_work_on_its_files_whatever_group_they_have(service: Service) -> None:
    done = service.as_its_user("token", "add", "--user", "alice", "--expiry", "1d")
    assert done.good.startswith("mcp_")
    uid, _, mode = service.state()["tokens.yaml"]
    assert (uid, stat.S_IMODE(mode)) == (service.uid, 0o600)
    assert service.add().code == 0


@needs_root
def test_a_config_of_roots_own_that_the_service_may_read_serves_both(service: Service) -> None:
    os.chown(service.config, 0, service.gid)
    service.config.chmod(0o640)
    before = service.state()
    assert service.add().code == 0
    assert service.state() == before
    assert service.as_its_user("token", "list").good.count("\n") == 2


@needs_root
@pytest.mark.parametrize("planter", ["the service", "root"])
@pytest.mark.parametrize("target", ["root's file", "nothing yet", "an open folder", "its own folder", "root's folder"])
@pytest.mark.parametrize(
    "name", ["tokens.yaml", "users.yaml", "audit.jsonl", "audit.jsonl.lock", "config.yaml", "audit.key"]
)
def test_a_link_planted_in_the_services_folder_is_refused_and_its_target_untouched(
    outside: Path, name: str, target: str, planter: str
) -> None:
    import pwd

    entry = pwd.getpwnam("nobody")
    service = Service(outside / "service", entry.pw_uid, entry.pw_gid)
    roots = outside / "roots"
    roots.mkdir(mode=0o755 if target != "root's folder" else 0o700)
    path, aim = service.folder / name, roots / "aim"
    content = path.read_bytes()
    if target != "nothing yet":
        aim.write_bytes(content)
        aim.chmod(0o600)
    if target in ("an open folder", "its own folder"):
        other = outside / "other"
        other.mkdir()
        os.chown(other, service.uid, service.gid)
        other.chmod(0o777 if target == "an open folder" else 0o700)
        aim = aim.rename(other / "aim")
        os.chown(aim, service.uid, service.gid)
    path.unlink()
    path.symlink_to(aim)
    if planter == "the service":
        os.chown(path, service.uid, service.gid, follow_symlinks=False)
    before = (service.state(), aim.exists() and (aim.read_bytes(), aim.stat()))
    done = service.add()
    assert (done.code, done.out) == (3, ""), done
    assert name in done.error
    assert "mcpctl: hint: " in done.error
    assert (service.state(), aim.exists() and (aim.read_bytes(), aim.stat())) == before


@needs_root
@pytest.mark.parametrize("name", ["audit.jsonl", "audit.jsonl.lock", "audit.key"])
def test_a_link_in_place_of_the_audit_log_does_not_stop_roots_revocation(
    service: Service, tmp_path: Path, name: str
) -> None:
    path, aim = service.folder / name, tmp_path / "aim"
    aim.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(aim)
    before = aim.read_bytes()
    [token] = [line.split("\t")[0] for line in service("token", "list").good.splitlines()]
    done = service("token", "revoke", token)
    assert done.good.startswith(f"{token} revoked\n")
    assert "done, but not in the audit log" in done.err
    assert aim.read_bytes() == before
    assert "revoked" in service("token", "list").good


@needs_root
def test_root_that_works_on_the_services_files_is_root_no_more(service: Service) -> None:
    work = (
        "import os, sys; from pathlib import Path; from mcpctl import private_file\n"
        "private_file.become_owner(Path(sys.argv[1]))\n"
        "print(os.getresuid(), os.getresgid()[0] == 0, 0 in os.getgroups())\n"
        "try:\n    os.setuid(0)\nexcept PermissionError:\n    print('for good')"
    )
    done = subprocess.run(
        [sys.executable, "-c", work, str(service.folder / "tokens.yaml")],
        capture_output=True, text=True, env=environment(), timeout=60,
    )  # fmt: skip
    in_roots_group = service.gid == 0  # kept as a further one, for the files to keep theirs
    assert done.stdout == f"{(service.uid,) * 3} False {in_roots_group}\nfor good\n", done.stderr


@needs_root
def test_a_python_that_the_services_user_cannot_read_is_told_with_the_folder_that_is_closed(outside: Path) -> None:
    (closed := outside / "closed").mkdir(mode=0o700)
    work = (
        "import os, sys; from mcpctl import errors; from mcpctl.cli import serve\nos.setuid(65534)\n"
        "os.__file__ = sys.argv[1]\n"
        "try:\n    serve._check_that_python_can_be_read()\n"
        "except errors.ConfigError as problem:\n    print(problem.hint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", work, str(closed / "lib" / "os.py")],
        capture_output=True, text=True, env=environment(), timeout=60,
    )  # fmt: skip
    assert done.stdout.startswith(f"{closed} is closed to it: install mcpctl where"), done.stderr


@needs_root
def test_who_was_root_looks_for_certificates_in_the_services_home_and_not_in_roots(service: Service) -> None:
    import pwd

    work = (
        "import os, sys; from pathlib import Path; from mcpctl import private_file\n"
        "private_file.become_owner(Path(sys.argv[1]))\nprint(os.environ['HOME'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", work, str(service.folder / "tokens.yaml")],
        capture_output=True, text=True, env=environment(HOME="/root"), timeout=60,
    )  # fmt: skip
    home = next((entry.pw_dir for entry in pwd.getpwall() if entry.pw_uid == service.uid), "/")
    assert done.stdout == f"{home}\n", done.stderr


@needs_root
def test_root_makes_a_new_installation_in_the_services_folder_the_services(outside: Path) -> None:
    import pwd

    entry = pwd.getpwnam("nobody")
    folder = outside / "new"
    folder.mkdir(mode=0o700)
    os.chown(folder, entry.pw_uid, entry.pw_gid)
    assert run("init", str(folder)).code == 0
    assert {path.stat().st_uid for path in folder.iterdir()} == {entry.pw_uid}


@needs_root
def test_an_out_file_that_the_services_user_may_not_make_is_an_error_before_there_is_a_token(
    service: Service, outside: Path
) -> None:
    done = service("token", "add", "--user", "alice", "--expiry", "1d", "--out", str(outside / "token"))
    assert (done.code, done.out) == (3, "")
    import pwd

    try:
        user = pwd.getpwuid(service.uid).pw_name
    except KeyError:
        user = f"uid {service.uid}"
    assert f"a folder that {user} may write; run as root, mcpctl works as the owner of its files" in done.error
    assert service("token", "list").good.count("\n") == 1


@needs_root
def test_another_user_can_neither_read_nor_change_nor_lock_the_services_files(service: Service) -> None:
    for arguments in (["token", "list"], ["token", "revoke", "--all"], ["audit", "tail"]):
        done = service.as_user(12345, 12345, *arguments)
        assert (done.code, done.out) == (3, ""), done
        assert "mcpctl: hint: " in done.error
