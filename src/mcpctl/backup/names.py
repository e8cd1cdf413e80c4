"""The backups in a folder, by their names."""

import contextlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

_NAME = re.compile(r"mcpctl-([0-9]{8}T[0-9]{6}Z)\.tar\.gz\.age")


def of(when: datetime) -> str:
    """How a backup of that time is called."""
    return f"mcpctl-{when.astimezone(UTC):%Y%m%dT%H%M%SZ}.tar.gz.age"


def there(folder: Path) -> Iterator[tuple[Path, datetime]]:
    """Each backup in a folder, and when it was begun."""
    for one in sorted(folder.glob("mcpctl-*.tar.gz.age")):
        found = _NAME.fullmatch(one.name)
        if found is None or not one.is_file() or one.is_symlink():
            continue
        with contextlib.suppress(ValueError):  # the thirtieth of February is nobody's backup
            yield one, datetime.strptime(found[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)


def newest(folder: Path) -> datetime | None:
    """When the newest backup in a folder was begun; None where there is none, or nobody may look."""
    with contextlib.suppress(OSError):
        return max((when for _, when in there(folder)), default=None)
    return None
