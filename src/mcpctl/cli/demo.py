"""mcpctl demo: everything at once, in a temporary folder, and gone again with Ctrl-C."""

import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import client_config, output

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings
    from mcpctl.postgres.embedded import Cluster

_CONFIG = """\
# Made by `mcpctl demo`; it goes away with the demo.
server: {{port: {port}}}
auth: {{sessions: {{enabled: true}}}}
databases:
  shop:
    host: {host}
    port: {pg_port}
    dbname: shop
    roles: per_user
    service_dsn: {service}
    service_password_file: shop.password
    description: "a small shop: customers, orders, order_items, products, monthly_revenue"
limits: {{rate: 1000, burst: 1000, concurrent: 100}}
"""
_QUESTION = "select name, price from products order by price desc limit 3"


def demo(
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8080,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line when ready: url, token, dsn, config, pid.")
    ] = False,
) -> None:
    """Try it: an embedded PostgreSQL with a small shop, a user, a token and a server on HTTP.

    Stays in front; Ctrl-C leaves nothing behind.
    """
    from mcpctl import config
    from mcpctl.config_keys import Log
    from mcpctl.server import run
    from mcpctl.server.listening import Listening
    from mcpctl.server.logs import set_up

    set_up(Log(level="warning"))
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]  # they are meant for another PostgreSQL
    with _stopped_by_signals(), ExitStack() as stack:
        cluster, folder, token = _set_up(stack, port)
        settings = config.load(folder / "config.yaml", {})

        def ready(url: str) -> None:
            if as_json:
                facts = {
                    "url": url,
                    "token": token,
                    "dsn": _shop(cluster),
                    "config": str(settings.source),
                    "pid": os.getpid(),
                }
                output.put_json(facts)
            else:
                _explain(url, token, settings)

        output.say("starting the server …")
        run.serve(Listening(settings), ready)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """TERM and HUP end the demo as Ctrl-C does: through every clean-up on the way, which no second one disturbs."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def stop(number: int, frame: Any) -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    for one in numbers:
        signal.signal(one, stop)
    yield


def _set_up(stack: ExitStack, port: int) -> "tuple[Cluster, Path, str]":
    """PostgreSQL with the shop, and mcpctl's own files with a user and a one-day token."""
    import datetime
    import json

    from psycopg.conninfo import make_conninfo

    from mcpctl.cli import init
    from mcpctl.identity import tokens, users
    from mcpctl.postgres.administrator import FILE
    from mcpctl.postgres.embedded import Cluster

    cluster = stack.enter_context(Cluster.start(progress=output.say))
    output.say("making a small shop in it …")
    password = _load_shop(cluster)
    folder = Path(tempfile.mkdtemp(prefix="mcpctl-demo-"))
    stack.callback(shutil.rmtree, folder)
    service = make_conninfo("", host=cluster.host, port=cluster.port, dbname="shop", user="shop_reader")
    where = {"host": json.dumps(cluster.host), "service": json.dumps(service)}  # as YAML has texts, too
    init.make(folder, _CONFIG.format(port=port, pg_port=cluster.port, **where))
    secret = folder / "shop.password"
    secret.touch(0o600)
    secret.write_text(password + "\n")
    administrator = folder / FILE
    administrator.touch(0o600)
    administrator.write_text(_shop(cluster) + "\n")
    now = tokens.utcnow()
    users.add(users.user_file(folder / "users.yaml"), "demo", "made by mcpctl demo", now)
    _grant(folder)
    wanted = tokens.Wanted(user="demo", expires_at=now + datetime.timedelta(days=1), note="made by mcpctl demo")
    _, token = tokens.add(tokens.token_file(folder / "tokens.yaml"), wanted, now)
    header = folder / "authorization"  # for curl: an argument would be in the process list
    header.touch(0o600)
    header.write_text(f"Authorization: Bearer {token}\n")
    return cluster, folder, token


