"""mcpctl can and who-can: who may do what, with the chain of reasons."""

from typing import TYPE_CHECKING, Annotated

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption, settings

if TYPE_CHECKING:
    from mcpctl.rights import Question, Rights

DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database", metavar="D", help="Its name in the config, or one of the user's own; else the default one."
    ),
]


def can(
    context: typer.Context,
    user: Annotated[str, typer.Argument(metavar="U", help="The user's name.")],
    action: Annotated[
        str | None, typer.Argument(metavar="[ACTION]", help="select, insert, update, delete; or call, for a tool.")
    ] = None,
    target: Annotated[str | None, typer.Argument(metavar="[TARGET]", help="schema.table, or the tool's name.")] = None,
    database: DatabaseOption = None,
    token: Annotated[
        str | None, typer.Option("--token", metavar="ID", help="With this token; else with any of the user's.")
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Say whether a user may do something, and why: token, user, role, permission, grant, login role, PostgreSQL.

    It asks PostgreSQL as the user's own login role, and runs nothing. Exits 0 for yes and 1 for no. With the user
    alone: a table of all that they may do.

    Example: mcpctl can alice select sales.orders
    """
    from mcpctl.errors import UsageError
    from mcpctl.identity import tokens
    from mcpctl.rights import Question, Rights

    if (action is None) != (target is None):
        raise UsageError("an action needs a target", "such as: mcpctl can alice select sales.orders")
    found = settings(context, config, needs_log=False)
    rights = Rights(found, tokens.utcnow())
    rights.check_user(user)
    principal = rights.principal(user, token)
    if action is None or target is None:
        rows = rights.everything(principal)
        if json:
            output.put_json(
                {"user": user, "rights": [dict(zip(("database", "what", "right"), row, strict=True)) for row in rows]}
            )
        else:
            output.put_table(["DATABASE", "WHAT", "RIGHT"], rows)
        _say_who_was_not_asked(rights)
        return
    answer = rights.ask(principal, Question(action.lower(), target, database))
    if json:
        links = [{"link": link.name, "allowed": link.allowed, "reason": link.reason} for link in answer.links]
        output.put_json({"user": user, "action": action, "target": target, "allowed": answer.allowed, "chain": links})
    else:
        output.put("yes" if answer.allowed else "no")
        output.put_table(
            ["LINK", "LETS THROUGH", "WHY"],
            [(link.name, "yes" if link.allowed else "no", link.reason) for link in answer.links],
        )
    if not answer.allowed:
        raise typer.Exit(1)


def who_can(
    context: typer.Context,
    action: Annotated[
        str, typer.Argument(metavar="ACTION", help="select, insert, update, delete; or call, for a tool.")
    ],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="schema.table, or the tool's name.")],
    database: DatabaseOption = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """List every user and service token that may do something. Exits 1 where nobody may, or a database is not reached.

    Example: mcpctl who-can select sales.orders
    """
    from mcpctl.identity import tokens
    from mcpctl.rights import Question, Rights

    found = settings(context, config, needs_log=False)
    rights = Rights(found, tokens.utcnow())
    rows = _everybody(rights, Question(action.lower(), target, database))
    if json:
        output.put_json({"action": action, "target": target, "who": [{"who": who, "as": role} for who, role in rows]})
    else:
        output.put_table(["WHO", "AS"], rows)
    _say_who_was_not_asked(rights)
    if not rows:
        output.say("nobody")
        raise typer.Exit(1)


def _say_who_was_not_asked(rights: "Rights") -> None:
    """An error for each database without which the answer is not whole."""
    for problem in rights.unasked.values():
        output.error(problem.message, problem.hint)
    if rights.unasked:
        raise typer.Exit(1)


def _everybody(rights: "Rights", question: "Question") -> list[tuple[str, str]]:
    from mcpctl.errors import UnavailableError

    who = [(name, rights.principal(name, None)) for name in rights.users()]
    who += [(f"service token {name}", rights.principal(None, name)) for name in rights.services()]
    rows = []
    for name, principal in who:
        try:
            answer = rights.ask(principal, question)
        except UnavailableError:  # told of at the end
            continue
        if answer.allowed:
            role = next((link.reason for link in answer.links if link.name == "login role"), "")
            does = "sees" if question.action == "select" else "changes"
            columns = f", on the columns {', '.join(answer.columns)} only" if answer.columns else ""
            rows.append((name, role + columns + (f", and {does} no row" if answer.hides_all else "")))
    return rows
