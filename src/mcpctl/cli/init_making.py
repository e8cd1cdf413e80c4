"""A new installation from the answers: its files, the first user and token, the SQL. All of it, or nothing."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mcpctl.cli import output
from mcpctl.cli.common import config_flag, note

if TYPE_CHECKING:
    from mcpctl.cli.init_answers import Answers, Postgres
    from mcpctl.cli.init_layout import Layout
    from mcpctl.config_keys import Settings
    from mcpctl.postgres.login import Login

SCRIPT = "roles.sql"
"""The SQL for a superuser, beside the config."""


@dataclass
class Making:
    """What `mcpctl init` makes. `who` is who runs it, for the audit log; `logged_in`: the login role is there."""

    answers: "Answers"
    layout: "Layout"
    who: str
    print_sql: bool = False
    json: bool = False
    logged_in: bool = False

    def as_owner(self, work: Callable[[], None]) -> None:
        """Do it as the one whom the files belong to."""
        from mcpctl import private_file

        if self.layout.owner is None:
            work()
        else:
            private_file.as_owner(self.layout.config, work)

    def try_database(self) -> None:
        """Log in, or, where the login role is still to be made, see that PostgreSQL is there. Raises an Error."""
        from mcpctl.postgres import trial

        found = self.answers.postgres
        if found is None:
            return
        login = _login(found, self.layout.config)
        if found.password is None or found.made_up:
            trial.answers(login)
            output.say(f"PostgreSQL answers at {found.host}")
            return
        about = trial.log_in(login)
        about.check(login)
        output.say(f"{about.user} is let in: {about.words()}")

    def run(self) -> None:
        """Make it, and tell what was made. Where a step fails, nothing is left."""
        before = os.umask(0o077)
        try:
            with self._undone() as files:
                found = self._files(files)
                script = self._people(found)
                if script is not None:
                    files.append(_create(self.layout.config / SCRIPT, script))
                self._hand_over(found, files, script)
        finally:
            os.umask(before)

    @contextmanager
    def _undone(self) -> Iterator[list[Path]]:
        """A list of what is made, for whoever makes it; all of it is taken away again after a failure, and nothing that
        was there before: an older log is a proof, whoever kept it there."""
        from mcpctl import reserve

        files: list[Path] = []
        there_already, before = os.path.lexists(self.layout.config), self._by_themselves()
        try:
            yield files
        except BaseException:
            for path in [*files, *(self._by_themselves() - before if files else ())]:
                path.unlink(missing_ok=True)
            if files:
                reserve.give_up(self.layout.config)
                with suppress(OSError):
                    if not there_already:
                        self.layout.config.rmdir()
            raise

    def _by_themselves(self) -> set[Path]:
        """Files that come to be beside those that are made by name."""
        found: set[Path] = set()
        for folder, begins in ((self.layout.log, "audit.jsonl"), (self.layout.state, "state.db")):
            with suppress(OSError):  # who makes the folder says why it cannot be
                found.update(folder / name for name in os.listdir(folder) if name.startswith(begins))
        return found

    def _files(self, files: list[Path]) -> "Settings":
        """The files, and the config as it is read from them; everything that the server would refuse is refused."""
        from mcpctl import config
        from mcpctl.cli import init, init_config
        from mcpctl.keyring import Keyring
        from mcpctl.server import tls

        folder, source = self.layout.config, self.layout.config / "config.yaml"
        text = init_config.text(self.answers, self.layout)
        files += [folder / name for name in init.make(folder, text, self.layout.state)]
        postgres = self.answers.postgres
        if postgres is not None and postgres.password is not None:
            sealed = Keyring(folder / "secret.key").seal(postgres.password, ())
            files.append(_create(folder / f"{postgres.name}.password", f"{sealed}\n"))
        found = _read(lambda: config.load(source, {}), source)
        if found.server.tls.cert is not None:
            tls.context(found)
        note(found, "config.created", reason=f"{folder}; {self.who}")
        return found

    def _people(self, found: "Settings") -> str | None:
        """The first user; the SQL that makes the login role of the database, if there is one to make."""
        from mcpctl.identity import tokens, users
        from mcpctl.postgres import reader

        user, postgres = self.answers.user, self.answers.postgres
        if user is not None:
            users.add(users.user_file(found.auth.user_file), user, "made by mcpctl init", tokens.utcnow())
            note(found, "user.added", user=user, reason=self.who)
        if postgres is None:
            return None
        if postgres.roles == "per_user":
            return self._granted(found, user, postgres.name) if user is not None else None
        if self.logged_in and not self.print_sql:
            return None
        return reader.sql(postgres.dbname, str(postgres.user), postgres.password if postgres.made_up else None)

    def _granted(self, found: "Settings", user: str, database: str) -> str:
        """The SQL of a grant to read everything there, as `mcpctl user grant` prints it."""
        from mcpctl import granting
        from mcpctl.audit import log as audit_log
        from mcpctl.identity.grants import targets
        from mcpctl.keyring import Keyring

        key = audit_log.read_key(found.audit.key_file)
        grants = granting.Granting(found, Keyring(found.keyring.file), audit_log.installation(key))
        within = grants.confined(user, database, "read", targets([], []))
        done, script = grants.printed(user, database, lambda old: old.more("read", within))
        note(found, "grant.printed", user=user, database=database, reason=f"{granting.told(done)}; {self.who}")
        return script

    def _hand_over(self, found: "Settings", files: list[Path], script: str | None) -> None:
        """The token, if there is to be one, and what was made; then what comes next."""
        from mcpctl.cli import init_config

        answers = self.answers
        token = self._token(found) if answers.expiry is not None else None
        if self.json:
            names = [path.name for path in files]
            more = {key: value for key, value in {"sql": script, "token": token}.items() if value is not None}
            output.put_json({"folder": str(self.layout.config), "files": names, **more})
            return
        if self.print_sql and script is not None:
            output.put(script.rstrip("\n"))
        alone = self.print_sql or (answers.expiry is not None and answers.out is None)
        for path in files:
            (output.say if alone else output.put)(str(path))
        steps = init_config.steps(
            answers,
            self.layout,
            sql=script is not None,
            token=answers.expiry is not None,
            flag=config_flag(found.source),
        )
        output.say("next:\n" + "\n".join(f"  {number}. {step}" for number, step in enumerate(steps, 1)))
        if answers.issuer is not None:
            output.say("\n".join(init_config.provider_steps(answers)))

    def _token(self, found: "Settings") -> str | None:
        """The first user's token: in its file, or on stdout, or, for --json, given back."""
        from mcpctl.cli.new_token import expiry_of, handing_over, kept
        from mcpctl.errors import Error
        from mcpctl.identity import tokens

        answers, now = self.answers, tokens.utcnow()
        wanted = tokens.Wanted(user=answers.user, expires_at=expiry_of(found, answers.expiry, now), note="the first")
        with handing_over(answers.out) as give:
            entry, text = tokens.add(tokens.token_file(found.auth.token_file), wanted, now)
            note(found, "token.added", token=entry.id, user=answers.user, reason=self.who)
            if answers.out is not None or not self.json:
                try:
                    give(entry, text, False, now)
                except Error as problem:
                    problem.hint = "nothing is left of it, nor of the rest; --out FILE puts it into a file"
                    raise
        ends = f", until {tokens.rfc3339(entry.expires_at)}" if entry.expires_at else ""
        output.say(f"token {entry.id} of {answers.user}{ends}: {kept(answers.out)}")
        return text if answers.out is None else None


def _login(postgres: "Postgres", folder: Path) -> "Login":
    """The login as the config will have it."""
    from mcpctl.cli import init_config
    from mcpctl.keyring import Keyring
    from mcpctl.postgres.login import Login

    password = postgres.password
    known = init_config.settings(postgres)
    if password is None:
        known = replace(known, user="mcpctl")  # whom nobody has to let in: it is only seen who answers
    return Login(postgres.name, known, Keyring(folder / "secret.key"), None, (lambda: password) if password else None)


def _create(path: Path, text: str) -> Path:
    from mcpctl import private_file

    private_file.create(path, text.encode())
    return path


def _read(load: "Callable[[], Settings]", source: Path) -> "Settings":
    """The config; a fault in it is told without the place in a file that goes away again."""
    import re

    from mcpctl.errors import ConfigError, UsageError

    try:
        return load()
    except ConfigError as problem:
        told = re.sub(re.escape(str(source)) + r":\d+: ", "", problem.message)
        if told == problem.message:
            raise
        told = told.replace("is not in order", "would not be in order")
        raise UsageError(told, "nothing was made; docs/reference/config.md says what each key takes") from None
