"""What `mcpctl init` has to know: from its flags, and on a terminal from the person for what no flag says."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mcpctl.config_values import is_loopback
from mcpctl.errors import UsageError

T = TypeVar("T")

READER = "mcpctl_reader"
"""The shared login role that is made where no other is named."""
LIFETIME = "90d"
SOCKETS = ("/var/run/postgresql", "/tmp")  # noqa: S108 - where PostgreSQL's socket is, by packages and by its source
_LOCAL, _TLS, _PROXY = "here", "tls", "proxy"


@dataclass(frozen=True)
class Given:
    """The flags, as they were said."""

    db_host: str | None = None
    db_port: int | None = None
    db_name: str | None = None
    db_user: str | None = None
    db_password_file: str | None = None
    db_sslmode: str | None = None
    db_sslrootcert: str | None = None
    database: str | None = None
    roles: str | None = None
    host: str | None = None
    port: int | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_chain: str | None = None
    behind_proxy: tuple[str, ...] = ()
    public_url: str | None = None
    user: str | None = None
    expiry: str | None = None
    out: Path | None = None
    issuer: str | None = None


@dataclass(frozen=True)
class Postgres:
    """Where PostgreSQL is, and how it is logged in to. `name` is the database's in the config; `made_up` tells that
    the password was made here, for a role that is to be made."""

    name: str
    host: str
    port: int | None
    dbname: str
    roles: str
    user: str | None
    password: str | None
    made_up: bool
    sslmode: str | None
    sslrootcert: str | None


@dataclass(frozen=True)
class Listening:
    """Who can connect, and how."""

    host: str
    port: int
    cert: str | None
    key: str | None
    chain: str | None
    proxies: tuple[str, ...]
    public_url: str | None

    @property
    def url(self) -> str:
        """What clients call the server by, without a path."""
        return self.public_url or f"{'https' if self.cert else 'http'}://{self.host}:{self.port}"


@dataclass(frozen=True)
class Answers:
    """All of it."""

    postgres: Postgres | None
    listening: Listening
    user: str | None
    expiry: str | None
    out: Path | None
    issuer: str | None


class Asking:
    """The person at the terminal. Questions go to stderr; `-` stands for nothing."""

    def needed(self, question: str, default: str | None = None, *, check: Callable[[str], object] = str) -> str:
        """An answer that there has to be."""
        while True:
            answer = self.text(question, default, check=check)
            if answer:
                return answer

    def text(self, question: str, default: str | None = None, *, check: Callable[[str], object] = str) -> str | None:
        """An answer, asked for again while `check` raises ValueError for it; None for -."""
        import typer

        from mcpctl.cli import output

        while True:
            answer = str(typer.prompt(question, default=default, err=True)).strip()
            if answer == "-":
                return None
            try:
                check(answer)
            except ValueError as problem:
                output.say(f"  that takes {problem}")
            else:
                return answer

    def secret(self, question: str) -> str:
        """An answer that is not shown; empty for none."""
        import getpass
        import sys

        return getpass.getpass(f"{question}: ", stream=sys.stderr)

    def yes(self, question: str) -> bool:
        """A yes, or the no that Enter is."""
        import typer

        return typer.confirm(question, err=True)


def answered(given: Given, asking: Asking | None, password_of: Callable[[str], str]) -> Answers:
    """The answers: the flags', then the person's where there is one, then the defaults. UsageError (exit 2) for flags
    that do not go together. `password_of` reads the file that --db-password-file names."""
    _check(given)
    postgres = _postgres(given, asking, password_of)
    listening = _listening(given, asking)
    user, expiry = given.user, given.expiry
    if asking is not None and user is None:
        user = asking.text("first user of mcpctl, - for none", _self(), check=_user_name)
    if asking is not None and user is not None and given.user is None and expiry is None:
        expiry = asking.text(f"a token for {user}, shown once: it is to last, - for none", LIFETIME, check=_end)
    issuer = given.issuer
    if asking is not None and issuer is None:
        issuer = asking.text(
            "an identity provider's URL (issuer) whose tokens are taken too, - for none", "-", check=_issuer
        )
    return Answers(postgres, listening, user, expiry, given.out, issuer)


def _check(given: Given) -> None:
    more = [name for name, value in vars(given).items() if name.startswith("db_") and value is not None]
    more += ["database"] if given.database is not None else []
    more += ["roles"] if given.roles is not None else []
    if more and given.db_host is None:
        raise UsageError(f"--{more[0].replace('_', '-')} goes with --db-host", "say where PostgreSQL is")
    if given.roles not in (None, "shared", "per_user"):
        raise UsageError(f"--roles takes shared or per_user, not {given.roles!r}", "shared is one login for all")
    if given.roles == "per_user" and (given.db_user or given.db_password_file):
        raise UsageError("--roles per_user has no login of its own", "leave out --db-user and --db-password-file")
    if (given.tls_cert is None) != (given.tls_key is None) or (given.tls_chain and not given.tls_cert):
        raise UsageError("--tls-cert and --tls-key go together", "--tls-chain goes with both")
    if given.tls_cert and given.behind_proxy:
        raise UsageError("--tls-cert and --behind-proxy exclude each other", "who has the certificate does the TLS")
    if (given.tls_cert or given.behind_proxy) and given.public_url is None:
        raise UsageError("--public-url is missing", "what clients call the server by, such as https://mcp.example.org")
    if given.host is not None and not (given.tls_cert or given.behind_proxy) and not is_loopback(given.host):
        hint = "say --tls-cert and --tls-key, or --behind-proxy, or leave --host out"
        raise UsageError(f"plain HTTP on {given.host} would send tokens and rows in clear", hint)
    if given.user is None and (given.expiry or given.out):
        raise UsageError("--expiry and --out are for the token of --user", "say whose it is")
    if given.out is not None and given.expiry is None:
        raise UsageError("--out is for a token, and --expiry is missing", f"say --expiry {LIFETIME}")


def _or_asked(said: T | None, asking: Asking | None, ask: Callable[[Asking], T | None], default: T) -> T:
    if said is not None or asking is None:
        return default if said is None else said
    found = ask(asking)
    return default if found is None else found


def _postgres(given: Given, asking: Asking | None, password_of: Callable[[str], str]) -> Postgres | None:
    from mcpctl.postgres import scram
    from mcpctl.postgres.login import is_here

    host = given.db_host
    if host is None and asking is not None:
        host = asking.text("PostgreSQL: host, address, or folder of its socket, - to name it later", "localhost")
    if host is None:
        return None
    port = given.db_port
    if port is None and asking is not None and given.db_host is None:
        port = int(asking.needed("its port", "5432", check=_port))
    if given.db_name is None and asking is None:
        raise UsageError("--db-name is missing", "the database's name in PostgreSQL")
    dbname = given.db_name or (asking.needed("the database's name there") if asking is not None else "")
    roles = _or_asked(given.roles, None if given.db_user else asking, _ask_roles, "shared")
    sslmode = given.db_sslmode
    if asking is not None and sslmode is None and not is_here(host):
        sslmode = asking.text("sslmode: verify-full, verify-ca or require", "verify-full", check=_ssl_mode)
    user, password, made_up = None, None, False
    if roles == "shared":
        user = _or_asked(given.db_user, asking, lambda who: who.text("a login role that can only read", READER), READER)
        if given.db_password_file is not None:
            password = password_of(given.db_password_file)
        elif asking is not None:
            password = asking.secret(f"password of {user}, empty to make one up for a role that is to be made")
        made_up = not password
        password = password or scram.new_password()
    name = given.database or _name(dbname)
    return Postgres(
        name, host, port, dbname, roles, user, password, made_up, sslmode, given.db_sslrootcert
    )  # fmt: skip


def _ask_roles(asking: Asking) -> str | None:
    question = (
        "shared: one login for all, for the quick start; per_user: one for each user, whom PostgreSQL tells apart"
    )
    return asking.text(question, "per_user", check=_roles)


def _listening(given: Given, asking: Asking | None) -> Listening:
    cert, key, proxies, url = given.tls_cert, given.tls_key, given.behind_proxy, given.public_url
    way = _TLS if cert else _PROXY if proxies else None
    if way is None and asking is not None and given.host is None:
        question = (
            "who connects: here (this machine alone), tls (others; a certificate here), proxy (others; through one)"
        )
        way = asking.needed(question, _LOCAL, check=_way)
        if way == _TLS:
            cert, key = (
                asking.needed("its certificate in PEM", check=_file),
                asking.needed("its key in PEM", check=_file),
            )
        elif way == _PROXY:
            proxies = tuple(asking.needed("the proxy's address or network", "127.0.0.1", check=_network).split(","))
        if way != _LOCAL and url is None:
            url = asking.needed("what clients call the server by, such as https://mcp.example.org", check=_url)
    host = given.host or ("0.0.0.0" if way == _TLS else "127.0.0.1")  # noqa: S104 - it has TLS
    port = given.port or (8443 if way == _TLS else 8080)
    return Listening(host, port, cert, key, given.tls_chain, proxies, url)


def _name(dbname: str) -> str:
    """A name in the config for a database."""
    made = re.sub(r"[^a-z0-9_-]", "-", dbname.lower())[:63]
    return made if re.fullmatch(r"[a-z][a-z0-9_-]*", made) and made != "own" else "main"


def _self() -> str:
    """The user's name for who runs this, where it can be one."""
    import os

    from mcpctl.cli.common import user_name

    name = os.environ.get("SUDO_USER") or user_name()
    try:
        _user_name(name)
    except ValueError:
        return "-"
    return "-" if name == "root" else name


