"""The machine: room on its disks, the program and its versions, and the unit that starts it."""

import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path

import mcpctl
from mcpctl.diagnosis.patient import Check, Finding, Patient, short
from mcpctl.postgres.login import KNOWS_REQUIRE_AUTH
from mcpctl.postgres.look import LIBPQ

PYTHON_ENDS = {
    (3, 11): date(2027, 10, 31),
    (3, 12): date(2028, 10, 31),
    (3, 13): date(2029, 10, 31),
    (3, 14): date(2030, 10, 31),
}
"""Until when Python mends what is found (devguide.python.org/versions)."""
UNIT = "mcpctl.service"
EXPOSURE = 2.0
"""What `systemd-analyze security` may say of the unit at most: of 10, which is no wall at all."""
_FULL, _LOW = 64 << 20, 1 << 30
"""Bytes. Below the second there is time to do something."""
_FEW = 1000
_SECONDS = 10
_LEVEL = re.compile(r"exposure level for \S+: ([0-9.]+)")


def disk(patient: Patient) -> Iterator[Finding]:
    """Room, inodes, and whether the server could write where it has to."""
    if patient.disk is None:
        return
    check, settings = Check("disk"), patient.settings
    wanted = {
        "the audit log": settings.audit.file,
        "the server's store": settings.server.state_file,
        "the tokens": settings.auth.token_file,
    }
    seen: set[tuple[object, ...]] = set()
    room: list[str] = []
    for what, path in wanted.items():
        folder = path.parent
        if not folder.is_dir():
            continue  # said of the modes
        found = patient.disk(folder)
        about = (folder.stat().st_dev, *(getattr(found, name) for name in ("f_bavail", "f_favail", "f_flag")))
        if about in seen:
            continue
        seen.add(about)
        faults = list(_one_disk(check, found, what, folder, written=path is not settings.auth.token_file))
        room += [] if faults else [f"{found.f_bavail * found.f_frsize >> 20} MiB at {folder}"]
        yield from faults
    if room:
        yield check.ok(f"room: {', '.join(room)}")


def _one_disk(check: Check, found: "os.statvfs_result", what: str, folder: Path, *, written: bool) -> Iterator[Finding]:
    free = found.f_bavail * found.f_frsize
    size = f"{free >> 20} MiB are left on the disk of {folder}, where {what} {'are' if what[-1] == 's' else 'is'}"
    if found.f_flag & os.ST_RDONLY and written:
        hint = "calls are refused so: mount it for writing, and see in `dmesg` why it is not"
        yield check.fail("disk.read-only", f"the disk of {folder}, where {what} is, can only be read", hint)
    elif free < _FULL:
        yield check.fail("disk.full", size, "make room: calls are refused while the audit log cannot be written")
    elif free < _LOW:
        hint = "make room, or move older files of the log away: mcpctl audit rotate --gzip"
        yield check.warn("disk.low", size, hint)
    if found.f_files and found.f_favail < _FEW:
        what = f"the disk of {folder} has room for {found.f_favail} more files"
        yield check.fail("disk.inodes", what, "remove small files there: `df -i` shows it, `du --inodes` finds them")


def program(patient: Patient) -> Iterator[Finding]:
    """Whether the user that serves could change the program that serves."""
    if not hasattr(os, "geteuid"):
        return
    check, package = Check("program"), Path(mcpctl.__file__).parent
    if os.geteuid() != 0 and os.access(package, os.W_OK):
        what = f"uid {os.geteuid()}, who runs this, could change the program in {package}"
        hint = "install it as root, such as in /opt/mcpctl, for a server that others use"
        yield check.warn("program.writable", what, hint)
    elif patient.settings.auth.token_file.parent.stat().st_uid == 0:
        hint = "give them to a user of their own, whom nobody logs in as (docs/doctor.md)"
        yield check.warn("program.root", "mcpctl's files are root's, so the server runs as root", hint)
    else:
        yield check.ok("the user that serves cannot change the program")


def versions(now: datetime) -> Iterator[Finding]:
    """Whether what it is made of is still looked after."""
    check, python = Check("versions"), platform.python_version()
    ends = PYTHON_ENDS.get(sys.version_info[:2])
    libpq = f"{LIBPQ // 10000}.{LIBPQ % 10000}"
    yield check.ok(f"mcpctl {mcpctl.__version__}, Python {python}, libpq {libpq}, {ssl.OPENSSL_VERSION}")
    if ends is not None and now.date() > ends:
        what = f"Python {python} gets no more security updates from its makers, since {ends}"
        yield check.warn(
            "versions.python", what, "install mcpctl with a newer one, or see that the system's maker does"
        )
    if not KNOWS_REQUIRE_AUTH:
        what = f"libpq {libpq} cannot be told to refuse a server that asks for the password in clear"
        yield check.warn("versions.libpq", what, "16 or later: pip install 'psycopg[binary]'")


def unit(patient: Patient) -> Iterator[Finding]:
    """How much the installed unit lets the server do (systemd-analyze(1), security)."""
    check = Check("unit")
    found = next((one / UNIT for one in patient.units if (one / UNIT).exists()), None)
    analyze = shutil.which("systemd-analyze", path="/usr/bin:/bin:/usr/local/bin")
    if found is None:
        yield check.skip(f"no {UNIT} is installed here")
        return
    if analyze is None:
        yield check.skip(f"{found} is there, and there is no systemd-analyze to judge it")
        return
    command = [analyze, "security", "--offline=true", "--no-pager", str(found)]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
        said = done.stdout.decode("utf-8", "replace")
    except (OSError, subprocess.TimeoutExpired) as problem:
        said = str(problem)
    level = _LEVEL.search(said)
    if level is None:
        yield check.skip(f"systemd-analyze did not judge {found}: {short(said) or 'it said nothing'}")
        return
    total = float(level[1])
    if total > EXPOSURE:
        what = f"{found} leaves the server more than it needs: exposure {total}, and {EXPOSURE} is enough"
        hint = f"take the unit that comes with mcpctl; `systemd-analyze security {UNIT}` says what is open"
        yield check.warn("unit.exposed", what, hint)
    else:
        yield check.ok(f"{found} has exposure {total}, of at most {EXPOSURE}")
