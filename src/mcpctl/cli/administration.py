"""What the commands that administer PostgreSQL have in common: the administrator's file, read before root is given up,
and what is said with a grant."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mcpctl.cli import common

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings
    from mcpctl.granting import Granting
    from mcpctl.postgres.administrator import Administrator, Lines
    from mcpctl.postgres.logins import Logins


@dataclass
class Files:
    """An installation as these commands see it. `dsns` are the administrator's, by database; `admin` is their file."""

    settings: "Settings"
    dsns: dict[str, str]
    admin: Path | None

    def logins(self) -> "Logins":
        """The logins of the config."""
        from mcpctl.keyring import Keyring
        from mcpctl.postgres.logins import Logins

        return Logins(self.settings.databases, Keyring(self.settings.keyring.file))

    def granting(self) -> "Granting":
        """The grants of this installation."""
        from mcpctl import granting
        from mcpctl.audit import log as audit_log
        from mcpctl.keyring import Keyring

        key = audit_log.read_key(self.settings.audit.key_file)
        return granting.Granting(self.settings, Keyring(self.settings.keyring.file), audit_log.installation(key))

    def administrator(self, database: str, granting: "Granting") -> "Administrator":
        """Who may make roles in a database; NotFoundError where admin.dsn names nobody."""
        from mcpctl.postgres.administrator import Administrator

        return Administrator.of(self.dsns, granting.logins.host(database))

    def hba_lines(self, database: str, granting: "Granting") -> list[str]:
        """The lines of pg_hba.conf that keep the login roles to this machine."""
        from mcpctl.postgres import hba
        from mcpctl.postgres.login import is_here

        host, _ = granting.logins.host(database).place
        if host.startswith("/") or not host:
            address = "local"
        else:
            address = "127.0.0.1/32" if is_here(host) else "ADDRESS-OF-THIS-MACHINE/32"
        return [*self._own_line(database, granting), *hba.lines(address, tls=not is_here(host))]

    def _own_line(self, database: str, granting: "Granting") -> list[str]:
        """The line that keeps the administrator from being kept out with them: from 16 on, who makes a role is a member
        of it, and so of the group, unless it is a superuser."""
        from mcpctl.errors import Error
        from mcpctl.postgres import administrator, hba

        if database not in self.dsns:
            return []
        who = self.administrator(database, granting)
        try:
            with who.connected() as connection:
                member = administrator.is_member(connection, hba.GROUP)
        except Error:  # told where it matters
            return []
        return [f"{who.way}  scram-sha-256"] if member else []

    def remarks(self, database: str, granting: "Granting") -> list[tuple[str, str]]:
        """What is still open in a database, and whether its connections suffice: (what, what to do)."""
        from mcpctl.postgres import arithmetic, harden

        found: list[tuple[str, str]] = []
        if database not in self.dsns:
            return found
        with self.administrator(database, granting).connected() as connection:
            left = arithmetic.room(connection)
            superuser = connection.info.parameter_status("is_superuser") == "on"
            still = harden.held_by_public(connection)
        if still:
            some = ", ".join(still[:3])
            found.append(
                (
                    f"in {database} PUBLIC may execute {len(still)} functions that reach past all grants ({some}, …)",
                    f"mcpctl database harden {database} --apply"
                    if superuser
                    else f"a superuser runs what this prints: mcpctl database harden {database} --print-sql",
                )
            )
        worst = granting.worst(database)
        if worst > left:
            found.append(
                (
                    f"all grants on {database} together could hold {worst} connections, and it has {left} to give",
                    f"lower databases.{database}.pool.max_per_user, or raise max_connections",
                )
            )
        return found


def lines_of(admin: Path) -> "Lines":
    """What the administrator's file says; nothing where it is not there, or its folder is closed to us."""
    import os

    from mcpctl.errors import ConfigError
    from mcpctl.postgres import administrator

    try:
        if not admin.exists():
            return {}
        if hasattr(os, "geteuid") and os.geteuid() not in (0, admin.stat().st_uid):
            raise ConfigError(
                f"{admin} is another user's, and open to this one, who could make roles with it",
                f"as its owner: chmod 0600 {admin}; then give that login another password",
            )
        return administrator.lines(admin)
    except PermissionError:
        return {}


def lines_beside(
    context: typer.Context, config: Path | None, *, forgiving: bool = False
) -> "tuple[Path | None, Lines]":
    """The administrator's file of this installation, and what it says, read before root is given up; nothing, and a
    warning, where it is another user's and closed to us, or, `forgiving`, where there is a fault in it."""
    import os

    from mcpctl import config as configuration
    from mcpctl.cli import output
    from mcpctl.errors import Error
    from mcpctl.postgres import administrator

    source = configuration.find(config or context.find_root().obj.config, os.environ)
    if source is None:
        return None, {}
    admin = source.parent / administrator.FILE
    if closed(admin):
        output.warn(f"{admin} is another user's: this goes on as if it were not there", "run it as root")
        return admin, {}
    try:
        return admin, lines_of(admin)
    except Error as problem:
        if not forgiving:
            raise
        output.warn(f"{problem.message}: this goes on as if it were not there", problem.hint)
        return admin, {}


def closed(admin: Path) -> bool:
    """Whether the administrator's file is another user's, as root's beside a service's files, and not ours to read."""
    import os

    try:
        return not os.access(admin, os.R_OK) and admin.stat().st_uid != os.geteuid()
    except OSError:  # it is not there, or we do not see it
        return False


def files_of(context: typer.Context, config: Path | None, *, needs_log: bool, forgiving: bool = False) -> Files:
    """The installation; root reads the administrator's file before it becomes the owner of the others. `forgiving`: as
    `common.settings` takes it; a fault of the administrator's file is only told then."""
    from mcpctl.postgres import administrator

    admin, lines = lines_beside(context, config, forgiving=forgiving)
    found = common.settings(context, config, needs_log=needs_log, forgiving=forgiving)
    if forgiving:  # a line for a database that is gone, or left out for a fault of the config's
        lines = {name: line for name, line in lines.items() if not name or name in found.databases}
    dsns = administrator.by_database(admin, lines, found) if admin is not None else {}
    return Files(found, dsns, admin)
