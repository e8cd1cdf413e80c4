"""mcpctl lockdown: no call is answered, all that runs is cut, nothing is removed; one command lifts it."""

from typing import TYPE_CHECKING, Annotated

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption, ReasonOption, by_whom, note, settings, told

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings

_NOBODY = "no server answers here; one without tokens locks by itself within a second"


def lockdown(
    context: typer.Context,
    lift: Annotated[bool, typer.Option("--lift", help="Answer calls again.")] = False,
    reason: ReasonOption = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Answer no more calls, on any worker and after a restart, until it is lifted. Running queries are cut.

    Never asks. Nothing is removed: tokens, users and logs stay as they are. Twice is fine.
    """
    from mcpctl import control
    from mcpctl.errors import Error, masked
    from mcpctl.identity.lockdown import Lockdown
    from mcpctl.identity.tokens import rfc3339, utcnow

    found = settings(context, config, needs_log=False, forgiving=True)
    lock = Lockdown(found.auth.token_file)
    folder = control.folder_of(found.server.runtime_dir, found.auth.token_file)
    failed: Error | None = None
    if lift:
        changed = lock.lift()
    else:
        by, said = context.find_root().obj.who, masked(reason) if reason else None
        try:
            changed = lock.begin(rfc3339(utcnow()), by, said)
        except Error as problem:
            failed, changed = problem, True
    now = {"now": failed is not None} if lift or failed else {}
    answers = control.ask_all(folder, {"do": "lock", **now})
    changed = changed or any(answer.get("lifted") for answer in answers)
    if changed and (answers or not failed):
        note(found, "server.unlocked" if lift else "server.locked", reason=by_whom(context, reason))
    words, cut = told(answers) if answers else (_NOBODY, None)
    if failed is not None:
        done = f"but the running servers are locked until they restart ({words})" if answers else words
        raise Error(f"{failed.message}; {done}", f"{failed.hint or 'look at the disk'}, and run this again")
    if json:
        output.put_json({"locked": not lift, "changed": changed, "cut": cut})
    elif lift:
        output.put("calls are answered again" if changed else "it was not locked")
    else:
        output.put("locked: no call is answered" if changed else f"it was locked already: {lock.said()}")
        output.put(words)
        output.say("to lift it: mcpctl lockdown --lift")


def tell(found: "Settings") -> None:
    """Say on stderr that the server is locked, where it is."""
    from mcpctl.identity.lockdown import Lockdown

    if (said := Lockdown(found.auth.token_file).said()) is not None:
        output.warn(said, "mcpctl lockdown --lift")
