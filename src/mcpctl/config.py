"""Settings from YAML and environment. Every fault is reported at once, as `file:line: key: what is wrong`.

An environment variable `MCPCTL_<SECTION>__<KEY>` replaces the key; one that names no key is a fault like a typo in
the file. Its value is read as YAML, or else as the text that it is.
"""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mcpctl import config_oauth, config_oidc, config_profile, plain_yaml, private_file
from mcpctl.config_keys import Audit, Settings
from mcpctl.config_values import Reader, has_password, is_loopback
from mcpctl.errors import ConfigError, NotFoundError
from mcpctl.plain_yaml import Branch, Value

T = TypeVar("T")

NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
ACCESSES = ("read", "write", "admin")
"""What one may have in a database."""
OF_SESSIONS = ("sessions:list", "sessions:end")
"""What one may do with the sessions of others."""
TOOLS = (
    "query_database", "get_schema_info", "explain_query", "execute_statement", "database_health",
    "get_pg_configuration", "set_pg_configuration", "list_databases", "whoami", "register_database",
    "list_my_databases", "remove_database",
)  # fmt: skip
"""The name of every tool, so that a permission for none is a fault of the config. A test holds it to tools/table.py."""
_BUILT_IN = "mcp-"
"""The beginning of the built-in roles' names."""
_OTHER_VARIABLES = {"MCPCTL_CONFIG", "MCPCTL_DATABASE_URL", "MCPCTL_TOKEN"}
_OF_KUBERNETES = re.compile(r"MCPCTL_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_[A-Z]+)?)?)")
"""What Kubernetes puts into every container for a Service that is called mcpctl."""
_MAY_HOLD_SECRETS = (
    "dsn", "service_dsn", "endpoint", "host", "hosts", "user", "dbname", "password_file", "public_url", "tokens",
    "recipients",
)  # fmt: skip
_INSTEAD_OF_DSN = ("host", "port", "dbname", "user", "sslmode", "sslrootcert", "sslcert", "sslkey")
_NO_HOME = Path("/nonexistent")


def default_folder() -> Path:
    """The user's own config folder, by the platform's custom."""
    try:
        home = Path.home()
    except RuntimeError:  # a uid without an entry in the password file, and no HOME
        home = _NO_HOME
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA", home)) / "mcpctl"
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "mcpctl"
    named = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (named if named.is_absolute() else home / ".config") / "mcpctl"


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


def load(
    path: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    forgiven: list[str] | None = None,
    at: Path | None = None,
    data: bytes | None = None,
    mode: int = 0o640,
) -> Settings:
    """Read and check the configuration, or raise ConfigError with every fault in it (exit 3).
    Where there is no file, `MCPCTL_DATABASE_URL` alone is enough; without either NotFoundError (exit 3). With
    `forgiven`, faults outside of _NEEDED are added to it; then all but _NEEDED is as if it were not there. `at`: where
    it is read as if it stood there. `data`: what it holds, where it is not written yet. `mode`: the most that the file
    may have.
    """
    source = find(path, environ)
    if source is None and not environ.get("MCPCTL_DATABASE_URL"):
        raise NotFoundError(
            "there is no config file",
            "make one with `mcpctl init`, or name one with --config; MCPCTL_DATABASE_URL alone is enough for "
            "`serve --stdio`",
            exit_code=3,
        )
    if source is not None and data is None:
        private_file.become_owner(source)
        data = private_file.read(source, mode=mode, trusted_owner=0, limit=4 << 20).data
    faults: list[str] = []
    tree = plain_yaml.parse(data, source, faults) if source and data else Branch({}, "the environment")
    unread = bool(faults)
    nameless: list[str] = []
    _add_environment(tree, environ, nameless)
    faults += nameless
    settings = _checked(tree, at or source, faults)
    hint = "docs/reference/config.md says what each key takes; `mcpctl config check` tries again"
    if faults and forgiven is not None:
        forgiven += faults
        faults = [one for one in nameless if "names no key" in one]  # it may be meant for one of _NEEDED
        if unread and source and data:
            tree = plain_yaml.parse(_sections(data), source, faults)
            _add_environment(tree, environ, [])
        settings = _checked(_pruned(tree), source, faults)
        hint = f"`touch lockdown` beside tokens.yaml locks the server at once; {hint}"
    if faults:
        raise ConfigError("the configuration is not in order:\n  " + "\n  ".join(faults), hint)
    return settings


