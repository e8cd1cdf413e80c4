"""Puts man pages, shell completion, units and the example of a config into a wheel, below share/.

pipx links the man pages from there. Hatchling runs this; what makes the pages is `manual.py`.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class WheelPages(BuildHookInterface[Any]):
    """The build hook of pyproject.toml."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make the pages, unless the wheel only leads to a working copy."""
        if version == "editable":
            return
        root = Path(self.root)
        sys.path[:0] = [str(root / "src"), str(root / "packaging")]
        from manual import write

        self.made = tempfile.TemporaryDirectory()
        below = Path(self.made.name)
        shared = {str(path): str(path.relative_to(below)) for path in write(below)}
        shared[str(root / "config.example.yaml")] = "share/doc/mcpctl/config.example.yaml"
        units = sorted(path for path in (root / "systemd").glob("**/*") if path.is_file())
        shared |= {str(path): f"share/mcpctl/{path.relative_to(root)}" for path in units}
        build_data["shared_data"].update(shared)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Forget the pages: they are in the wheel."""
        if version != "editable":
            self.made.cleanup()
