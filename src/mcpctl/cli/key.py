"""mcpctl key: the keys that seal database passwords."""

import typer

from mcpctl.cli import output
from mcpctl.cli.common import ConfigOption, JsonOption, by_whom, note, ready_to_note, settings

app = typer.Typer(help="Rotate the key that seals database passwords.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Rotate the key that seals database passwords."""


@app.command("rotate")
def rotate(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Make a new key, seal everything again with it, and drop the old one when nothing needs it any more.

    It may be interrupted, and run again: then it goes on with the key that it had made. No call is lost meanwhile.
    A backup of `mcpctl backup` from before has the old key inside. audit.key is another key, and stays.
    """
    from mcpctl import control, rotation

    found = settings(context, config)
    ready_to_note(found)
    folder = control.folder_of(found.server.runtime_dir, found.auth.token_file)

    def without(key: str) -> list[int]:
        answers = control.ask_all(folder, {"do": "keys"})
        return [answer.get("pid", 0) for answer in answers if key not in answer.get("keys", ())]

    key, count, made_before = rotation.rotate(found, without)
    note(found, "config.key_rotated", reason=by_whom(context, f"key {key}, {count} sealed again"))
    if made_before:
        output.say("this key is of a rotation that had begun earlier; if it may have leaked since, run it again")
    if json:
        output.put_json({"key": key, "sealed_again": count})
    else:
        output.put(f"key {key}; {count} {'password' if count == 1 else 'passwords'} sealed again")
