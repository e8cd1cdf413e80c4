"""The config that `mcpctl init` writes, from the answers, and the SQL and the steps that go with it."""

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from mcpctl.cli.init_answers import LIFETIME, SOCKETS, Answers, Listening, Postgres
from mcpctl.cli.init_layout import Layout

if TYPE_CHECKING:
    from mcpctl.config_keys import Database

_HEAD = (
    "# mcpctl. Every key, its default and its meaning: docs/reference/config.md. After a change: mcpctl config check\n"
)
_NO_DATABASE = """\
databases:
  # shop:
  #   host: /var/run/postgresql        # or db.example.org, which is then asked for a certificate (verify-full)
  #   dbname: shop
  #   user: shop_reader                # a role that can only read; docs/quick-start.md says how to make one
  #   password_file: shop.password     # 0600, beside this file
"""
ISSUER = "idp"
"""What the issuer is called in the config."""


def text(answers: Answers, layout: Layout) -> str:
    """config.yaml."""
    parts = [_HEAD, _server(answers.listening, layout), _auth(answers), _audit(layout), _backup(layout)]
    return "".join(parts) + (_database(answers.postgres) if answers.postgres is not None else _NO_DATABASE)


def _scalar(value: object) -> str:
    """A value as YAML has it."""
    found = str(value)
    plain = re.fullmatch(r"[A-Za-z/][A-Za-z0-9_./-]*", found)
    if isinstance(value, int) or (plain and found.lower() not in ("yes", "no", "on", "off", "true", "false", "null")):
        return found
    return json.dumps(found, ensure_ascii=False)


def _lines(section: str, values: dict[str, object], indent: str = "") -> str:
    """Keys and values below a section, without those that have none; nothing where none has one."""
    said = {key: value for key, value in values.items() if value is not None}
    listed = "".join(
        f"{indent}  {key}: {value if key in _AS_IT_IS else _scalar(value)}\n" for key, value in said.items()
    )
    return f"{indent}{section}:\n{listed}" if listed else ""


_AS_IT_IS = ("tls", "trusted_proxies", "max_token_lifetime", "audience", "clients", "roles_claims")


def _flow(texts: "list[str] | tuple[str, ...]") -> str:
    return f"[{', '.join(map(_scalar, texts))}]"


def _server(listening: Listening, layout: Layout) -> str:
    service = layout.owner is not None
    tls = {"cert": listening.cert, "key": listening.key, "chain": listening.chain}
    inner = ", ".join(f"{key}: {_scalar(Path(value).expanduser().absolute())}" for key, value in tls.items() if value)
    usual = (listening.host, listening.port) == ("127.0.0.1", 8080)
    return _lines(
        "server",
        {
            "host": None if usual else listening.host,
            "port": None if usual else listening.port,
            "public_url": listening.public_url,
            "tls": f"{{{inner}}}" if inner else None,
            "trusted_proxies": _flow(listening.proxies) if listening.proxies else None,
            "state_file": layout.state / "state.db" if service else None,
            "runtime_dir": layout.run if service else None,
        },
    )


def _auth(answers: Answers) -> str:
    found = _lines("auth", {"max_token_lifetime": f"{LIFETIME}  # nobody can make a token that is forgotten for ever"})
    if answers.issuer is None:
        return found
    keycloak = "/realms/" in answers.issuer
    values: dict[str, object] = {
        "issuer": answers.issuer,
        "audience": _flow([answers.listening.url]),
        "clients": "[mcp-desktop]" if keycloak else None,
        "roles_claims": "[realm_access.roles]" if keycloak else None,
    }
    return found + "  oidc:\n" + _lines(ISSUER, values, "    ")


def _audit(layout: Layout) -> str:
    return _lines("audit", {"file": layout.log / "audit.jsonl" if layout.owner is not None else None})


def _backup(layout: Layout) -> str:
    return _lines("backup", {"directory": layout.backups})


def _database(postgres: Postgres) -> str:
    values: dict[str, object] = {
        "host": postgres.host,
        "port": postgres.port if postgres.port != 5432 else None,
        "dbname": postgres.dbname,
        "user": postgres.user,
        "password_file": f"{postgres.name}.password" if postgres.password is not None else None,
        "sslmode": postgres.sslmode,
        "sslrootcert": certificate(postgres),
        "roles": "per_user" if postgres.roles == "per_user" else None,
    }
    return "databases:\n" + _lines(postgres.name, values, "  ")


