"""What the tests of more than one module need to know about the PostgreSQL servers of this machine."""

from __future__ import annotations

from mcpctl.postgres.embedded import OLDEST_SUPPORTED, Binaries, find_binaries


def supported() -> list[Binaries]:
    return [binaries for binaries in find_binaries() if binaries.version >= OLDEST_SUPPORTED]


def oldest_and_newest() -> list[Binaries]:
    """Two installations, or the only one, or none: what holds on both is taken to hold in between."""
    found = supported()
    return [found[0], found[-1]] if len(found) > 1 else found
