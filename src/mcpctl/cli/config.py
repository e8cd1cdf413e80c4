"""mcpctl config: is the configuration in order? Have it read again."""

from typing import TYPE_CHECKING

import typer

from mcpctl.cli import common, output
from mcpctl.cli.common import ConfigOption, JsonOption, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from mcpctl.config_keys import Settings
    from mcpctl.identity.users import User
    from mcpctl.keyring import Keyring

_PATIENCE = 40
"""Seconds in which a server says what became of a reload: two that wait for each other's end."""
_SILENT = 3.0
"""Seconds after which a process that does not even say which keys it has is named."""
app = typer.Typer(help="Check the configuration, and have it read again.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Check the configuration, and have it read again."""


@app.command("check")
def check(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Read everything that the server would, without listening or connecting; every fault is named. Exits 3 on one."""
    import os
    import socket
    from functools import partial

    from mcpctl import control
    from mcpctl.config import where
    from mcpctl.errors import ConfigError, Error
    from mcpctl.identity import oauth_clients, tokens, users
    from mcpctl.keyring import Keyring
    from mcpctl.postgres.logins import Logins
    from mcpctl.server import logs, tls, tracing
    from mcpctl.server.credentials import is_loopback

    found = settings(context, config)
    faults: list[str] = []

    def tried(work: "Callable[[], object]", key: str | None = None) -> None:
        try:
            work()
        except Error as problem:
            named = problem.message.split(" ")[0].rstrip(":")
            at = named if key and named.startswith("databases.") else key
            at = "keyring.file" if named.startswith(str(found.keyring.file)) else at  # whatever is sealed with it
            place = f"{where(found, at)}: {'' if problem.message.startswith(at) else f'{at}: '}" if at else ""
            fault = f"{place}{problem.message}{f' ({problem.hint})' if problem.hint else ''}"
            if fault not in faults:  # a broken user file is one, whoever reads it
                faults.append(fault)

    tried(lambda: tokens.token_file(found.auth.token_file).current())
    tried(lambda: users.user_file(found.auth.user_file).current())
    tried(lambda: common.check_log(found), "audit")
    tried(lambda: logs.check(found), "log")
    tried(lambda: tracing.check(found.tracing), "tracing.endpoint")
    keyring = Keyring(found.keyring.file)
    tried(lambda: _check_sealed(found, keyring), "keyring.file")
    tried(lambda: _check_own(found, keyring), "server.state_file")
    if "own" in found.databases:
        place = where(found, "databases.own")
        faults.append(f"{place}: databases.own: the log names users' own databases own:NAME (give it another name)")
    before = len(faults)
    for name, database in found.databases.items():
        key = f"databases.{name}"
        password = ".password_file" if database.password_file is not None and database.dsn is None else ".dsn"
        tried(partial(Logins, {name: database}, keyring), key + password)
    tried(partial(_check_tenants, found, keyring, logins=len(faults) == before))
    if found.server.tls.cert is not None:
        tried(lambda: tls.context(found), "server.tls")
    for name in found.auth.oidc:
        tried(partial(_check_issuer, found, name), f"auth.oidc.{name}")
    for name, client in found.auth.oauth.clients.items() if found.auth.oauth.enabled else ():
        tried(partial(oauth_clients.secret_of, name, client.secret_file), f"auth.oauth.clients.{name}.secret_file")

    folder = control.folder_of(found.server.runtime_dir, found.auth.token_file)
    if not os.access(folder, os.W_OK | os.X_OK):
        key = "server.runtime_dir" if found.server.runtime_dir else "auth.token_file"
        faults.append(f"{where(found, key)}: {key}: nothing can be made in {folder}, where the control socket goes")
    try:
        socket.getaddrinfo(found.server.host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as problem:
        why = getattr(problem, "strerror", None) or "it is no name"
        faults.append(f"{where(found, 'server.host')}: server.host: is no address to listen on: {why}")
    if not is_loopback(found.server.host) and found.server.tls.cert is None and not found.server.trusted_proxies:
        host = found.server.host
        faults.append(
            f"{where(found, 'server.host')}: server.host: plain HTTP on {host} would send tokens and rows in clear "
            "(set server.tls, or server.trusted_proxies and say --behind-proxy, or listen on 127.0.0.1)"
        )
    if not found.databases:
        faults.append("the config names no database (add one below `databases:`)")
    if not faults and found.server.tls.cert is not None and (old := tls.out_of_date(found, tokens.utcnow())):
        output.warn(old)
    if not faults:
        for listed, name in users.listed_strangers(found.auth, users.user_file(found.auth.user_file).current()):
            output.warn(f"{where(found, listed)}: {listed} names {name}, and there is no such user", "is it a typo?")
        for name in sorted(set(found.canaries.tokens) - tokens.token_file(found.auth.token_file).current().keys()):
            place = where(found, "canaries.tokens")
            output.warn(f"{place}: canaries.tokens names {name}, and there is no such token", "was it removed?")
        for limited, name in _limited_strangers(found):
            kind = limited.split(".")[1].removesuffix("s")
            place = where(found, f"{limited}.{name}")
            output.warn(f"{place}: {limited} names {name}, and there is no such {kind}", "is it a typo, or over?")
    if faults:
        raise ConfigError(
            "\n  ".join(["the installation is not in order:", *faults]),
            "mend each, and check again",
        )
    if json:
        output.put_json({"ok": True, "config": found.source and str(found.source), "databases": list(found.databases)})
    else:
        output.put(
            f"ok: {found.source or 'the environment'}, {len(found.databases)} database(s): {', '.join(found.databases)}"
        )


@app.command("reload")
def reload(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Have the server that runs read its config again, as HUP does, and say what became of it. Exits 1 where it kept
    the old one."""
    import secrets

    from mcpctl import control
    from mcpctl.errors import ConfigError, Error

    broken: ConfigError | None = None
    try:
        found = settings(context, config, needs_log=False)
        folder = control.folder_of(found.server.runtime_dir, found.auth.token_file)
    except ConfigError as problem:  # the server says so, too, and writes down that it was asked
        broken, folder = problem, _control_folder(context, config)
    for pid, answer in control.ask_each(folder, {"do": "keys"}, _SILENT):  # a reload is answered at its end alone
        if "error" in answer:
            hint = f"where it hangs, `kill -9 {pid}`; with several workers another takes its place"
            output.warn(f"process {pid} does not answer; it is waited for, {_PATIENCE} seconds at most", hint)
    answers = control.ask_all(folder, {"do": "reload", "id": secrets.token_hex(8)}, _PATIENCE)
    if not answers:
        raise broken or Error("no server runs", "the config is read when one starts")
    told = [answer for answer in answers if "ok" in answer]
    if not told:
        why = answers[0].get("error")
        raise Error(f"no server here has said what became of it: {why}", "its log does; where it does not, restart it")
    for answer in told:
        if not answer["ok"]:
            raise Error(f"what was in force stays: {answer['said']}", answer["hint"])
    if json:
        output.put_json({"ok": True, "said": told[0]["said"]})
    else:
        output.put(told[0]["said"])


def _control_folder(context: typer.Context, config: "Path | None") -> "Path":
    """Where the control sockets are, by as much of a broken config as can be read."""
    import os
    from pathlib import Path

    from mcpctl import config as configuration
    from mcpctl import control, plain_yaml, private_file

    source = configuration.find(config or context.find_root().obj.config, os.environ) or Path("config.yaml")
    private_file.become_owner(source.parent / "tokens.yaml")
    try:
        whole = plain_yaml.parse(source.read_bytes(), source, [])
    except OSError:
        whole = plain_yaml.Branch({}, "")

    def path(section: str, key: str) -> Path | None:
        branch = whole.children.get(section)
        one = branch.children.get(key) if isinstance(branch, plain_yaml.Branch) else None
        found = one.value if isinstance(one, plain_yaml.Value) else None
        return source.parent / found if isinstance(found, str) else None

    return control.folder_of(path("server", "runtime_dir"), path("auth", "token_file") or source.parent / "tokens.yaml")


def _limited_strangers(found: "Settings") -> "Iterator[tuple[str, str]]":
    """(key, name) of each name that has limits of its own and is nobody's."""
    from mcpctl.identity import tenants, tokens

    now, every = tokens.utcnow(), tokens.token_file(found.auth.token_file).current()
    known = {
        "tokens": {name for name, one in every.items() if one.status(now) not in ("revoked", "expired")},
        "users": _people(found),
        "tenants": tenants.tenant_file(found.auth.tenant_file).current(),
    }
    for kind, entries in known.items():
        yield from ((f"limits.{kind}.named", name) for name in getattr(found.limits, kind).named if name not in entries)


def _people(found: "Settings") -> "Mapping[str, User]":
    """The users; nobody where their file is broken, which is another check's affair."""
    from mcpctl.errors import Error
    from mcpctl.identity import users

    try:
        return users.user_file(found.auth.user_file).current()
    except Error:
        return {}


def _check_sealed(found: "Settings", keyring: "Keyring") -> None:
    """Whether each user's sealed password opens."""
    from mcpctl.postgres.logins import Logins

    Logins({}, keyring).check_sealed(_people(found))


def _check_tenants(found: "Settings", keyring: "Keyring", *, logins: bool) -> None:
    """Whether each user's tenant is there, and its database, and the tenants share nothing; with `logins`, where each
    is in order, also by two names of one database."""
    from mcpctl.identity import tenants
    from mcpctl.postgres.logins import Logins

    twins = Logins(found.databases, keyring).twins if logins else None
    places = tenants.tenant_file(found.auth.tenant_file, twins, lambda one: one.database in found.databases).current()
    tenants.check_members(found.auth.tenant_file, places, _people(found))


def _check_issuer(found: "Settings", name: str) -> None:
    """Its CA and our secret there; it is not asked."""
    from mcpctl.identity import oidc
    from mcpctl.identity.tokens import utcnow

    oidc.Issuers({name: found.auth.oidc[name]}, utcnow)


def _check_own(found: "Settings", keyring: "Keyring") -> None:
    """Whether somebody can say who is blocked, where there are canaries; and whether the password of each database that
    a user has brought opens, as a server that starts sees to it."""
    from contextlib import closing

    from mcpctl.identity.blocked import Blocked, store
    from mcpctl.postgres.own import Own

    with closing(store(found)) as state:
        Blocked(state).current()
    if not found.server.state_file.exists():
        return
    own = Own(found, keyring, None)
    try:
        own.start()
    finally:
        own.close()
