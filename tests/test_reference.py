"""Code, `--help`, config.example.yaml and the documentation say the same."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import yaml

from mcpctl import config, errors
from mcpctl.audit import log as audit_log
from mcpctl.cli import tree
from mcpctl.cli.main import app
from mcpctl.config_keys import Database, Settings
from mcpctl.config_sign_in import Oidc
from mcpctl.errors import ConfigError
from mcpctl.identity import tenants, tokens, users
from mcpctl.identity.principal import Principal
from mcpctl.policy.access import Access
from mcpctl.server.http import Http, Parts
from mcpctl.server.routes import BELOW
from mcpctl.server.sign_in import SignIn
from mcpctl.tools.table import TOOLS
from site_of_mcpctl import command

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "mcpctl"
REFERENCE = ROOT / "docs" / "reference"
EXAMPLE = ROOT / "config.example.yaml"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLACEHOLDERS = {"host", "dbname", "user", "password_file"}
"""Keys of the example's database that name a place, and so have no default."""
NEEDED = {"auth.oidc.NAME.issuer": "https://id.example.org", "auth.oidc.NAME.audience": "[mcpctl]"}
"""Keys of an issuer that have to be given."""
NAMED = {
    "databases.shop.": "databases.NAME.",
    "auth.roles.shop-reports.": "auth.roles.NAME.",
    "auth.oidc.example.": "auth.oidc.NAME.",
    "auth.oauth.clients.portal.": "auth.oauth.clients.NAME.",
    "auth.oauth.scopes.shop-read.": "auth.oauth.scopes.NAME.",
}
"""The entries of the example that only stand for others."""


