"""mcpctl support-bundle: what a report of a fault needs to say, as one text that can be read before it is sent.

The rules:
- no secret: texts of the config are not shown at all, of audit lines only what is listed here, and what this
  installation's own password files and connection strings hold is looked for in all of it once more;
- no statement;
- no name: users, tokens, tenants, databases, hosts and addresses become user1, token1 and so on, the same everywhere,
  also those that were removed since; what a person gave as a reason is left out.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption
from mcpctl.cli.doctor import Visit
from mcpctl.errors import Error, masked

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings

_AUDIT_LINES, _LOG_LINES = 100, 200
_AUDITED = ("seq", "time", "event", "transport", "tool", "outcome", "rows", "bytes", "elapsed_ms", "reason")
_CHOICES = {"client_certificate", "format", "level", "on_failure", "roles", "sslmode", "statements"}
"""Keys of the config whose texts are words of ours."""
_PACKAGES = (
    "argon2-cffi", "cryptography", "httptools", "httpx2", "mcp", "msgspec", "opentelemetry-sdk", "psycopg",
    "psycopg-pool", "pydantic", "pyjwt", "pyyaml", "rich", "starlette", "typer", "uvicorn", "uvloop",
)  # fmt: skip
_ADDRESS = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|(?=[0-9a-fA-F:]*:[0-9a-fA-F:]*:)[0-9a-fA-F:]{3,39}(?:%\w+)?)(?![\w:]|\.\d)"
)
_TIME = re.compile(r"\d{1,2}:\d\d:\d\d")
_OPEN = ("127.0.0.1", "::1", "0.0.0.0", "::")  # noqa: S104 - named, not listened on
_URL = re.compile(r"(?<=://)[\w.-]+(?=[:/\s]|$)")
_KEY = re.compile(r"(\b(?:databases|auth\.oidc|limits\.(?:users|tenants|tokens))\.)(?!\d+\b)([\w-]+)")
"""A key of the config that is a name, as in the faults of one that cannot be read."""
_MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_STATEMENTS = re.compile(r" mcpctl\.sql: |\"logger\": \"mcpctl\.sql\"")
_ABOUT = (
    "This is for whoever helps you with mcpctl: versions, which settings differ from their defaults, what doctor finds "
    "and the last lines of the logs. There are no statements and no secrets in it, and names stand as user1, database1 "
    "and so on. Read it before you send it."
)


def support_bundle(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Print what a report of a fault needs to say, without secrets, statements and names: read it, then send it.

    Example: mcpctl support-bundle >bundle.txt
    """
    visit = Visit(context, config)
    visit.arrive(False)
    found = visit.settings
    parts: dict[str, Callable[[], Iterable[str]]] = {"versions": _versions, "doctor": lambda: _doctor(visit)}
    if found is not None:  # else doctor says what is wrong with the config
        parts |= {
            "settings that are not the defaults": lambda: _settings(found),
            "the server": lambda: _server(found),
            f"the audit log's last {_AUDIT_LINES} lines": lambda: _audit(found),
            f"the server's log, its last {_LOG_LINES} lines": lambda: _log(found),
        }
    hidden = Hidden(_secrets(visit), _names(found) if found is not None else ())
    made = {name: [hidden(line) for line in _tried(part)] for name, part in parts.items()}
    if json:
        output.put_json(made)
        return
    output.put(_ABOUT)
    for name, lines in made.items():
        output.put(f"\n== {name} ==")
        for line in lines:
            output.put(line)


def _tried(part: Callable[[], Iterable[str]]) -> Iterator[str]:
    """Its lines; where it cannot be made, why."""
    try:
        yield from part()
    except (Error, OSError) as problem:
        yield f"cannot be told: {problem}"


# -- what is hidden -------------------------------------------------------------------------------------------------