def _grant(folder: Path) -> None:
    """The user's own login role, as `mcpctl user grant demo --database shop --access read --apply` makes it."""
    from mcpctl import config
    from mcpctl.audit import log as audit_log
    from mcpctl.granting import Granting
    from mcpctl.keyring import Keyring
    from mcpctl.postgres import administrator

    settings = config.load(folder / "config.yaml", {})
    key = audit_log.read_key(settings.audit.key_file)
    granting = Granting(settings, Keyring(settings.keyring.file), audit_log.installation(key))
    file = folder / administrator.FILE
    dsns = administrator.by_database(file, administrator.lines(file), settings)
    who = administrator.Administrator.of(dsns, granting.logins.host("shop"))
    granting.applied("demo", "shop", lambda old: old.more("read", ("public",)), who)


def _keep_out(cluster: "Cluster") -> None:
    """The lines of pg_hba.conf that a grant asks for: the users' logins come over the socket alone."""
    from mcpctl.postgres import hba

    file = cluster.folder / "data" / "pg_hba.conf"
    before = file.read_text(encoding="utf-8")
    with file.open("w", encoding="utf-8") as out:  # written over, so that it stays the server's own
        out.write("\n".join([*hba.lines("local"), before]))


def _shop(cluster: "Cluster") -> str:
    return cluster.dsn_for("postgres", cluster.superuser_password, "shop")


def _load_shop(cluster: "Cluster") -> str:
    """The sample data, and a login role that can only read; returns that role's password."""
    import secrets
    from importlib.resources import files

    import psycopg
    from psycopg import sql

    from mcpctl.postgres import harden

    scripts = files("mcpctl.cli")
    with psycopg.connect(cluster.dsn, autocommit=True) as connection:
        connection.execute("CREATE DATABASE shop")
    password = secrets.token_urlsafe(32)
    _keep_out(cluster)
    with psycopg.connect(_shop(cluster), autocommit=True) as connection:
        connection.execute("SELECT pg_reload_conf()")
        for name in ("shop.sql", "shop_reader.sql"):
            connection.execute((scripts / name).read_bytes())
        connection.execute(harden.script().encode())
        verifier = connection.pgconn.encrypt_password(password.encode(), b"shop_reader", b"scram-sha-256")
        connection.execute(sql.SQL("ALTER ROLE shop_reader PASSWORD {}").format(sql.Literal(verifier.decode("ascii"))))
    return password


def _shown(name: str, file: str, text: str) -> str:
    """A snippet beside its client and file; one of several lines below them."""
    if "\n" not in text:
        return f"  {name:<14} {file + ':':<26} {text}"
    return f"  {name:<14} {file}:\n" + "\n".join(f"{' ' * 17}{line}" for line in text.splitlines())


def _explain(url: str, token: str, settings: "Settings") -> None:
    """How to ask the first question, with curl and with each client."""
    python = f"{shlex.quote(sys.executable)} -m mcpctl"
    config = str(settings.source)
    header = shlex.quote(f"@{Path(config).parent / 'authorization'}")
    clients = "\n".join(
        _shown(name, file, make("shop", url)) for name, (file, make) in client_config.CLIENTS.items() if file
    )
    desktop = client_config.desktop("shop", config).replace(client_config.PLACEHOLDER, token)
    clients += f"\n  claude-desktop claude_desktop_config.json: {desktop}"
    body = (
        '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"query_database","arguments":'
        f'{{"query":"{_QUESTION}"}}}}}}'
    )
    output.put(f"""
A shop is open at {url}

  export MCP_TOKEN={token}

Ask it a question. The token is in the file, and so not in the process list:

  curl -s {url} -H {header} -H 'Content-Type: application/json' -H 'Accept: application/json' -d '{body}'

Connect a client:

{clients}

Look after it, in another terminal:

  {python} --config {shlex.quote(config)} token list
  {python} --config {shlex.quote(config)} can demo select public.orders
  {python} --config {shlex.quote(config)} audit tail -f

Everything here is one person's: admin.dsn beside that config holds the login that makes roles. On a server it is root's.

The token ends in a day. Ctrl-C ends everything and leaves nothing behind.""")