def page(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


def chapters(text: str) -> dict[str, str]:
    """What stands below each heading, up to the next one of any level."""
    parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[list[str]]:
    """The cells of the tables, without heads."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        for line in table.splitlines()[2:]:
            cells = re.split(r"(?<!\\)\|", line.strip("|"))
            found.append([cell.strip().replace("\\|", "|") for cell in cells])
    return found


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


# -- commands -------------------------------------------------------------------------------------------------------


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, (*path, name))


def spelled(option: Any) -> str:
    """A flag as the reference writes it: all its names, with what it takes."""
    takes = "" if option.is_flag else f" {option.metavar or 'N'}"
    return ", ".join(f"`{name}{takes}`" for name in option.opts)


ROOT_COMMAND: Any = typer.main.get_command(app)
SHOWN = {**ROOT_COMMAND.commands}
ROOT_COMMAND.commands.update({name: tree.load(name) for name in SHOWN})
COMMANDS = dict(walk(ROOT_COMMAND))
LEAVES = {path: command for path, command in COMMANDS.items() if not hasattr(command, "commands") or not path}
DESCRIBED = {
    tuple(title.strip("`").split()[1:]): text
    for title, text in chapters(page("commands.md")).items()
    if re.fullmatch(r"`mcpctl[a-z -]*`", title)
}


def options(command: Any) -> list[Any]:
    return [option for option in command.params if option.param_type_name == "option" and option.name != "help"]


def test_every_command_stands_in_the_reference_and_no_other() -> None:
    assert DESCRIBED.keys() == LEAVES.keys()


def test_the_top_shows_each_command_with_the_beginning_of_its_help() -> None:
    for name, shown in SHOWN.items():
        assert shown.get_short_help_str(1000) == COMMANDS[name,].get_short_help_str(1000)


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: " ".join(path) or "mcpctl")
def test_every_flag_of_a_command_stands_in_its_chapter_and_no_other(path: tuple[str, ...]) -> None:
    documented = [row[0] for row in rows(DESCRIBED[path])]
    expected = [spelled(option) for option in options(LEAVES[path])]
    assert documented == expected


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: " ".join(path) or "mcpctl")
def test_the_help_of_a_command_shows_every_flag_of_the_reference(path: tuple[str, ...]) -> None:
    done = command(*path, "--help")
    assert done.returncode == 0, done.stderr
    for row in rows(DESCRIBED[path]):
        for flag in re.findall(r"(?<=`)--?[a-z-]+", row[0]):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", done.stdout), (flag, done.stdout)


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: " ".join(path) or "mcpctl")
def test_the_arguments_of_a_command_stand_in_its_chapter(path: tuple[str, ...]) -> None:
    arguments = [param.metavar for param in LEAVES[path].params if param.param_type_name == "argument"]
    if arguments:
        assert f"`mcpctl {' '.join([*path, *arguments])}`" in DESCRIBED[path]


def test_the_reference_has_the_exit_code_of_every_error() -> None:
    documented = {int(row[0]) for row in rows(chapters(page("commands.md"))["Exit codes"])}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.Error)]
    assert documented == {kind.exit_code for kind in kinds} | {0, 130}


def commands_in(text: str) -> Iterator[list[str]]:
    """Every mcpctl command that a page shows, in a block or within a sentence."""
    for block in [*blocks(text, "sh"), *blocks(text, "bash")]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["sudo"]:
                words = words[3:] if words[1] == "-u" else words[1:]
            if words and Path(words[0]).name == "mcpctl":
                yield words[1:]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for found in re.findall(r"`mcpctl ([^`]*)`", prose):
        yield shlex.split(found)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_that_a_page_shows_is_a_real_one(path: Path) -> None:
    for words in commands_in(path.read_text(encoding="utf-8")):
        command, rest = COMMANDS[()], [word for word in words if word not in ("…", "CONFIG")]
        known = {name for option in options(command) for name in option.opts}
        while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
            assert rest[0] in command.commands, f"mcpctl {shlex.join(words)}"
            command = command.commands[rest.pop(0)]
            known |= {name for option in options(command) for name in option.opts}
        for word in rest:
            assert not word.startswith("-") or word in known, f"mcpctl {shlex.join(words)}: {word}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_to_one(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).is_file(), target


# -- config.yaml ----------------------------------------------------------------------------------------------------


SAME = {
    r"limits\.(tokens|users|tenants|addresses)(\.named\.NAME)?(?=\.)": "limits.KIND",
    r"(limits\.)(?:KIND\.)?budgets\.(hour|day)(?=\.)": r"\1budgets.PERIOD",
}
"""Sections with the same keys, which stand in the reference once."""


def once(key: str) -> str:
    """A key by the section of the reference that has it."""
    for pattern, name in SAME.items():
        key = re.sub(pattern, name, key)
    return key


def keys(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(section, field) of every key that a config may hold, by the metadata that the reader uses."""
    for found in dataclasses.fields(cls):
        if "section" in found.metadata:
            yield from keys(found.metadata["section"], f"{prefix}{found.name}.")
        elif "named" in found.metadata:
            yield from keys(found.metadata["named"], f"{prefix}{found.name}.NAME.")
        elif found.metadata:
            yield prefix.rstrip("."), found


KEYS = {once(f"{section}.{found.name}"): found for section, found in keys(Settings)}
SECTIONS = {key.rpartition(".")[0] for key in KEYS}
CONFIG = {
    f"{section}.{row[0].strip('`')}": row
    for section, text in chapters(page("config.md")).items()
    if section in SECTIONS
    for row in rows(text)
}


def default(key: str) -> Any:
    """The default in the code."""
    found = KEYS[key]
    return found.default if found.default_factory is dataclasses.MISSING else found.default_factory()


def written_default(key: str) -> Any:
    """The default in config.md, as YAML reads it."""
    return yaml.safe_load(CONFIG[key][2].strip("`"))


def test_every_key_of_the_config_stands_in_the_reference_and_no_other() -> None:
    assert set(KEYS) == set(CONFIG)
    assert chapters(page("config.md")).keys() - SECTIONS == {"config.yaml", "Environment"}


@pytest.mark.parametrize("key", KEYS)
def test_the_reference_has_the_default_of_a_key(key: str) -> None:
    assert KEYS[key].metadata["read"](written_default(key)) == default(key)
    assert CONFIG[key][1]
    assert CONFIG[key][3]


def test_every_key_that_takes_one_of_several_words_has_all_of_them_in_the_reference() -> None:
    found = 0
    for key, about in KEYS.items():
        try:
            about.metadata["read"]("no such word")
        except ValueError as problem:
            if str(problem).startswith("one of "):
                found += 1
                for word in str(problem).removeprefix("one of ").split(", "):
                    assert f"`{word}`" in " ".join(CONFIG[key]).replace('"', ""), (key, word)
    assert found >= 7


@pytest.mark.parametrize("key", KEYS)
def test_a_key_can_be_given_by_the_variable_that_the_reference_names(key: str, tmp_path: Path) -> None:
    section, _, name = key.rpartition(".")
    form = re.search(r"Environment: `(MCPCTL_\w*(?:<NAME>__)?\w*)<KEY>`", chapters(page("config.md"))[section])
    assert form
    variable = form[1].replace("<NAME>", "SHOP") + name.upper()
    file = tmp_path / "config.yaml"
    file.touch(0o600)
    issuers = "auth: {oidc: {shop: {issuer: https://id.example.org, audience: mcpctl}}}\n" if ".oidc." in key else ""
    file.write_text("databases: {shop: {host: localhost}}\n" + issuers)
    value = NEEDED.get(key, CONFIG[key][2].strip("`") if name != "host" else "localhost")
    config.load(file, {variable: value})
    with pytest.raises(ConfigError, match="there is no such key"):
        config.load(file, {variable + "_X": value})


def test_the_reference_names_every_variable_that_is_no_key() -> None:
    documented = {row[0].strip("`") for row in rows(chapters(page("config.md"))["Environment"])}
    assert documented == config._OTHER_VARIABLES


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def general(name: str) -> str:
    """A key of the example, with NAME where it has a name of its own."""
    for own, stands_for in NAMED.items():
        name = name.replace(own, stands_for)
    return once(name)


def test_the_example_has_every_key_with_its_default_and_no_other() -> None:
    values = dict(flat(yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))))
    found = {general(name): value for name, value in values.items()}
    assert found.keys() == KEYS.keys()
    for key, value in found.items():
        placeholder = key.removeprefix("databases.NAME.") in PLACEHOLDERS or key in NEEDED
        if not placeholder and not re.match(r"auth\.(roles|oauth\.clients|oauth\.scopes)\.NAME\.", key):
            assert KEYS[key].metadata["read"](value) == default(key), key