class Hidden:
    """Takes secrets, and the names that are known, out of a text. The same name has the same word everywhere."""

    def __init__(self, secrets: Iterable[str], names: Iterable[tuple[str, str]]) -> None:
        self._secrets = sorted({one for one in secrets if len(one) > 3}, key=len, reverse=True)
        self._words: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        for kind, name in names:
            if name and name not in self._words:
                self._words[name] = self._next(kind)
        longest = sorted(self._words, key=len, reverse=True)
        self._known = re.compile(rf"(?<![\w])(?:{'|'.join(map(re.escape, longest))})(?![\w])") if longest else None

    def _next(self, kind: str) -> str:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return f"{kind}{self._counts[kind]}"

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = masked(text)
        if self._known is not None:
            text = self._known.sub(lambda found: self._words[found[0]], text)
        text = _KEY.sub(lambda found: found[1] + self._word("name", found[2]), text)
        text = _URL.sub(lambda found: found[0] if found[0] in _OPEN else self._word("host", found[0]), text)
        text = _MAIL.sub(lambda found: self._word("mail", found[0]), text)
        return _ADDRESS.sub(lambda found: self._address(found[0]), text)

    def _address(self, found: str) -> str:
        return found if found in _OPEN or _TIME.fullmatch(found) else self._word("address", found)

    def _word(self, kind: str, name: str) -> str:
        if name in self._words.values():  # it has one already
            return name
        if name not in self._words:
            self._words[name] = self._next(kind)
        return self._words[name]


def _secrets(visit: Visit) -> Iterator[str]:
    """Passwords that this installation's own files hold in the open: they are in nothing that is told, and are looked
    for all the same."""
    import os

    from psycopg import conninfo

    settings = visit.settings
    paths = [settings.keyring.file, settings.audit.key_file] if settings is not None else []
    dsns = [*visit.dsns.values(), os.environ.get("MCPCTL_DATABASE_URL", "")]
    for one in settings.databases.values() if settings is not None else ():
        paths += [path for path in (one.password_file, one.service_password_file) if path is not None]
        dsns += [dsn for dsn in (one.dsn, one.service_dsn) if dsn is not None]
    for path in paths:
        with contextlib.suppress(OSError):
            yield from path.read_text("utf-8", "replace").split()
    for dsn in dsns:
        with contextlib.suppress(Exception):  # psycopg's, of what is none
            yield str(conninfo.conninfo_to_dict(dsn).get("password", ""))
    yield os.environ.get("PGPASSWORD", "")


def _names(settings: "Settings") -> Iterator[tuple[str, str]]:
    """(kind, name) of whatever has one."""
    import getpass
    import socket

    from mcpctl.identity import tenants, tokens, users

    for name, database in settings.databases.items():
        yield "database", name
        yield "database", database.dbname or ""
        yield "login", database.user or ""
        yield "host", database.host or ""
        for dsn in (database.dsn, database.service_dsn):
            yield from _parts(dsn or "")
    yield "host", settings.server.host if settings.server.host not in _OPEN else ""
    for url in (settings.server.public_url, settings.tracing.endpoint):
        name = urlsplit(url or "").hostname or ""
        yield "host", name if name not in _OPEN else ""
    yield "host", socket.gethostname()
    for kind, file in (
        ("user", users.user_file(settings.auth.user_file)),
        ("token", tokens.token_file(settings.auth.token_file)),
        ("tenant", tenants.tenant_file(settings.auth.tenant_file)),
    ):
        with contextlib.suppress(Error, OSError):
            for name in file.current():
                yield kind, name
                if kind == "user":
                    yield from (("login", f"mcp_{name}_{right}") for right in "rwa")
    with contextlib.suppress(Error, OSError):
        for line in _last(settings):
            for kind in ("user", "token", "tenant", "database", "role"):
                yield "login" if kind == "role" else kind, str(line.get(kind) or "")
    for issuer in settings.auth.oidc:
        yield "issuer", issuer
    with contextlib.suppress(KeyError, OSError, ImportError):
        who = getpass.getuser()
        yield "account", who if who not in ("root", "mcpctl") else ""
    yield "folder", str(Path.home()) if Path.home() != Path("/") else ""


def _parts(dsn: str) -> Iterator[tuple[str, str]]:
    """(kind, name) of what a connection string names."""
    from psycopg import ProgrammingError, conninfo

    with contextlib.suppress(ProgrammingError):
        known = conninfo.conninfo_to_dict(dsn)
        yield from (("host", one) for one in str(known.get("host", "")).split(","))
        yield "database", str(known.get("dbname", ""))
        yield "login", str(known.get("user", ""))


