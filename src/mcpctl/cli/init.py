"""mcpctl init: the files, with the right modes."""

from pathlib import Path
from typing import Annotated

import typer

from mcpctl.cli import output
from mcpctl.cli.common import JsonOption, by_whom, config_flag, import_before, note

_CONFIG = """\
# mcpctl. Every key, its default and its meaning: docs/reference/config.md. After a change: mcpctl config check
databases:
  # shop:
  #   host: /var/run/postgresql        # or db.example.org, which is then asked for a certificate (verify-full)
  #   dbname: shop
  #   user: shop_reader                # a role that can only read; README.md has the SQL that makes one
  #   password_file: shop.password     # 0600, beside this file
"""


def init(
    context: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="Where. Default: /etc/mcpctl for root, else the user's config folder."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Make the config, the audit key, and the empty token, user and tenant files, and say what comes next."""
    import os

    from mcpctl import config, private_file

    where = (folder or (Path("/etc/mcpctl") if _is_root() else config.default_folder())).absolute()
    import_before(where)
    private_file.become_owner(where)
    private_file.check_folder(where)
    before = os.umask(0o077)
    try:
        files = make(where, _CONFIG)
    finally:
        os.umask(before)
    note(config.load(where / "config.yaml", {}), "config.created", reason=by_whom(context, str(where)))
    if json:
        output.put_json({"folder": str(where), "files": files})
        return
    for name in files:
        output.put(str(where / name))
    usual = config_flag(where / "config.yaml")
    output.say("next:")
    output.say(f"  1. name your database in {where / 'config.yaml'}")
    output.say(f"  2. mcpctl config check{usual}")
    output.say(f"  3. mcpctl user add alice{usual}")
    output.say(f"  4. mcpctl token add --user alice --expiry 90d{usual}")
    output.say(f"  5. mcpctl serve{usual}")


def make(folder: Path, text: str) -> list[str]:
    """The files of a new installation, all or none; refused (exit 5) where one of them is there already."""
    import os

    from mcpctl import keyring, private_file, reserve, state
    from mcpctl.audit import log as audit_log
    from mcpctl.errors import ConfigError, ConflictError
    from mcpctl.identity import tenants, tokens, users

    contents = {
        "config.yaml": text.encode(),
        "tokens.yaml": tokens.token_file(folder / "tokens.yaml").render({}),
        "users.yaml": users.user_file(folder / "users.yaml").render({}),
        "tenants.yaml": tenants.tenant_file(folder / "tenants.yaml").render({}),
        "audit.key": audit_log.new_key(),
        "secret.key": keyring.new_key().encode() + b"\n",
    }
    try:
        there_already = folder.exists()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        taken = [name for name in contents if os.path.lexists(folder / name)]
    except OSError as problem:
        raise ConfigError(
            f"cannot make the folder {folder}: {problem.strerror}", "choose another with `mcpctl init DIR`"
        ) from None
    if taken:
        raise ConflictError(
            f"{folder / taken[0]} exists already", "nothing was made; remove it or choose another folder"
        )
    made: list[Path] = []
    try:
        for name, data in contents.items():
            private_file.create(folder / name, data)
            made.append(folder / name)
        reserve.keep(folder)
        if not os.path.lexists(folder / "state.db"):
            state.make(folder / "state.db")
    except BaseException:
        reserve.give_up(folder)
        for path in made:
            path.unlink(missing_ok=True)
        if not there_already:
            folder.rmdir()
        raise
    return list(contents)


def _is_root() -> bool:
    import os

    return hasattr(os, "geteuid") and os.geteuid() == 0
