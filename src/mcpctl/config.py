"""Settings from YAML and environment. Every fault is reported at once, as `file:line: key: what is wrong`.

YAML is read as plain data only: no tags, no anchors that make objects, no key twice. An environment variable
`MCPCTL_<SECTION>__<KEY>` replaces the key; one that names no key is a fault like a typo in the file.
"""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import yaml

from mcpctl import private_file
from mcpctl.config_keys import Database, Settings
from mcpctl.errors import ConfigError, NotFoundError

T = TypeVar("T")

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CONSTRUCTOR = yaml.constructor.SafeConstructor()
NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_OTHER_VARIABLES = {"MCPCTL_CONFIG", "MCPCTL_DATABASE_URL", "MCPCTL_TOKEN"}


@dataclass
class _Value:
    value: Any
    where: str


@dataclass
class _Branch:
    children: dict[str, "_Value | _Branch"]
    where: str


def default_folder() -> Path:
    """The user's own config folder, by the platform's custom."""
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA", home)) / "mcpctl"
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "mcpctl"
    return Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "mcpctl"


def find(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The config file to use: the one named, MCPCTL_CONFIG's, the system's, the user's; None if there is none."""
    named = path or (Path(environ["MCPCTL_CONFIG"]) if environ.get("MCPCTL_CONFIG") else None)
    if named:
        return named.absolute()
    for usual in (Path("/etc/mcpctl/config.yaml"), default_folder() / "config.yaml"):
        try:
            if usual.exists():
                return usual
        except OSError:  # a folder that is closed to us: its file is not ours to use
            continue
    return None


def load(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read and check the configuration, or raise ConfigError with every fault in it (exit 3).

    Where there is no file, `MCPCTL_DATABASE_URL` alone is enough; without either NotFoundError (exit 3).
    """
    source = find(path, environ)
    if source is None and not environ.get("MCPCTL_DATABASE_URL"):
        raise NotFoundError(
            "there is no config file",
            "make one with `mcpctl init`, or name one with --config; MCPCTL_DATABASE_URL alone is enough for "
            "`serve --stdio`",
            exit_code=3,
        )
    faults: list[str] = []
    tree = _Branch({}, "the environment")
    if source is not None:
        private_file.become_owner(source)
        content = private_file.read(source, mode=0o640, trusted_owner=0, limit=4 << 20)
        tree = parse_yaml(content.data, source, faults)
    _add_environment(tree, environ, faults)
    settings = _read(Settings, tree, "", faults)
    if not faults:
        settings = dataclasses.replace(_place(settings, source), source=source)
        _check_together(settings, tree, faults)
    if faults:
        raise ConfigError(
            "the configuration is not in order:\n  " + "\n  ".join(faults),
            "docs/reference/config.md says what each key takes; `mcpctl config check` tries again",
        )
    return settings


def parse_yaml(data: bytes, source: Path, faults: list[str]) -> Any:
    """YAML as branches and values that know their line. Faults are added, and what has one is left out."""
    try:
        node = yaml.compose(data.decode("utf-8"), Loader=_LOADER)
    except UnicodeDecodeError as problem:
        faults.append(f"{source}: not UTF-8 (byte {problem.start})")
        return _Branch({}, str(source))
    except (yaml.YAMLError, RecursionError) as problem:
        mark = getattr(problem, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        faults.append(f"{source}{line}: not YAML: {getattr(problem, 'problem', None) or 'nested too deep'}")
        return _Branch({}, str(source))
    if node is None:
        return _Branch({}, str(source))
    found = _plain(node, source, faults, set())
    if not isinstance(found, _Branch):
        faults.append(f"{source}:1: expected keys and values")
        return _Branch({}, str(source))
    return found


def as_plain(tree: Any) -> Any:
    """A parsed tree as plain dicts and values."""
    if isinstance(tree, _Branch):
        return {name: as_plain(child) for name, child in tree.children.items()}
    return tree.value


def where(tree: Any, *names: str) -> str:
    """The file and line at which a key of a parsed tree stands."""
    for name in names:
        tree = tree.children[name]
    return str(tree.where)


def _plain(node: yaml.Node, source: Path, faults: list[str], seen: set[int]) -> "_Value | _Branch":
    where = f"{source}:{node.start_mark.line + 1}"
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.endswith((":python", ":binary", ":set", ":omap")):
        faults.append(f"{where}: the tag {node.tag} is not plain data")
        return _Value(None, where)
    if id(node) in seen:
        faults.append(f"{where}: anchors and aliases are not taken; write it out")
        return _Value(None, where)
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        branch = _Branch({}, where)
        for key_node, value_node in node.value:
            at = f"{source}:{key_node.start_mark.line + 1}"
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            if name in branch.children:
                faults.append(f"{at}: {name}: stands there twice")
            branch.children[name] = _plain(value_node, source, faults, seen)
        return branch
    if isinstance(node, yaml.SequenceNode):
        items = [_plain(child, source, faults, seen) for child in node.value]
        return _Value([item.value if isinstance(item, _Value) else item for item in items], where)
    try:
        value = _CONSTRUCTOR.construct_object(node)  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, ValueError) as problem:
        faults.append(f"{where}: {node.value!r}: {problem}")
        return _Value(None, where)
    return _Value(value, where)


def _add_environment(tree: _Branch, environ: Mapping[str, str], faults: list[str]) -> None:
    for name in sorted(environ):
        if not name.startswith("MCPCTL_") or name in _OTHER_VARIABLES:
            continue
        where = f"environment {name}"
        parts = name.removeprefix("MCPCTL_").lower().split("__")
        if len(parts) < 2:
            faults.append(f"{where}: names no key; the form is MCPCTL_<SECTION>__<KEY>{_meant(name, _OTHER_VARIABLES)}")
            continue
        try:
            value = yaml.safe_load(environ[name])
        except yaml.YAMLError:
            value = environ[name]
        if not isinstance(value, bool | int | list | type(None)):
            value = environ[name]
        branch = tree
        for part in parts[:-1]:
            child = branch.children.setdefault(part, _Branch({}, where))
            if not isinstance(child, _Branch):
                child = branch.children[part] = _Branch({}, where)
            branch = child
        branch.children[parts[-1]] = _Value(value, where)
    if url := environ.get("MCPCTL_DATABASE_URL"):
        databases = tree.children.setdefault("databases", _Branch({}, "environment"))
        if isinstance(databases, _Branch):
            if "default" in databases.children:
                faults.append("environment MCPCTL_DATABASE_URL: the config has a database named `default` too")
            where = "environment MCPCTL_DATABASE_URL"
            databases.children["default"] = _Branch({"dsn": _Value(url, where)}, where)


def _meant(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _read(cls: type[T], branch: _Branch, prefix: str, faults: list[str]) -> T:
    fields = {found.name: found for found in dataclasses.fields(cls) if found.metadata}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, child in branch.children.items():
        dotted = prefix + name
        found = fields.get(name)
        if found is None:
            meant = _meant(name, fields) or f"; there are {', '.join(fields)}"
            faults.append(f"{child.where}: {dotted}: there is no such key{meant}")
        elif "section" in found.metadata or "named" in found.metadata:
            if isinstance(child, _Value) and child.value is None:
                child = _Branch({}, child.where)
            if not isinstance(child, _Branch):
                faults.append(f"{child.where}: {dotted}: expected keys and values below it")
            elif "section" in found.metadata:
                values[name] = _read(found.metadata["section"], child, dotted + ".", faults)
            else:
                values[name] = _read_named(found.metadata["named"], child, dotted, faults)
        elif isinstance(child, _Branch):
            faults.append(f"{child.where}: {dotted}: expected one value, not keys below it")
        else:
            try:
                values[name] = found.metadata["read"](child.value)
            except ValueError as problem:
                faults.append(f"{child.where}: {dotted}: takes {problem}, not {child.value!r}")
    return cls(**values)


def _read_named(cls: type[T], branch: _Branch, dotted: str, faults: list[str]) -> dict[str, T]:
    named = {}
    for name, child in branch.children.items():
        if not NAME.fullmatch(name):
            faults.append(f"{child.where}: {dotted}.{name}: a name is a-z, then a-z 0-9 - _, 63 at most")
        elif isinstance(child, _Branch):
            named[name] = _read(cls, child, f"{dotted}.{name}.", faults)
        else:
            faults.append(f"{child.where}: {dotted}.{name}: expected keys and values below it")
    return named


def _place(settings: Settings, source: Path | None) -> Settings:
    """Relative paths are relative to the config file's folder."""
    folder = source.parent if source else default_folder()

    def placed(value: Any) -> Any:
        if isinstance(value, Path):
            return folder / value.expanduser()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [found.name for found in dataclasses.fields(value)]
            return dataclasses.replace(value, **{name: placed(getattr(value, name)) for name in fields})
        if isinstance(value, dict):
            return {name: placed(item) for name, item in value.items()}
        return value

    done: Settings = placed(settings)
    return done


def _check_together(settings: Settings, tree: _Branch, faults: list[str]) -> None:
    """What one key cannot say alone."""
    tls = settings.server.tls
    if (tls.cert is None) != (tls.key is None):
        faults.append("server.tls: cert and key go together")
    if tls.chain is not None and tls.cert is None:
        faults.append("server.tls.chain: goes with cert and key")
    if settings.server.sse and settings.server.workers > 1:
        faults.append("server.sse: its sessions live in one process; it goes with workers: 1 only")
    if settings.limits.connections < settings.server.workers:
        faults.append("limits.connections: each of server.workers needs at least one")
    lifetime, most = settings.auth.token_lifetime, settings.auth.max_token_lifetime
    if lifetime and most and lifetime > most:
        faults.append("auth.token_lifetime: is above auth.max_token_lifetime")
    if sum(database.default for database in settings.databases.values()) > 1:
        faults.append("databases: only one can be the default")
    branch = tree.children.get("databases")
    for name, database in settings.databases.items():
        child = branch.children.get(name) if isinstance(branch, _Branch) else None
        where = child.where if child else "databases"
        _check_database(name, database, where, faults)


def _check_database(name: str, database: Database, where: str, faults: list[str]) -> None:
    parts = (database.host, database.port, database.dbname, database.user, database.sslmode, database.sslrootcert)
    if database.dsn is None and database.host is None:
        faults.append(f"{where}: databases.{name}: needs dsn, or host with port, dbname and user")
    elif database.dsn is not None and any(part is not None for part in parts):
        faults.append(f"{where}: databases.{name}: dsn, or host, port, dbname, user, sslmode: not both")
    if database.dsn and "environment" not in where and _has_password(database.dsn):
        faults.append(
            f"{where}: databases.{name}.dsn: holds a password; put it into a 0600 file and name that in password_file"
        )


def _has_password(dsn: str) -> bool:
    if "://" in dsn:
        try:
            url = urlsplit(dsn)
        except ValueError:
            return False
        return bool(url.password) or "password" in parse_qs(url.query)
    return bool(re.search(r"\bpassword\s*=", dsn))


def default_database(settings: Settings) -> str | None:
    """The database that is meant when a call names none."""
    if len(settings.databases) == 1:
        return next(iter(settings.databases))
    return next((name for name, database in settings.databases.items() if database.default), None)