def certificate(postgres: Postgres) -> str | None:
    """The CA file of PostgreSQL's certificate, by its whole path; `system` is libpq's word for the system's."""
    said = postgres.sslrootcert
    return said if said in (None, "system") else str(Path(said).expanduser().absolute())


def settings(postgres: Postgres) -> "Database":
    """The database as the config will have it, but for its password."""
    from mcpctl.config_keys import Database

    return Database(
        host=postgres.host,
        port=postgres.port,
        dbname=postgres.dbname,
        user=postgres.user,
        sslmode=postgres.sslmode,
        sslrootcert=certificate(postgres),
    )


def provider_steps(answers: Answers) -> list[str]:
    """What is to be done at the identity provider, with our values."""
    url = answers.listening.url
    return [
        f"at {answers.issuer}, in the words of docs/identity-provider.md:",
        "  - a public client for people's programs, mcp-desktop: authorization code with PKCE (S256), redirect URI"
        " http://127.0.0.1/* ; device flow, if wanted",
        f"  - its access tokens are for this server: aud has {url}",
        "  - roles mcp-user, mcp-tools, mcp-developer, mcp-admin in its access tokens, given to people",
        f"  - here, for each person: mcpctl user link {answers.user or 'U'} --issuer {ISSUER} --subject THEIR-SUB",
    ]


def _psql(postgres: Postgres) -> str:
    """How a superuser gets in: on this machine as the system's user postgres, whom PostgreSQL knows."""
    from mcpctl.postgres.login import is_here

    here = is_here(postgres.host)
    where = [] if here and not (postgres.host[0] == "/" and postgres.host not in SOCKETS) else ["-h", postgres.host]
    where += ["-p", str(postgres.port)] if postgres.port not in (None, 5432) else []
    command = shlex.join(["psql", "-v", "ON_ERROR_STOP=1", *where, *([] if here else ["-U", "postgres"])])
    return f"{'sudo -u postgres ' if here else ''}{command} -d {shlex.quote(postgres.dbname)}"


def steps(answers: Answers, layout: Layout, *, sql: bool, token: bool, flag: str) -> list[str]:
    """The commands that come next, in order; `flag` is what they need to find the config. A service's are root's."""
    found: list[str] = []
    run = "mcpctl" if layout.owner is None else "sudo mcpctl"
    if answers.postgres is None:
        found.append(f"name your database: {run} database add shop --host H --user R --ask-password{flag}")
    elif sql:
        script, psql = shlex.quote(str(layout.config / "roles.sql")), _psql(answers.postgres)
        taken = f"{psql} < {script}" if layout.owner is None else f"sudo cat {script} | {psql}"
        found.append(f"as a superuser of PostgreSQL, the login role: {taken}")
        if answers.postgres.host.startswith("/") and answers.postgres.user:
            line = f"local  {answers.postgres.dbname}  {answers.postgres.user}  scram-sha-256"
            found.append(f"in pg_hba.conf, where a line `local all all peer` is, before that: {line}")
    if sql and answers.postgres is not None and answers.postgres.roles == "per_user":
        found.append(
            f"see that PostgreSQL is as recorded: {run} grant diff{flag}   (pg_hba.conf: docs/users-and-grants.md)"
        )
    if answers.postgres is not None:
        harden = f"{run} database harden {answers.postgres.name} --print-sql{flag}"
        found.append(f"dangerous functions away from PUBLIC: {harden} | {_psql(answers.postgres)}")
    found.append(f"{run} config check{flag} && {run} doctor{flag}")
    if answers.user is None:
        found.append(f"{run} user add alice{flag}")
    if not token:
        found.append(f"{run} token add --user {answers.user or 'alice'} --expiry {LIFETIME}{flag}")
    unit = any(
        Path(one, "mcpctl.service").exists()
        for one in ("/etc/systemd/system", "/lib/systemd/system", "/usr/lib/systemd/system")
    )
    behind = " --behind-proxy" if answers.listening.proxies and answers.listening.host != "127.0.0.1" else ""
    service = layout.owner is not None and unit
    found.append("sudo systemctl enable --now mcpctl" if service else f"{run} serve{behind}{flag}")
    found.append(f"mcpctl client-config claude-code --url {answers.listening.url}/mcp --write   (where the client is)")
    return found
