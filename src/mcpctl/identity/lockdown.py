"""The lockdown: a file beside tokens.yaml. While anything has that name, no call is answered.

Its content only says since when, by whom and why. An empty file locks as well, so that a full disk is no hindrance,
and so does one that cannot be believed.
"""

import contextlib
import json
import os
from pathlib import Path

from mcpctl import private_file, reserve
from mcpctl.errors import ConfigError, ConflictError, Error, FullError, LockedError

_MOST = 16 << 10
UNFINISHED = ".restore"
"""The file beside tokens.yaml that is there while a restore is at work, or was interrupted."""


def refuse_unfinished(path: Path) -> None:
    """Raises ConflictError where a restore beside that file is unfinished: whoever finishes it would undo a change."""
    if os.path.lexists(path.with_name(UNFINISHED)):
        raise ConflictError(
            "a restore was interrupted here, and this would be half of each; nothing was changed, and the server is "
            "locked",
            "finish it first: mcpctl restore FILE",
        )


class Lockdown:
    """The lockdown of the installation whose token file that is."""

    def __init__(self, token_file: Path) -> None:
        self.path = token_file.with_name("lockdown")
        self._name = str(self.path)
        self.held = False
        """Whether it is on in this process alone, where no file could be made."""

    def on(self) -> bool:
        """Whether it is on. Costs one system call."""
        if self.held:
            return True
        try:
            os.lstat(self._name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # whoever cannot look does not know
            return True
        return True

    def check(self) -> None:
        """Raises LockedError while it is on."""
        if self.on():
            raise LockedError

    def begin(self, since: str, by: str, reason: str | None) -> bool:
        """Turn it on; False where it was on already. Raises FullError, ConfigError where no file can be made."""
        data = json.dumps({"since": since, "by": by, "reason": reason}).encode() + b"\n"
        for content in (data, data, b""):
            try:
                private_file.create(self.path, content)
                return True
            except ConflictError:
                return False
            except FullError:
                reserve.give_up(self.path.parent)
        raise FullError(f"{self.path} cannot be made: the disk is full", "stop the server; make room on that disk")

    def lift(self) -> bool:
        """Turn it off; False where it was not on. ConflictError while a restore is unfinished."""
        refuse_unfinished(self.path)
        return self.lifted()

    def lifted(self) -> bool:
        """As `lift`, for whoever finishes a restore."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        except OSError as problem:
            if not os.path.lexists(self.path):  # a disk that nobody can write to says so first
                return False
            raise ConfigError(f"cannot remove {self.path}: {problem.strerror}", "remove it by hand") from None
        return True

    def said(self) -> str | None:
        """That it is on, since when, by whom and why, as far as the file says; None while it is off."""
        if not self.on():
            return None
        told = {}
        with contextlib.suppress(Error, ValueError, AttributeError, RecursionError):
            found = json.loads(private_file.read(self.path, limit=_MOST).data)
            told = {name: str(found[name]) for name in ("since", "by", "reason") if found.get(name)}
        words = "the server is locked, and answers no calls" + (", until it restarts" if self.held else "")
        words += f", since {told['since']}" if "since" in told else ""
        words += f", by {told['by']}" if "by" in told else ""
        return words + (f": {told['reason']}" if "reason" in told else "")
