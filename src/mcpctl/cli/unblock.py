"""mcpctl token unblock."""

from typing import Annotated

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption, ReasonOption, by_whom, note_all, proof, ready_to_note, settings
from mcpctl.cli.token import app


@app.command("unblock")
def unblock(
    context: typer.Context,
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="The token's id.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every token that is blocked.")] = False,
    reason: ReasonOption = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Let a token in again that a canary has blocked. The canary stays."""
    from contextlib import closing

    from mcpctl.errors import UsageError
    from mcpctl.identity.blocked import Blocked, store
    from mcpctl.state import State

    if (id is not None) == all_:
        raise UsageError("name the token to let in again, or say --all", "`mcpctl token list` shows which are blocked")
    found = settings(context, config)
    ready_to_note(found)
    with closing(State(found.server.state_file) if all_ else store(found)) as state:
        blocked, lost = Blocked(state), not state.path.exists()
        if id is not None:
            blocked.lift(id)
        lifted = [id] if id is not None else blocked.lift_all()
    why = by_whom(context, reason)
    events = [("token.unblocked", {"token": one, "reason": why}) for one in lifted]
    if lost:
        output.warn(
            f"there was no {found.server.state_file}: an empty one was made, and whoever was blocked is let in",
            "the audit log's token.blocked lines say who was; `mcpctl token revoke` ends a token",
        )
        events = [("token.unblocked", {"reason": f"every token, since state.db was gone and was made anew; {why}"})]
    note_all(found, events)
    proof(found, [])  # so that the servers have looked
    if json:
        output.put_json({"unblocked": lifted})
        return
    for one in lifted:
        output.put(f"{one} is let in again")
