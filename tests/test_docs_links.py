"""Links, headings and quoted messages of the documentation lead somewhere. The commands are run by test_docs_run."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(
        path
        for folder in ("docs", "packaging", "systemd", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.md"))
    ),
]
LINK = re.compile(r"\]\(<?([^)\s>]+)>?[^)]*\)|(?:src|href)=\"([^\"]+)\"")


def prose(text: str) -> str:
    """A page without its blocks and spans of code."""
    without = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", without)


@functools.cache
def anchors(path: Path) -> frozenset[str]:
    """What can stand behind # in a link to a page, as GitHub and the site's toc make it of a heading."""
    text = re.sub(r"^( *)```.*?^\1```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: list[str] = []
    for title in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        found.append(re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-"))
    return frozenset(found)


def broken(path: Path, text: str) -> list[str]:
    """Each link of a page that leads nowhere."""
    found = []
    for link in (one or other for one, other in LINK.findall(prose(text))):
        if re.match(r"https://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(path: Path) -> None:
    assert broken(path, path.read_text(encoding="utf-8")) == []


def test_a_link_that_leads_nowhere_is_seen() -> None:
    page = ROOT / "docs" / "index.md"
    assert broken(page, "[a](none.md) [b](tls.md#none) [c](#none) [d](tls.md) `[e](none)` <img src=\"none.png\">") == [
        "none.md", "tls.md#none", "#none", "none.png",
    ]  # fmt: skip


def test_the_readme_fits_two_screens_and_shows_both_pictures() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert {"docs/images/top.svg", "docs/images/sign-in.png"} <= {one or other for one, other in LINK.findall(text)}


@functools.cache
def said() -> str:
    """Every text of the source, those of f-strings in their parts, which a NUL keeps apart."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    return "\0".join(found)


def quoted(text: str) -> list[str]:
    """The messages that troubleshooting.md quotes as ours: in headings, and at the beginning of a table's row."""
    messages = re.findall(r"^### `([^`]+)`", text, flags=re.MULTILINE)
    for begin in ("## Credentials", "## It does not start"):
        part = text.partition(f"\n{begin}\n")[2].partition("\n## ")[0]
        for row in re.findall(r"^\| (`.*?) \|", part, flags=re.MULTILINE):
            messages += re.findall(r"`([^`]+)`", row)
    return messages


THEIRS = {"permission denied for table"}
"""What is PostgreSQL's own word."""


def test_each_message_that_the_troubleshooting_quotes_is_one_that_the_code_says() -> None:
    messages = quoted((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(messages) > 40
    for message in {*messages} - THEIRS:
        missing = [piece for piece in message.split("…") if piece.strip() not in said()]
        assert not missing, message
