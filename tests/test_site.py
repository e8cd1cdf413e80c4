"""docs/ as a site."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_site_has_every_page_and_each_link_to_a_heading_finds_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    # Material for MkDocs says about the future of MkDocs what no reader of ours needs.
    quiet = {"NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"}
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **quiet}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    built = {path.relative_to(tmp_path / "site").with_suffix("") for path in (tmp_path / "site").rglob("*.html")}
    assert pages <= built
