"""mcpctl config: is the configuration in order?"""

import typer

from mcpctl.cli import common, output
from mcpctl.cli.common import ConfigOption, JsonOption, settings

app = typer.Typer(help="Check the configuration.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Check the configuration."""


@app.command("check")
def check(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Read everything that the server would, without listening or connecting; every fault is named. Exits 3 on one."""
    from mcpctl.errors import ConfigError, Error
    from mcpctl.identity import tokens, users
    from mcpctl.postgres.login import logins

    found = settings(context, config)
    faults: list[Error] = []

    def tried(work: object) -> None:
        try:
            if callable(work):
                work()
        except Error as problem:
            faults.append(problem)

    tried(lambda: tokens.token_file(found.auth.token_file).current())
    tried(lambda: users.user_file(found.auth.user_file).current())
    tried(lambda: common.ready_to_note(found))
    tried(lambda: logins(found.databases))
    if found.server.tls.cert is not None:
        from mcpctl.server.run import tls_context

        tried(lambda: tls_context(found))
    if not found.databases:
        faults.append(ConfigError("the config names no database", "add one below `databases:`"))
    if faults:
        first, *rest = faults
        more = "".join(f"\n  {problem.message}{f' ({problem.hint})' if problem.hint else ''}" for problem in rest)
        raise ConfigError(first.message + more, first.hint)
    if json:
        output.put_json({"ok": True, "config": found.source and str(found.source), "databases": list(found.databases)})
    else:
        output.put(
            f"ok: {found.source or 'the environment'}, {len(found.databases)} database(s): {', '.join(found.databases)}"
        )