def _user_name(text: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", text):
        raise ValueError("a-z first, then a-z 0-9 -, at most 31")


def _port(text: str) -> None:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise ValueError("a port, 1 to 65535")


def _roles(text: str) -> None:
    if text not in ("shared", "per_user"):
        raise ValueError("shared or per_user")


def _ssl_mode(text: str) -> None:
    if text not in ("verify-full", "verify-ca", "require"):
        raise ValueError("verify-full, verify-ca or require")


def _way(text: str) -> None:
    if text not in (_LOCAL, _TLS, _PROXY):
        raise ValueError("here, tls or proxy")


def _file(text: str) -> None:
    if not Path(text).expanduser().is_file():
        raise ValueError("a file that is there")


def _network(text: str) -> Any:
    from mcpctl.config_values import network

    return [network(one.strip()) for one in text.split(",")]


def _issuer(text: str) -> None:
    if not text.startswith("https://"):
        raise ValueError("a URL that begins with https://, as the provider's tokens have it")


def _end(text: str) -> None:
    from mcpctl.config_values import duration
    from mcpctl.identity.tokens import parse_expiry, utcnow

    now = utcnow()
    try:
        ends = parse_expiry(text, now)
    except UsageError as problem:
        raise ValueError(problem.hint) from None
    if ends is None or (ends - now).total_seconds() > duration(LIFETIME):
        raise ValueError(f"{LIFETIME} at most")


def _url(text: str) -> Any:
    from mcpctl.config_values import public_url

    return public_url(text)
