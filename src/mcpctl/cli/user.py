"""mcpctl user: who there is."""

from typing import Annotated

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption, by_whom, config_flag, note, ready_to_note, settings

app = typer.Typer(help="Make and list users.", no_args_is_help=True)


@app.command("add")
def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="U", help="a-z first, then a-z 0-9 -, at most 31 characters.")],
    note_: Annotated[str | None, typer.Option("--note", metavar="T", help="Who that is.")] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Make a user, whom tokens can then be given to."""
    from mcpctl.identity import tokens, users

    found = settings(context, config)
    ready_to_note(found)
    made = users.add(users.user_file(found.auth.user_file), name, note_, tokens.utcnow())
    note(found, "user.added", user=name, reason=by_whom(context, note_))
    if json:
        output.put_json({"user": name, **users.as_values(made)})
    else:
        output.put(f"{name} added")
        output.say(f"next: mcpctl token add --user {name} --expiry 90d{config_flag(found.source)}")


@app.command("list")
def list_(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """List all users, with how many living tokens each has."""
    from mcpctl.identity import tokens, users

    found = settings(context, config, needs_log=False)
    now = tokens.utcnow()
    living: dict[str | None, int] = {}
    for token in tokens.token_file(found.auth.token_file).current().values():
        if token.status(now) in ("active", "expiring"):
            living[token.user] = living.get(token.user, 0) + 1
    entries = users.user_file(found.auth.user_file).current()
    values = [
        {"user": user.name, **users.as_values(user), "tokens": living.get(user.name, 0)} for user in entries.values()
    ]
    if json:
        output.put_json({"users": values})
        return
    names = ("user", "created_at", "tokens", "note")
    output.put_table([name.upper() for name in names], [[value[name] for name in names] for value in values])