# -- the parts ------------------------------------------------------------------------------------------------------


def _versions() -> Iterator[str]:
    import platform
    from importlib import metadata

    from psycopg import pq

    from mcpctl import __version__

    yield f"mcpctl {__version__}, Python {platform.python_version()}, {platform.platform()}"
    with contextlib.suppress(OSError):
        yield platform.freedesktop_os_release().get("PRETTY_NAME", "")
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield f"{name} {metadata.version(name)}"
    yield f"libpq {pq.version()} ({pq.__impl__})"


def _settings(settings: "Settings") -> Iterator[str]:
    """Which keys differ from their defaults: numbers, switches and words of ours as they are, other texts not."""
    from mcpctl.config_keys import Settings

    yield from _differ(settings, Settings(), "")


def _differ(found: Any, usual: Any, before: str) -> Iterator[str]:
    for one in dataclasses.fields(found):
        if not one.metadata:
            continue
        value, name = getattr(found, one.name), f"{before}{one.name}"
        if dataclasses.is_dataclass(value):
            yield from _differ(value, getattr(usual, one.name), f"{name}.")
        elif "named" in one.metadata:
            for number, entry in enumerate(value.values(), 1):
                yield from _differ(entry, one.metadata["named"](), f"{name}.{number}.")
        elif not _is(value, getattr(usual, one.name)):
            yield f"{name}: {_shown(value, one.name)}"


def _is(value: Any, usual: Any) -> bool:
    """Whether it is the default; a path is, in whatever folder the config stands."""
    if isinstance(value, Path) and isinstance(usual, Path):
        return value.name == usual.name
    return bool(value == usual)


def _shown(value: Any, name: str) -> str:
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, tuple | list | set | frozenset | dict):
        return f"({len(value)} entries)"
    return str(value) if name in _CHOICES else "(given)"


def _server(settings: "Settings") -> Iterator[str]:
    from mcpctl.cli.live import ask_if_any

    answers, silent = ask_if_any(settings, {"do": "status"}, warn=False)
    if not answers and not silent:
        yield "no server runs"
    if silent:
        yield f"{len(silent)} processes do not answer"
    for one in answers:
        databases = one["databases"].values()
        yield (
            f"worker {one['worker']} of {one['workers']}: version {one['version']}, {one['running']} calls run, "
            f"{sum(about['connections'] for about in databases)} of {one['budget']} connections, "
            f"{sum(bool(about['up']) for about in databases)} of {len(databases)} databases up, "
            f"last minute {one['minute']}, tokens {one['tokens']}, config changed: {one['config_changed']}, "
            f"audit: {one['audit'] or 'can be written'}, locked: {bool(one.get('lockdown'))}"
        )


def _doctor(visit: Visit) -> Iterator[str]:
    for one in visit.examine():
        yield " ".join(f"{one.status}: {one.check}: {one.what}".split())


def _audit(settings: "Settings") -> Iterator[str]:
    """Of a command's lines not the reason: it holds a person's words, and who they are."""
    import json

    for line in reversed(_last(settings)):
        told = [name for name in _AUDITED if name != "reason" or line.get("transport") != "cli"]
        yield json.dumps({name: line[name] for name in told if line.get(name) is not None}, ensure_ascii=False)


def _last(settings: "Settings") -> list[dict[str, Any]]:
    """The last lines of the audit log, the last one first."""
    from itertools import islice

    from mcpctl.audit import files

    return list(islice(files.read_back(settings.audit.file), _AUDIT_LINES))


def _log(settings: "Settings") -> Iterator[str]:
    """Those of log.file, but for statements; where it goes to stderr, this cannot know what became of them."""
    from collections import deque

    file = settings.log.file
    if file is None:
        yield "it goes to stderr: under systemd, `journalctl -u mcpctl -n 200` shows it; look it through, and add it"
        return
    with file.open(encoding="utf-8", errors="backslashreplace") as lines:
        yield from deque((line.rstrip("\n") for line in lines if not _STATEMENTS.search(line)), _LOG_LINES)
