"""mcpctl database passwd: another password for a login, in PostgreSQL and where it is kept, and the end of whoever is
in with the old one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcpctl.cli import output
from mcpctl.cli.administration import Files, files_of
from mcpctl.cli.common import ConfigOption, JsonOption, by_whom, config_flag, note, told
from mcpctl.cli.database import Name, app, given_password

if TYPE_CHECKING:
    from mcpctl.postgres.administrator import Administrator
    from mcpctl.postgres.passwords import Backend
    from mcpctl.renewing import Done, Renewal, Renewing


@app.command("passwd")
def passwd(
    context: typer.Context,
    name: Name,
    user: Annotated[
        str | None, typer.Option("--user", metavar="U", help="That user's login roles, where roles are per user.")
    ] = None,
    all_users: Annotated[bool, typer.Option("--all-users", help="The login roles of all users there.")] = False,
    service: Annotated[bool, typer.Option("--service", help="The login of service_dsn.")] = False,
    password_file: Annotated[
        str | None,
        typer.Option(
            "--password-file", metavar="FILE", help="Where the new one is; - for stdin. Default: one is made."
        ),
    ] = None,
    ask_password: Annotated[bool, typer.Option("--ask-password", help="Ask for the new one.")] = False,
    print_sql: Annotated[
        bool, typer.Option("--print-sql", help="Print the SQL for a DBA to run. The default.")
    ] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Do it, as the administrator of admin.dsn.")] = False,
    done: Annotated[bool, typer.Option("--done", help="A DBA has run the SQL that was printed.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Give a database's login another password, and end every connection that was made with the old one.

    With --apply PostgreSQL gets it as a SCRAM verifier, the file or users.yaml gets it sealed, the server closes what
    it has open with the old one, and whoever else is in with it is thrown out. Calls that run then fail, and may be
    made again. A user's role gets one in all databases of that cluster.

    Example: mcpctl database passwd sales --apply
    """
    from mcpctl.config import check_database
    from mcpctl.errors import UsageError
    from mcpctl.renewing import check_given

    if print_sql + apply + done > 1:
        raise UsageError("--print-sql, --apply and --done exclude each other", "choose one")
    if (user is not None) + all_users + service > 1:
        raise UsageError("--user, --all-users and --service exclude each other", "choose one")
    if password_file is not None and ask_password:
        raise UsageError("--password-file and --ask-password exclude each other", "choose one")
    if (password_file is not None or ask_password) and (user is not None or all_users or done):
        raise UsageError("a given password is for the config's own login", "leave it out, and one is made for each")
    given = given_password(password_file, ask=ask_password, name=name)
    if given is not None:
        check_given(given)
    files = files_of(context, config, needs_log=False)
    check_database(files.settings, name)
    work = _Work(context, files, _renewing(files), json)
    wanted = work.wanted(name, user, all_users=all_users, service=service)
    if not apply and not done:
        more = "".join((f" --user {user}" if user else "", " --all-users" * all_users, " --service" * service))
        work.print(wanted, given, f"mcpctl database passwd {name}{more} --done{config_flag(files.settings.source)}")
        return
    work.carry_out(wanted, given, by_dba=done)


def _renewing(files: Files) -> "Renewing":
    from mcpctl.audit import log as audit_log
    from mcpctl.keyring import Keyring
    from mcpctl.renewing import Renewing

    key = audit_log.read_key(files.settings.audit.key_file)
    return Renewing(files.settings, Keyring(files.settings.keyring.file), audit_log.installation(key))


@dataclass
class _Work:
    context: typer.Context
    files: Files
    renewing: "Renewing"
    json: bool

    def wanted(self, name: str, user: str | None, *, all_users: bool, service: bool) -> list["Renewal"]:
        """The roles that are meant."""
        if all_users:
            return self.renewing.of_everybody(name)
        if user is not None:
            return self.renewing.of_user(user, name)
        return [self.renewing.of_config(name, service=service)]

    def print(self, wanted: list["Renewal"], given: str | None, then: str) -> None:
        """The SQL, and what comes after it. Nothing is in force yet."""
        sql = "".join(self.renewing.printed(one, given) for one in wanted)
        if self.json:
            output.put_json({"applied": False, "roles": [one.role for one in wanted], "sql": sql})
            return
        output.put(sql.rstrip("\n"))
        output.say("nothing is changed yet; once that SQL has run, no login works until this has run, too, so at once:")
        output.say(f"  {then}")

    def carry_out(self, wanted: list["Renewal"], given: str | None, *, by_dba: bool) -> None:
        """Each role, one after the other; what fails for one keeps none of the others from it."""
        from mcpctl.errors import Failures

        failed, rows = Failures(), []
        for one in wanted:
            with failed:
                who = self._administrator(one, needed=not by_dba)
                ours = None if by_dba else who
                done = self.renewing.believe(one) if ours is None else self.renewing.apply(one, ours, given)
                rows.append(self._finished(one, who, done, failed))
        if self.json:
            output.put_json({"applied": len(rows) == len(wanted), "roles": rows})
        failed.check()

    def _administrator(self, one: "Renewal", *, needed: bool) -> "Administrator | None":
        from mcpctl.postgres.administrator import Administrator

        if not needed and one.login.name not in self.files.dsns:
            return None
        return Administrator.of(self.files.dsns, self.renewing.logins.host(one.login.name))

    def _finished(self, one: "Renewal", who: "Administrator | None", done: "Done", failed: Any) -> dict[str, Any]:
        """What comes after the change: pools closed, connections ended; written down, and told."""
        from mcpctl import control

        found = self.files.settings
        folder = control.folder_of(found.server.runtime_dir, found.auth.token_file)
        answers = control.ask_all(folder, {"do": "renewed", "logins": one.pools})
        words, cut = told(answers) if answers else ("no server runs", None)
        others: list[Backend] = []
        with failed:
            others = (
                self.renewing.end_older(one, who, done) if who is not None else self.renewing.end_by_itself(one, done)
            )
        many = len(done.before)
        ended = f"ended: {many} {'connection' if many == 1 else 'connections'} of {one.role}"
        strangers = "".join(f"; not closed by the server: {other.words()}" for other in others[:20])
        reason = f"new password for {one.role}; {ended}{strangers}"
        databases = ", ".join(one.databases)
        note(found, "config.database_password", user=one.user, database=databases, reason=by_whom(self.context, reason))
        logs_in = self.renewing.logs_in(one)
        where = ", ".join(map(str, one.files)) or str(found.auth.user_file)
        if not logs_in:
            output.warn(f"{one.role} cannot log in with its new password", f"mcpctl database test {one.login.name}")
        if not self.json:
            output.put(f"{one.role} has a new password in {databases}, sealed in {where}")
            for path in done.plain:
                output.say(f"{path} held it as plain text before, and holds it sealed now")
            output.put(f"{ended}; {words}")
            for other in others:
                output.put(f"ended, and not closed by the server: {other.words()}")
        return {
            "role": one.role, "user": one.user, "databases": list(one.databases), "sealed_in": where,
            "were_plain": [str(path) for path in done.plain], "ended": many, "logs_in": logs_in, "cut": cut,
            "others": [{"pid": o.pid, "address": o.address, "application": o.application, "since": o.began}
                       for o in others],
        }  # fmt: skip
