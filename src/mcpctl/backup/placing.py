"""Puts many files into their places, all of them or none: whoever comes after a crash goes on.

What is to be done is written into one file (the journal) when everything lies ready beside its place. Until then
nothing has been changed, and the next run removes what lies there. From then on each step can be done again, and the
next run does them all. Meanwhile the server is locked, so that none starts on half of it.
"""

import contextlib
import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcpctl import private_file
from mcpctl.errors import ConfigError, ConflictError, FullError, NotFoundError
from mcpctl.identity.lockdown import UNFINISHED, Lockdown

PUT, MOVE, DROP = "put", "move", "drop"
"""A file into its place; one that is there, out of it; one that belonged to another that is replaced, away."""
_READY = ".restored"
_LEAVING = ".leaving"
"""Ends the name of what is on its way to another disk."""
_SPARE = 1 << 20
"""Bytes of that disk that stay free."""


@dataclass(frozen=True)
class Step:
    """One of them. Of a DROP `to` is empty. `mode` is the file's, for PUT."""

    do: str
    path: str
    to: str = ""
    mode: int = 0o600


@dataclass(frozen=True)
class Journal:
    """What is to be done, and `said` of it afterwards. `end_sessions`: of those in the store, all."""

    config: str
    token_file: str
    steps: tuple[Step, ...]
    said: str
    end_sessions: bool
    locked: bool


def journal_of(config: Path, token_file: Path | None) -> Path:
    """Where it stands: beside the config, of which alone one always knows where it is to be; where that folder is
    another's, beside the token file."""
    at = config if token_file is None or os.access(config.parent, os.W_OK) else token_file
    return at.with_name(UNFINISHED)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One restore at a time in that folder. ConflictError where another is at work."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # a pipe of that name would have us wait
    try:
        try:
            private_file.lock(fd, 0)
        except TimeoutError:
            raise ConflictError(f"another restore is at work in {folder}", "wait for it") from None
        yield
    finally:
        os.close(fd)


def unfinished(at: Path) -> Journal | None:
    """The journal of a restore that did not come to its end."""
    try:
        said = json.loads(private_file.read(at).data)
        steps = tuple(Step(**one) for one in said.pop("steps"))
        return Journal(**said, steps=steps)
    except NotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(f"{at} is no journal of a restore", "look at it; remove it, and restore again") from None


def make_ready(steps: Sequence[Step]) -> list[Step]:
    """Lay everything beside its place. Where that fails, nothing has been changed."""
    ready: list[Step] = []
    try:
        for step in steps:
            ready.append(_laid(step) if step.do == PUT else step)
    except BaseException as problem:
        sweep(steps)
        if isinstance(problem, OSError):
            said = f"{problem.filename2 or problem.filename or 'a file'}: {problem.strerror}; nothing was changed"
            raise private_file.not_written(problem, said) from None
        raise
    return ready


def _laid(step: Step) -> Step:
    place = Path(step.to)
    private_file.check_folder(place.parent)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}{_READY}")
    beside.unlink(missing_ok=True)
    try:
        os.rename(step.path, beside)
    except OSError as problem:
        if problem.errno != errno.EXDEV:
            raise
        private_file.create(beside, b"")
        shutil.copyfile(step.path, beside, follow_symlinks=False)
    os.chmod(beside, step.mode)
    _to_the_disk(beside)
    return Step(PUT, str(beside), step.to, step.mode)


def _to_the_disk(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_room(steps: Sequence[Step]) -> None:
    """Raises FullError where what is moved to another disk, and so is copied, has no room there."""
    wanted: Counter[Path] = Counter()
    for step in steps:
        if step.do == MOVE and os.path.lexists(step.path):
            there, found = next(one for one in Path(step.to).parents if one.is_dir()), os.lstat(step.path)
            wanted[there] += found.st_size if found.st_dev != there.stat().st_dev else 0
    for folder, size in wanted.items():
        disk = os.statvfs(folder)
        if size and disk.f_bavail * disk.f_frsize < size + _SPARE:
            what = f"{size} bytes of what is here are to be kept in {folder}, which is on another disk and has no room"
            raise FullError(what, "nothing was changed; make room there")


def sweep(steps: Sequence[Step]) -> None:
    """Remove what lies beside a place, of a restore that has changed nothing."""
    for step in steps:
        if step.do == PUT:
            place = Path(step.to)
            with contextlib.suppress(OSError):
                place.with_name(f".{place.name}{_READY}").unlink(missing_ok=True)


def begin(at: Path, journal: Journal) -> None:
    """From here on it is done, by whomever. Raises FullError, ConfigError: then nothing has been changed."""
    said: dict[str, Any] = {**vars(journal), "steps": [vars(step) for step in journal.steps]}
    places = _places(at, journal)
    try:
        for one in places:
            beside = one.with_name(f"{UNFINISHED}.new")
            beside.unlink(missing_ok=True)
            private_file.create(beside, json.dumps(said).encode("ascii"))
            os.rename(beside, one)
            private_file._sync_folder(one.parent)
    except BaseException:
        for one in places[:-1]:
            one.unlink(missing_ok=True)
        raise


def _places(at: Path, journal: Journal) -> list[Path]:
    """Where it stands, that beside the config last: and beside the token file, whose entries nobody changes then."""
    return [*({Path(journal.token_file).with_name(UNFINISHED)} - {at}), at]


def carry_out(journal: Journal, since: str) -> None:
    """Do all steps, from the first on, whoever has done some of them already."""
    for step in journal.steps:
        if step.do == MOVE:
            _do(step)
    if journal.locked:
        Lockdown(Path(journal.token_file)).begin(
            since, "mcpctl restore", "a restore is at work: run it again if it was interrupted"
        )
    for step in journal.steps:
        if step.do != MOVE:
            _do(step)
    for folder in {Path(step.to or step.path).parent for step in journal.steps}:
        if folder.exists():
            private_file._sync_folder(folder)


def _do(step: Step) -> None:
    beside = Path(step.path).with_name(f".{Path(step.path).name}{_LEAVING}")
    if step.do == DROP:
        Path(step.path).unlink(missing_ok=True)
    elif step.do == MOVE and os.path.lexists(beside):
        _carry_over(beside, Path(step.to))
    elif os.path.lexists(step.path) and not (step.do == MOVE and os.path.lexists(step.to)):  # else it was done already
        Path(step.to).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.replace(step.path, step.to)
        except OSError as problem:
            if problem.errno != errno.EXDEV:
                raise
            os.rename(step.path, beside)  # so that whoever comes after a crash sees that this one is not over yet
            _carry_over(beside, Path(step.to))


def _carry_over(path: Path, to: Path) -> None:
    """Move a file to another disk."""
    part = to.with_name(f".{to.name}.part")
    part.unlink(missing_ok=True)
    if not path.is_symlink():
        private_file.create(part, b"")
    shutil.copyfile(path, part, follow_symlinks=False)
    if not part.is_symlink():
        _to_the_disk(part)
    os.replace(part, to)
    private_file._sync_folder(to.parent)
    path.unlink()


def end(at: Path, journal: Journal) -> None:
    """It is done: the server may start again."""
    if journal.locked:
        Lockdown(Path(journal.token_file)).lifted()
    for one in reversed(_places(at, journal)):
        one.unlink(missing_ok=True)
        private_file._sync_folder(one.parent)
