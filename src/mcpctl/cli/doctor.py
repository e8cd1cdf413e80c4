"""mcpctl doctor: is the installation healthy?"""

import typer

from mcpctl.cli import output
from mcpctl.cli.administration import files_of
from mcpctl.cli.common import ConfigOption, JsonOption


def doctor(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Look at everything: files, keys, secrets in the open, databases, grants, and what is still open in PostgreSQL.

    Nothing is changed. Exits 1 where something is wrong; a warning is something to know.
    """
    import os

    from mcpctl import diagnosis
    from mcpctl.identity import tokens

    files = files_of(context, config, needs_log=False)
    patient = diagnosis.Patient(files.settings, files.dsns, files.admin, tokens.utcnow(), os.environ)
    found = diagnosis.examine(patient)
    healthy = all(one.status != diagnosis.FAIL for one in found)
    if json:
        findings = [{"check": one.check, "status": one.status, "what": one.what, "hint": one.hint} for one in found]
        output.put_json({"ok": healthy, "findings": findings})
    else:
        rows = [(one.status, one.check, one.what, one.hint) for one in found]
        shown = [[" ".join((cell or "").split("\n")) for cell in row] for row in rows]  # some have lines
        output.put_table(["STATUS", "CHECK", "WHAT", "WHAT TO DO"], shown)
    if not healthy:
        raise typer.Exit(1)