_NEEDED: dict[str, tuple[str, ...]] = {
    "auth": ("token_file", "user_file", "tenant_file"),
    "server": ("runtime_dir", "state_file"),
    "keyring": ("file",),
    "audit": tuple(found.name for found in dataclasses.fields(Audit)),
}
"""The keys that say where a right is taken away."""


def _sections(data: bytes) -> bytes:
    """The lines of a file that is not YAML that stand below _NEEDED, each where it was; all lines where it is not clear
    which those are."""
    known = {found.name.encode() for found in dataclasses.fields(Settings)}
    kept, inside = [], False
    for line in data.splitlines():
        if line.strip() and line[:1] not in b" \t#":
            name = line.partition(b":")[0]
            if name not in known:
                return data
            inside = name.decode() in _NEEDED
        kept.append(line if inside else b"")
    return b"\n".join(kept)


def _pruned(tree: Branch) -> Branch:
    """What stands below _NEEDED, and what may be a misspelt key of it, which is a fault still."""
    sections = {found.name: found.metadata for found in dataclasses.fields(Settings) if found.metadata}
    kept: dict[str, Value | Branch] = {}
    for name, child in tree.children.items():
        if name in _NEEDED and isinstance(child, Branch):
            known = {found.name for found in dataclasses.fields(sections[name]["section"])}
            below = {
                key: value
                for key, value in child.children.items()
                if key in _NEEDED[name] or (key not in known and _meant(key, _NEEDED[name]))
            }
            kept[name] = Branch(below, child.where)
        elif name in _NEEDED or (name not in sections and _meant(name, _NEEDED)):
            kept[name] = child
    return Branch(kept, tree.where)


def _checked(tree: Branch, source: Path | None, faults: list[str]) -> Settings:
    settings = _read(Settings, tree, "", faults)
    try:
        settings = dataclasses.replace(_place(settings, source), source=source)
    except RuntimeError as problem:  # ~somebody whom there is not
        faults.append(f"{tree.where.rpartition(':')[0] or tree.where}: a path cannot be found: {problem}")
    _check_together(settings, tree, faults)
    return settings


def _add_environment(tree: Branch, environ: Mapping[str, str], faults: list[str]) -> None:
    for name in sorted(environ):
        if not name.startswith("MCPCTL_") or name in _OTHER_VARIABLES or _is_of_kubernetes(name, environ):
            continue
        where = f"environment {name}"
        parts = name.removeprefix("MCPCTL_").lower().split("__")
        if len(parts) < 2:
            faults.append(f"{where}: names no key; the form is MCPCTL_<SECTION>__<KEY>{_meant_variable(name)}")
            continue
        branch: Branch | None = tree
        for part in parts[:-1]:
            branch = _below(branch, part, where) if branch is not None else None
        if branch is not None:
            branch.children[parts[-1]] = _from_environment(environ[name], where)
    if url := environ.get("MCPCTL_DATABASE_URL"):
        where = "environment MCPCTL_DATABASE_URL"
        databases = _below(tree, "databases", where)
        if databases is not None:
            if "default" in databases.children:
                faults.append(f"{where}: the config has a database named `default` too")
            databases.children["default"] = Branch({"dsn": Value(url, where)}, where)


def _is_of_kubernetes(name: str, environ: Mapping[str, str]) -> bool:
    return bool(_OF_KUBERNETES.fullmatch(name)) and environ.get("MCPCTL_PORT", "").startswith(("tcp://", "udp://"))


def _below(branch: Branch, name: str, where: str) -> Branch | None:
    """The branch of that name, made where there is none; None where something else stands there, which is a fault."""
    child = branch.children.get(name)
    if child is None or (isinstance(child, Value) and child.value is None):
        child = branch.children[name] = Branch({}, where)
    return child if isinstance(child, Branch) else None