def test_the_example_says_why_at_every_key() -> None:
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        if re.match(r" *[a-z_]+: .", line):
            assert re.search(r" # \S+ \S+", line), line


def test_the_example_can_be_used_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.touch(0o600)
    file.write_bytes(EXAMPLE.read_bytes())
    found = config.load(file, {})
    usual = config._place(Settings(), file)
    place = {name: getattr(found.databases["shop"], name) for name in PLACEHOLDERS}
    issuer = Oidc(issuer=found.auth.oidc["example"].issuer, audience=("mcpctl",))
    oauth = dataclasses.replace(usual.auth.oauth, clients=found.auth.oauth.clients, scopes=found.auth.oauth.scopes)
    auth = dataclasses.replace(usual.auth, roles=found.auth.roles, oidc={"example": issuer}, oauth=oauth)
    expected = dataclasses.replace(usual, source=file, auth=auth, databases={"shop": Database(**place)})
    assert found == expected
    assert [*found.auth.roles] == ["shop-reports"]
    assert [*found.auth.oauth.clients, *found.auth.oauth.scopes] == ["portal", "shop-read"]
    assert not Access(found.auth).may(Principal("1", "u", "", roles=("shop-reports",)), "tools:whoami").allowed


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_config_that_a_page_shows_is_one(path: Path, tmp_path: Path) -> None:
    for text in blocks(path.read_text(encoding="utf-8"), "yaml"):
        if text.startswith("version: 1"):
            continue
        file = tmp_path / "config.yaml"
        file.touch(0o600)
        file.write_text(text, encoding="utf-8")
        config.load(file, {})


# -- the other files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chapter", "entry", "read"),
    [
        ("tokens.yaml", tokens.Token, tokens.token_file),
        ("users.yaml", users.User, users.user_file),
        ("tenants.yaml", tenants.Tenant, tenants.tenant_file),
    ],
)
def test_the_reference_lists_the_keys_of_a_file_and_shows_one_that_is_read(
    chapter: str, entry: Any, read: Any, tmp_path: Path
) -> None:
    text = chapters(page("files.md"))[chapter]
    names = [found.name for found in dataclasses.fields(entry)]
    assert [row[0].strip("`") for row in rows(text)] == names[1:]
    file = tmp_path / chapter
    file.touch(0o600)
    file.write_text(blocks(text, "yaml")[0], encoding="utf-8")
    assert len(read(file).current()) == 1


# -- tools ----------------------------------------------------------------------------------------------------------


def test_every_tool_stands_in_the_reference_in_the_order_of_the_list() -> None:
    documented = [title.strip("`") for title in chapters(page("tools.md")) if title.startswith("`")]
    assert documented == list(TOOLS)


@pytest.mark.parametrize("name", TOOLS)
def test_the_reference_has_a_tool_s_exact_schemas(name: str) -> None:
    text, tool = chapters(page("tools.md"))[f"`{name}`"], TOOLS[name]
    assert [json.loads(block) for block in blocks(text, "json")] == [tool.input_schema, tool.output]
    assert tool.description in text
    assert f"Permission: `{tool.permission}`" in text


# -- the audit log --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chapter", "names"), [("Fields", audit_log.FIELDS), ("Events", audit_log.EVENTS)])
def test_the_reference_lists_exactly_what_an_audit_line_may_hold(chapter: str, names: tuple[str, ...]) -> None:
    assert [row[0].strip("`") for row in rows(chapters(page("audit.md"))[chapter])] == list(names)


CHAIN = ("seq", "time", "key_id", "prev", "hash")


