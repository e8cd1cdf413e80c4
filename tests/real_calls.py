"""What `mcpctl can` is asked about, and the real call beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import site_of_mcpctl as site
from mcpctl import config
from mcpctl.errors import UnauthorizedError
from mcpctl.facts import Request
from mcpctl.identity import tokens
from mcpctl.rights import Answer, Question, Rights
from mcpctl.server.parts import Core, running
from site_of_mcpctl import Shop, Site

AUTH = """auth:
  read_only_users: [reads-only]
  roles:
    analyst: {permissions: ["tools:query_database", "databases:shop:read"]}
    editor: {permissions: ["tools:*", "databases:shop:*"]}
    blind: {permissions: ["databases:*:read", "tools:whoami"]}
"""


def site_of_rights(login_shop: Shop, folder: Path) -> Site:
    """A site of per-user roles in the shop, where `all` is the same database with one login for all."""
    with login_shop.admin() as admin:
        if not admin.execute("SELECT FROM pg_foreign_server WHERE srvname = 'nowhere'").fetchall():
            admin.execute("CREATE FOREIGN DATA WRAPPER none; CREATE SERVER nowhere FOREIGN DATA WRAPPER none")
        admin.execute("REVOKE CONNECT ON DATABASE shop FROM PUBLIC; GRANT CONNECT ON DATABASE shop TO shop_reader")
    shared = f"  all:\n    host: {login_shop.cluster.host}\n    port: {login_shop.cluster.port}\n    dbname: shop\n"
    shared += f"    user: {site.READER}\n    password_file: shop.password\n"
    return Site(folder, login_shop, per_user=True, database="    default: true\n" + shared, extra=AUTH)


VALUES = ("(id, body, more) VALUES (4, 'x', 3)", "(id, body) VALUES (4, 'x')", "(id) VALUES (4)", "(body) VALUES ('x')")


@dataclass(frozen=True)
class Done:
    """What a real call came to. `rows`: what it read or changed."""

    allowed: bool
    rows: int | None
    by_policy: bool
    text: str


def statement(question: Question, column: str, whole: bool) -> str:
    """`column`: the columns that are selected, the one that is updated, what is inserted."""
    where = "" if whole else " WHERE false"
    return {
        "select": f"SELECT {column or '*'} FROM {question.target}",
        "insert": f"INSERT INTO {question.target} {column or 'DEFAULT VALUES'}",
        "update": f"UPDATE {question.target} SET {column} = DEFAULT{where}",
        "delete": f"DELETE FROM {question.target}{where}",
    }[question.action]


async def do(core: Core, text: str, question: Question, whole: bool) -> Done:
    """Do it, as the server does; a select of all columns, or of one that lets itself be selected; an update of any
    column that lets itself be updated, an insert of defaults or values.
    `whole`: every row, since there is said to be none to be changed."""
    done = Done(False, None, False, "")
    ways = {"select": ("", "id", "body", "more"), "update": ("id", "body", "more"), "insert": ("", *VALUES)}
    for column in ways.get(question.action, ("",)):
        done = await did(core, text, question, statement(question, column, whole))
        if question.action == "select" and "permission denied" not in done.text:
            break
        if done.allowed or (done.by_policy and question.action == "insert"):
            break
    return done


async def did(core: Core, text: str, question: Question, query: str) -> Done:
    tool, argument = ("query_database", "query") if question.action == "select" else ("execute_statement", "statement")
    arguments = {argument: query, "database": question.database}
    try:
        principal = await core.authenticator.authenticate(text, "127.0.0.1")
        answer = await core.calls.call(principal, tool, arguments, Request("0", "127.0.0.1", "http"))
    except UnauthorizedError as problem:
        return Done(False, None, False, problem.message)
    if answer.structured is None:
        return Done(False, None, "new row violates row-level security policy" in answer.text, answer.text)
    found = answer.structured
    return Done(True, found["row_count"] if question.action == "select" else found["rows_affected"], False, answer.text)


async def case(at: Site, name: str, question: Question) -> tuple[Answer, Done]:
    """What is said of one question, and what a call with a new token comes to."""
    settings = config.load(at.config, at.limits)
    _, text = at.token(name)
    async with running(settings, files=True) as core:
        rights = Rights(settings, tokens.utcnow())
        said = rights.ask(rights.principal(name, None), question)
        return said, await do(core, text, question, whole=said.hides_all)