def _from_environment(text: str, where: str) -> Value:
    try:
        return Value(plain_yaml.value(text), where, text)
    except ValueError:
        return Value(text, where)


def _meant(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name.lower(), list(names), 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _paths(cls: type[Any], prefix: str = "") -> Iterator[str]:
    """Every key that there is, dotted, but for those below a name."""
    for found in dataclasses.fields(cls):
        if found.metadata:
            yield prefix + found.name
            if "section" in found.metadata:
                yield from _paths(found.metadata["section"], f"{prefix}{found.name}.")


def _elsewhere(name: str) -> str:
    """The key that is meant where it stands in the wrong place: `port` for `server.port`."""
    found = [path for path in _paths(Settings) if path.rpartition(".")[2] == name.lower()]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _meant_variable(name: str) -> str:
    """The variable that is meant: with one underscore, or without its section."""
    known = {f"MCPCTL_{path.replace('.', '__').upper()}": path for path in _paths(Settings) if "." in path}
    flat = {variable.replace("__", "_"): variable for variable in known}
    key = name.removeprefix("MCPCTL_").lower()
    found = [variable for variable, path in known.items() if path.rpartition(".")[2] == key]
    section = [variable for variable, path in known.items() if path.partition(".")[0] == key]
    close = difflib.get_close_matches(name, [*flat, *_OTHER_VARIABLES], 1, 0.85)
    meant = found or section[:1] or [flat.get(one, one) for one in close]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def _read(cls: type[T], branch: Branch, prefix: str, faults: list[str]) -> T:
    fields = {found.name: found for found in dataclasses.fields(cls) if found.metadata}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, child in branch.children.items():
        dotted = prefix + name
        found = fields.get(name)
        if found is None:
            meant = _meant(name, fields) or _elsewhere(name) or f"; there are {', '.join(fields)}"
            faults.append(f"{child.where}: {dotted}: there is no such key{meant}")
        elif "section" in found.metadata or "named" in found.metadata:
            if isinstance(child, Value) and child.value is None:
                child = Branch({}, child.where)
            if not isinstance(child, Branch):
                faults.append(f"{child.where}: {dotted}: expected keys and values below it")
            elif "section" in found.metadata:
                values[name] = _read(found.metadata["section"], child, dotted + ".", faults)
            else:
                values[name] = _read_named(found.metadata["named"], child, dotted, faults, found.metadata.get("name"))
        elif isinstance(child, Branch) and "map" not in found.metadata:
            faults.append(f"{child.where}: {dotted}: expected one value, not keys below it")
        else:
            given = _as_map(child) if isinstance(child, Branch) or "map" in found.metadata else child
            try:
                values[name] = _value(found.metadata["read"], given)
            except ValueError as problem:
                shown = "what stands there" if name in _MAY_HOLD_SECRETS else _shown(given.value)
                faults.append(f"{child.where}: {dotted}: takes {problem}, not {shown}")
    return cls(**values)


def _as_map(found: Value | Branch) -> Value:
    """What stands there as one value: keys and theirs, in the environment too (`{staff: mcp-user}`)."""
    faults: list[str] = []
    if isinstance(found, Value) and found.where.startswith("environment ") and isinstance(found.value, str):
        tree = plain_yaml.parse(found.value.encode("utf-8", "replace"), Path("environment"), faults)
        found = found if faults else Branch(tree.children, found.where)
    plain = plain_yaml.as_plain(found)
    return Value({} if plain is None else plain, found.where)


def _value(read: Reader, found: Value) -> Any:
    """What the reader makes of a value; of one from the environment also as the text that it is (`123`, `no`)."""
    try:
        return read(found.value)
    except ValueError:
        if found.raw is None:
            raise
        return read(found.raw)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _read_named(
    cls: type[T], branch: Branch, dotted: str, faults: list[str], read: Reader | None = None
) -> dict[str, T]:
    """What stands below each name. `read` takes other names than `NAME` does."""
    named = {}
    for name, child in branch.children.items():
        try:
            name = read(name) if read is not None else name
        except ValueError as problem:
            faults.append(f"{child.where}: {dotted}.{_shown(name)[1:-1]}: a name is {problem}")
            continue
        if read is None and not NAME.fullmatch(name):
            shown = f"{dotted}: a name" if re.search("[:@/]", name) else f"{dotted}.{name}: a name"  # it may be a URL
            faults.append(f"{child.where}: {shown} is a-z, then a-z 0-9 - _, 63 at most")
        elif name in named:
            faults.append(f"{child.where}: {dotted}.{name} is there already, spelt in another way")
        elif isinstance(child, Branch):
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


def where(settings: Settings, dotted: str) -> str:
    """Where that key, or what is nearest to it, stands: `file:line`, or the variable of the environment."""
    faults: list[str] = []
    tree = Branch({}, "the environment")
    if settings.source is not None:
        data = private_file.read(settings.source, mode=0o640, trusted_owner=0, limit=4 << 20).data
        tree = plain_yaml.parse(data, settings.source, faults)
    _add_environment(tree, os.environ, faults)
    return _where(tree, dotted)


def _check_together(settings: Settings, tree: Branch, faults: list[str]) -> None:
    """What one key cannot say alone."""

    def fault(dotted: str, text: str) -> None:
        faults.append(f"{_where(tree, dotted)}: {dotted}: {text}")

    tls = _keys(tree, "server", "tls")
    if ("cert" in tls) != ("key" in tls):
        fault("server.tls", "cert and key go together")
    if "chain" in tls and "cert" not in tls:
        fault("server.tls.chain", "goes with cert and key")
    if settings.server.tls.client_certificate is not None and settings.server.tls.client_ca is None:
        fault("server.tls.client_certificate", "goes with client_ca")
    if settings.metrics.port is not None and not (settings.metrics.allow_remote or is_loopback(settings.metrics.host)):
        fault("metrics.host", "is not this machine's alone, and /metrics asks for no token; metrics.allow_remote: true")
    if settings.server.sse and settings.server.workers > 1:
        fault("server.sse", "its sessions live in one process; it goes with workers: 1 only")
    if settings.limits.connections < 2 * settings.server.workers:
        fault("limits.connections", f"each of the {settings.server.workers} server.workers needs at least two")
    for kind in ("tokens", "users", "tenants", "addresses"):
        for name in getattr(settings.limits, kind).named:
            if ("/" in name) != (kind == "addresses"):
                fault(f"limits.{kind}.named", f"{name} is not one of {kind}")
    if settings.own_databases.sslmode == "verify-ca" and settings.own_databases.sslrootcert is None:
        fault("own_databases.sslrootcert", "is needed for sslmode: verify-ca, for which the system's CAs are too many")
    lifetime, most = settings.auth.token_lifetime, settings.auth.max_token_lifetime
    if lifetime and most and lifetime > most:
        fault("auth.token_lifetime", "is above auth.max_token_lifetime")
    for name, role in settings.auth.roles.items():
        if name.startswith(_BUILT_IN):
            fault(f"auth.roles.{name}", f"names that begin with {_BUILT_IN} are the built-in roles'")
        for pattern in role.permissions:
            try:
                check_permission(pattern, settings.databases)
            except ValueError as problem:
                fault(f"auth.roles.{name}.permissions", str(problem))
    for key, text in config_profile.faults(settings):
        fault(key, text)
    for key, text in config_oidc.faults(settings.auth):
        fault(f"auth.oidc.{key}", text)
    for key, text in config_oauth.faults(settings, lambda one: check_permission(one, settings.databases)):
        fault(f"auth.oauth.{key}", text)
    if sum(database.default for database in settings.databases.values()) > 1:
        fault("databases", "only one can be the default")
    for table in settings.canaries.tables:
        if (named := table.partition(".")[0]) not in settings.databases:
            fault("canaries.tables", f"{table}: there is no database {named} in the config")
    for name, database in settings.databases.items():
        given = _keys(tree, "databases", name)
        dotted = f"databases.{name}"
        if not given & {"dsn", "host"}:
            fault(dotted, "needs dsn, or host with port, dbname and user")
        elif "dsn" in given and (both := given & {*_INSTEAD_OF_DSN}):
            fault(dotted, f"dsn, or host, port, dbname, user, sslmode, …: not both ({', '.join(sorted(both))})")
        if database.roles == "per_user" and "password_file" in given:
            fault(
                f"{dotted}.password_file",
                "each user has a password of their own there; for service_dsn: service_password_file",
            )
        only = [key for key in ("allow_open_hba", "service_dsn", "service_password_file") if getattr(database, key)]
        if database.roles != "per_user" and only:
            fault(f"{dotted}.{only[0]}", "goes with roles: per_user")
        if "service_password_file" in given and "service_dsn" not in given:
            fault(f"{dotted}.service_password_file", "goes with service_dsn")
        if ("sslcert" in given) != ("sslkey" in given):
            fault(dotted, "sslcert and sslkey go together")
        if database.host and ("://" in database.host or "@" in database.host[1:]):
            fault(f"{dotted}.host", "is a URL, or holds a login; a URL goes into dsn, a login into user")
        if database.user and ":" in database.user:
            fault(f"{dotted}.user", "holds a password, or is a URL; a role's name with a colon goes into dsn, as %3A")
        if database.dbname and ("://" in database.dbname or "=" in database.dbname):
            fault(f"{dotted}.dbname", "is a connection string; that goes into dsn")
        if database.settings and database.roles != "per_user":
            fault(f"{dotted}.settings", "needs roles: per_user, since a user changes them with a login of their own")
        for key, instead in (("dsn", "password_file"), ("service_dsn", "service_password_file")):
            text, place = getattr(database, key), f"{dotted}.{key}"
            if text and not _where(tree, place).startswith("environment ") and has_password(text):
                fault(place, f"holds a password; put it into a 0600 file and name that in {instead}")


def covers(pattern: str, permission: str) -> bool:
    """Whether a pattern such as `databases:*:read` covers a permission such as `databases:sales:read`."""
    wanted = permission.split(":")
    parts = pattern.split(":")
    for index, part in enumerate(parts):
        if part == "*" and index == len(parts) - 1:
            return True
        if index >= len(wanted) or part not in ("*", wanted[index]):
            return False
    return len(parts) == len(wanted)


def check_permission(pattern: str, databases: Iterable[str]) -> None:
    """ValueError for a pattern that covers nothing that there is: it would be a typo."""
    known = [f"tools:{name}" for name in TOOLS]
    known += [f"databases:{name}:{access}" for name in databases for access in ACCESSES]
    known += OF_SESSIONS
    if not any(covers(pattern, one) for one in known):
        close = difflib.get_close_matches(pattern, known, 1)
        raise ValueError(f"{pattern} covers nothing that there is{f'; did you mean {close[0]}?' if close else ''}")


def _walk(tree: Branch, names: tuple[str, ...]) -> "Value | Branch":
    """What stands at these names, or the last thing on the way there."""
    found: Value | Branch = tree
    for name in names:
        below = found.children.get(name) if isinstance(found, Branch) else None
        if below is None:
            break
        found = below
    return found


def _where(tree: Branch, dotted: str) -> str:
    return _walk(tree, tuple(dotted.split("."))).where


def _keys(tree: Branch, *names: str) -> set[str]:
    """The keys that are given a value there."""
    found: Value | Branch | None = tree
    for name in names:
        found = found.children.get(name) if isinstance(found, Branch) else None
    if not isinstance(found, Branch):
        return set()
    return {name for name, child in found.children.items() if isinstance(child, Branch) or child.value is not None}


def check_database(settings: Settings, name: str) -> None:
    """Raises NotFoundError (exit 4) where the config has no database of that name. What cannot be a name, such as a
    connection string with its password, is not repeated."""
    if name not in settings.databases:
        said = name if NAME.fullmatch(name) else "of that name"
        known = ", ".join(settings.databases) or "none"
        raise NotFoundError(f"there is no database {said} in the config", f"there are: {known}")


def default_database(settings: Settings) -> str | None:
    """The database that is meant when a call names none."""
    if len(settings.databases) == 1:
        return next(iter(settings.databases))
    return next((name for name, database in settings.databases.items() if database.default), None)