def verify(key: str, log: bytes, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the reference's own verification."""
    (folder / "verify.py").write_text(blocks(page("audit.md"), "python")[0], encoding="utf-8")
    (folder / "audit.key").write_text(key + "\n")
    (folder / "audit.jsonl").write_bytes(log)
    return subprocess.run(
        [sys.executable, "verify.py", "audit.key", "audit.jsonl"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_reference_s_example_of_a_chain_is_what_the_log_writes(tmp_path: Path) -> None:
    text = chapters(page("audit.md"))["Example"]
    key = re.search(r"[0-9a-f]{64}", text)
    assert key
    lines = blocks(text, "json")[0].encode()
    times = iter([datetime.fromisoformat(json.loads(line)["time"]) for line in lines.splitlines()])
    log = audit_log.AuditLog(tmp_path / "written.jsonl", bytes.fromhex(key[0]), lambda: next(times))
    for line in lines.splitlines():
        values = {name: value for name, value in json.loads(line).items() if name not in CHAIN}
        log.append(values.pop("event"), **values)
    log.close()
    assert (tmp_path / "written.jsonl").read_bytes() == lines
    done = verify(key[0], lines, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("whole: 2 lines")
    assert verify(key[0], lines[:-1], tmp_path).stdout == done.stdout  # its newline alone is gone


@pytest.mark.parametrize("change", ["change", "remove", "reorder", "add", "forge"])
def test_the_reference_s_verification_finds_a_line_that_was_tampered_with(change: str, tmp_path: Path) -> None:
    key = "5a" * 32
    log = audit_log.AuditLog(tmp_path / "written.jsonl", bytes.fromhex(key), lambda: datetime.now(UTC))
    for name in ("alice", "bob", "carol"):
        log.append("user.added", user=name, reason='says ","hash":" in a text')
    log.close()
    lines = (tmp_path / "written.jsonl").read_bytes().splitlines(keepends=True)
    assert verify(key, b"".join(lines), tmp_path).returncode == 0
    if change == "change":
        lines[1] = lines[1].replace(b"bob", b"eve")
    elif change == "remove":
        del lines[1]
    elif change == "reorder":
        lines[1], lines[2] = lines[2], lines[1]
    elif change == "add":
        lines.insert(1, lines[1])
    else:
        lines[2] = lines[2][:-67] + b"0" * 64 + b'"}\n'
    assert verify(key, b"".join(lines), tmp_path).returncode == 1


# -- HTTP -----------------------------------------------------------------------------------------------------------


def test_the_reference_lists_exactly_the_routes_of_the_server() -> None:
    nothing: Any = None
    parts = Parts(Settings(), nothing, nothing, nothing, nothing, nothing, nothing)
    always = set(Http(parts)._routes)
    made: Any = SimpleNamespace(sessions=nothing)
    sign_in = SignIn(made, nothing, nothing, nothing, nothing, passwords=True)
    everything = dataclasses.replace(parts, sse=lambda *_: nothing, additions=[sign_in])
    all_of_them = {path.replace(BELOW, "/ID") for path in Http(everything)._routes}
    found = {row[0].strip("`"): row[3] for row in rows(chapters(page("http.md"))["Endpoints"])}
    words = re.compile("the same$|.*(server.sse|auth.sessions)")
    on_demand = {path for path, text in found.items() if words.match(text)} - always
    assert found.keys() == all_of_them
    assert on_demand == all_of_them - always


def test_the_reference_has_every_status_that_the_server_answers_by_itself() -> None:
    documented = {int(row[0]) for row in rows(chapters(page("http.md"))["Statuses"])}
    files = [*(SOURCE / "server").glob("*.py"), SOURCE / "identity" / "authenticate.py"]
    own = {int(found) for file in files for found in re.findall(r"\bstatus=(\d{3})", file.read_text(encoding="utf-8"))}
    raised = {errors.UsageError, errors.UnauthorizedError, errors.UnavailableError, errors.Error}
    assert own | {kind.status for kind in raised} | {200, 201, 202, 204} == documented


# -- the map of the house -------------------------------------------------------------------------------------------


def test_the_map_names_every_file_of_the_house_and_no_other() -> None:
    text = blocks((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), "")[0]
    named, folder = [], ""
    for line in text.splitlines()[1:]:
        name = line.split()[0]
        if name.endswith("/"):
            folder = name
        else:
            named.append(name if line[2] != " " else folder + name)
    files = [file for file in SOURCE.rglob("*") if file.suffix in (".py", ".sql")]
    assert sorted(named) == sorted(file.relative_to(SOURCE).as_posix() for file in files)


def test_the_map_follows_functions_that_there_are() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = re.findall(r"`([\w/]+)\.py:([\w.]+)`", text)
    assert len(found) > 30
    for file, name in found:
        target: Any = importlib.import_module("mcpctl." + file.replace("/", "."))
        for part in name.split("."):
            target = getattr(target, part)


def test_no_file_is_longer_than_a_person_reads_at_once() -> None:
    files = [
        file for part in ("src", "tests") for file in (ROOT / part).rglob("*.py") if "node_modules" not in file.parts
    ]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {file: lines for file, lines in lengths.items() if lines > 500} == {}
