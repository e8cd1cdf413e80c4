"""Where a new installation's files are: all in one folder, or spread over the system's as a service has them."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mcpctl.errors import ConfigError

SERVICE = "mcpctl"
"""The operating system's user whom the service runs as; the package makes it."""


@dataclass(frozen=True)
class Layout:
    """The folders of an installation. `owner` is (uid, gid) where root makes them for a service, and `None` where all
    is in `config` and belongs to who runs this."""

    config: Path
    state: Path
    log: Path
    run: Path | None = None
    backups: Path | None = None
    owner: tuple[int, int] | None = None

    @property
    def folders(self) -> list[Path]:
        """Each of them."""
        return [one for one in (self.config, self.state, self.log, self.run, self.backups) if one is not None]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The folders, made where they are missing, 0700 and the owner's; away again where what is done in them
        fails. ConfigError where one belongs to somebody else."""
        if self.owner is None:
            yield
            return
        made: list[Path] = []
        try:
            for folder in self.folders:
                if _prepare(folder, self.owner):
                    made.append(folder)
            yield
        except BaseException:
            for folder in reversed(made):
                folder.rmdir()
            raise


def one_folder(folder: Path) -> Layout:
    """All files in this one."""
    return Layout(folder, folder, folder)


def system(root: Path = Path("/")) -> Layout | None:
    """The layout of the service (file-hierarchy(7)), where its user exists; else None."""
    try:
        import pwd

        entry = pwd.getpwnam(SERVICE)
    except (ImportError, KeyError):
        return None
    return service(root, (entry.pw_uid, entry.pw_gid))


def service(root: Path, owner: tuple[int, int]) -> Layout:
    """The layout of a service of that user."""
    config, state, log, run, backups = (
        root / one / SERVICE for one in ("etc", "var/lib", "var/log", "run", "var/backups")
    )
    return Layout(config, state, log, run, backups, owner)


def _prepare(folder: Path, owner: tuple[int, int]) -> bool:
    """Make a folder, or look at the one that is there; whether it was made."""
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        about = os.lstat(folder)
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != owner[0]:
            raise ConfigError(
                f"{folder} is there already, and is no folder of the user {SERVICE}",
                f"chown {SERVICE}: {folder}, if it is meant, or name another place: mcpctl init DIR",
            ) from None
        return False
    except OSError as problem:
        raise ConfigError(f"cannot make {folder}: {problem.strerror}", "name another place: mcpctl init DIR") from None
    try:
        os.chown(folder, *owner)
        os.chmod(folder, 0o700)  # whatever the umask says
    except OSError:
        folder.rmdir()
        raise
    return True
