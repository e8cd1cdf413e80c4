"""May this user do that? The whole chain, from the token down to PostgreSQL's own word, by the same rules and the same
logins that a call goes through.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

from mcpctl.config import check_database, default_database
from mcpctl.config_keys import Settings
from mcpctl.errors import Error, ForbiddenError, NotFoundError, UnavailableError, UsageError
from mcpctl.identity import grants, tenants, tokens, users
from mcpctl.identity.grants import Target, login_role
from mcpctl.identity.own_databases import Key, OwnDatabase
from mcpctl.identity.principal import Principal
from mcpctl.identity.tenants import Tenant
from mcpctl.identity.tokens import Token
from mcpctl.identity.users import User
from mcpctl.keyring import Keyring
from mcpctl.policy.access import Access
from mcpctl.postgres import harden, privileges
from mcpctl.postgres.login import OWN, Login
from mcpctl.postgres.logins import Logins
from mcpctl.postgres.own import Own
from mcpctl.tools.definition import Tool
from mcpctl.tools.own import told
from mcpctl.tools.settings import SET
from mcpctl.tools.table import TOOLS

CALL = "call"
_TOOL_OF = {"read": "query_database", "write": "execute_statement"}


@dataclass(frozen=True)
class Link:
    """One link of the chain: what it is, whether it lets through, and why."""

    name: str
    allowed: bool
    reason: str


@dataclass
class Answer:
    """Yes or no, with every link up to the one that says no. `hides_all`: allowed, and row security shows no row.
    `columns`: allowed on these alone; none for all of them."""

    links: list[Link] = field(default_factory=list)
    hides_all: bool = False
    columns: tuple[str, ...] = ()

    @property
    def allowed(self) -> bool:
        """Whether every link lets through."""
        return all(link.allowed for link in self.links)

    def add(self, name: str, allowed: bool, reason: str) -> bool:
        """Add a link; whether it lets through."""
        self.links.append(Link(name, allowed, reason))
        return allowed


@dataclass(frozen=True)
class Question:
    """An action (select, insert, update, delete; or call) and its target: a table, or a tool, in a database."""

    action: str
    target: str
    database: str | None = None


class Rights:
    """The rights of one installation, all read when it is made; `now` is the time that expiries are held to.

    `unasked` has, by database, or login role and table, why what is said without it is not the whole: it cannot be
    reached; in `everything`, it takes the login no more; the table is locked.
    """

    def __init__(self, settings: Settings, now: datetime) -> None:
        self._settings = settings
        self._now = now
        self.unasked: dict[str, Error] = {}
        self._open: dict[tuple[str, str | None], list[tuple[str, str]]] = {}
        self._access = Access(settings.auth)
        keyring = Keyring(settings.keyring.file)
        with closing(Own(settings, keyring, None)) as self._own:
            self._brought: Mapping[Key, OwnDatabase] = self._own.everybody() if self._own.on else {}
        self._logins = Logins(settings.databases, keyring)
        self._logins.brought = lambda user, name: (user, name) in self._brought
        self._people: Mapping[str, User] = users.user_file(settings.auth.user_file).current()
        self._tenants: Mapping[str, Tenant] = tenants.checked(settings)
        self._tokens: Mapping[str, Token] = tokens.token_file(settings.auth.token_file).current()

    def users(self) -> list[str]:
        """Everybody's name."""
        return list(self._people)

    def check_user(self, name: str) -> None:
        """Raises NotFoundError (exit 4) where there is no such user."""
        users.find(self._people, name)

    def services(self) -> list[str]:
        """The ids of the living service tokens."""
        return [one.id for one in self._tokens.values() if one.user is None and self._lives(one)]

    def _lives(self, token: Token) -> bool:
        return token.status(self._now) in ("active", "expiring")

    # -- who -------------------------------------------------------------------------------------------------------

    def principal(self, user: str | None, token: str | None) -> Principal:
        """The principal of a user's token, of a service token, or of a user whatever the token."""
        entry = None if token is None else self._token(token)
        if entry is not None and user is not None and entry.user != user:
            raise UsageError(f"token {token} is not one of {user}'s", "`mcpctl token list` shows whose it is")
        name = entry.user if entry is not None else user
        person = self._people.get(name) if name is not None else None
        return Principal(
            token=token,
            user=name,
            pool="",
            databases=entry.databases if entry is not None else None,
            permissions=entry.permissions if entry is not None else None,
            roles=person.roles if person is not None else None,
            grants=person.grants if person is not None else {},
            tenant=person.tenant if person is not None else None,
            within=self._tenants.get(person.tenant or "") if person is not None else None,
            closed=tenants.closed(self._tenants, person),
        )

    def _token(self, name: str) -> Token:
        try:
            return self._tokens[name]
        except KeyError:
            raise NotFoundError(f"there is no token {name[:20]}", "`mcpctl token list` shows the ids") from None

    def _who(self, principal: Principal, answer: Answer) -> bool:
        if principal.token is not None:
            token = self._token(principal.token)
            status = token.status(self._now)
            ends = f", until {tokens.rfc3339(token.expires_at)}" if token.expires_at else ""
            if not answer.add("token", self._lives(token), f"{token.id} is {status}{ends}"):
                return False
        elif principal.user is not None:
            own = [one for one in self._tokens.values() if one.user == principal.user]
            alive = ("active", "expiring", "disabled")
            living = [one.id for one in own if tokens.standing(one, self._people, self._now) in alive]
            shown = f"{len(living)} living: {', '.join(living[:5])}" if living else "none is alive"
            linked = len(self._people[principal.user].links) if principal.user in self._people else 0
            if linked:
                shown += f"; not looked at: those of {linked} linked identities, with roles of their issuer's"
            elif not living:
                shown += ", so nobody can use it now"
            answer.add("token", True, f"any of the user's tokens ({shown}); one may be limited further (--token)")
        if principal.user is None:
            return True
        person = users.find(self._people, principal.user)
        if principal.token is not None and person.created_at > self._token(principal.token).created_at:
            return answer.add("user", False, f"the token was given to another {person.name}, who is gone")
        if person.disabled_at is not None:
            return answer.add("user", False, f"{person.name} is disabled since {tokens.rfc3339(person.disabled_at)}")
        return answer.add("user", True, f"{person.name} is there, and not disabled")

    # -- may they --------------------------------------------------------------------------------------------------

    def ask(self, principal: Principal, question: Question) -> Answer:
        """The chain for one question. NotFoundError where the tool, database or table does not exist at all;
        UnavailableError where its database cannot be reached."""
        answer = Answer()
        tool, target = self._meaning(question)
        if not self._who(principal, answer) or not self._permitted(principal, tool.permission, answer):
            return answer
        if tool.ask is None:
            return answer
        login = self._login(principal, self._database(principal, question), tool.access, answer)
        if login is not None:
            self._ask_postgresql(login, question.action, target, answer)
        return answer

    def _meaning(self, question: Question) -> tuple[Tool, Target | None]:
        if question.action == CALL:
            if question.target not in TOOLS:
                raise NotFoundError(f"there is no tool {question.target[:60]}", f"there are {', '.join(TOOLS)}")
            return TOOLS[question.target], None
        if question.action not in privileges.ACTIONS:
            raise UsageError(
                f"{question.action[:40]!r} is no action", f"there are {', '.join((*privileges.ACTIONS, CALL))}"
            )
        try:
            target = grants.parse(question.target)
        except ValueError as problem:
            raise UsageError(str(problem), "such as sales.orders") from None
        if target.table is None:
            raise UsageError(f"{question.target} names no table", "write schema.table, such as public.orders")
        return TOOLS[_TOOL_OF[privileges.ACTIONS[question.action]]], target

    def _database(self, principal: Principal, question: Question) -> str:
        if question.database is not None:
            shown = OWN + question.database.removeprefix(OWN)
            brought = {row.shown for row in self._brought.values()}
            if question.database not in self._settings.databases and shown in brought:
                return shown
            check_database(self._settings, question.database)
            return question.database
        if principal.within is not None:
            return principal.within.database
        only = principal.databases
        found = only[0] if only is not None and len(only) == 1 else default_database(self._settings)
        if found is None:
            readable = [one for one in self._settings.databases if self._login(principal, one, "read", Answer())]
            found = readable[0] if len(readable) == 1 else None
        if found is None:
            raise UsageError("there is no default database", "name it with --database")
        return found

    def _permitted(self, principal: Principal, permission: str, answer: Answer) -> bool:
        """Add the links of a permission, up to the first that says no."""
        links = self._access.chain(principal, permission)
        for link in links if principal.token is not None else links[:-1]:
            if not answer.add(permission, link.allowed, link.reason):
                return False
        return True

    def _login(self, principal: Principal, database: str, access: str, answer: Answer) -> Login | None:
        """Add the links of the database; the login role that a call would use there."""
        name = database.removeprefix(OWN)
        if not self._permitted(principal, f"databases:{name}:{access}", answer):
            return None
        if name != database:
            return self._own_login(principal, name, access, answer)
        try:
            login = self._logins.of(principal, database, access)
        except ForbiddenError as problem:
            hint = f" ({problem.hint})" if problem.hint else ""
            answer.add("grant", False, f"{principal.name}: {problem.message}{hint}")
            return None
        grant = principal.grants.get(database)
        if self._logins.per_user(database) and grant is not None and principal.user is not None:
            names = login.settings.settings if access == "admin" else getattr(grant, access)
            targets = ", ".join(names)
            state = f", {grant.state}" if grant.state else ""
            answer.add("grant", True, f"users.yaml: {access} {targets} in {database}{state}")
            answer.add("login role", True, login_role(principal.user, access))
        else:
            whose = "its service_dsn" if self._logins.per_user(database) else "the one login that all share"
            answer.add("login role", True, f"{database}: {whose}")
        return login

    def _own_login(self, principal: Principal, name: str, access: str, answer: Answer) -> Login | None:
        """Add the link of a database that the principal's user has brought; the login there."""
        row = self._brought.get((principal.user or "", name))
        try:
            if row is None:
                raise ForbiddenError(f"{principal.name} has none of that name")
            if access != "read":
                raise ForbiddenError(f"{row.shown} is only read here")
            if name in self._settings.databases:
                raise ForbiddenError(f"{row.shown} is hidden by the config's database of that name")
            login = self._own.login_of(row)
        except ForbiddenError as problem:
            answer.add("own database", False, problem.message)
            return None
        answer.add("own database", True, f"{row.shown} is {principal.name}'s alone, and only read")
        answer.add("login role", True, told(row))
        return login

    def _ask_postgresql(self, login: Login, action: str, target: Target | None, answer: Answer) -> None:
        try:
            connection = self._connect(login)
        except UnavailableError:
            raise
        except ForbiddenError as problem:
            answer.add("postgresql", False, f"{login.role or login.name}: {problem.message}")
            return
        except Error as problem:  # its password does not open, or a keyword is wrong: a call fails in the same way
            answer.add("postgresql", False, problem.message)
            return
        with connection:
            if target is None:
                answer.add(
                    "postgresql", True, f"takes the login in {login.name}; what it may touch there is another question"
                )
            else:
                try:
                    verdict = privileges.may(connection, action, target)
                except NotFoundError as problem:  # who named no database sees which one was meant
                    raise NotFoundError(f"{problem.message} in {login.name}", problem.hint) from None
                except UnavailableError as problem:
                    self._not_known(login, f"{login.name} {login.role} {target}", problem)
                    raise
                if not self._add_verdict(verdict, action, answer):
                    return
            if login.crowd != OWN and (
                still := self._still_open(login, partial(harden.still_open, connection, login.role))
            ):
                some = ", ".join(signature for signature, _ in still[:3])
                answer.add("hardening", True, f"still open to any login: {some}, … ({len(still)}); see database harden")
        limits, own = self._settings.limits, login.settings.limits
        rows, size = own.max_rows or limits.max_rows, own.max_bytes or limits.max_bytes
        seconds = own.statement_timeout or limits.statement_timeout
        connections = login.settings.pool.max_size
        answer.add(
            "limits", True, f"{rows} rows, {size} bytes and {seconds:g} s a call, {connections} connections a token"
        )

    def _still_open(self, login: Login, look: Callable[[], list[tuple[str, str]]]) -> list[tuple[str, str]]:
        """Looked for once a login: PostgreSQL takes longer for it than for all else that a question needs."""
        asked = (login.name, login.role)
        if asked not in self._open:
            self._open[asked] = look()
        return self._open[asked]

    @staticmethod
    def _add_verdict(verdict: privileges.Verdict, action: str, answer: Answer) -> bool:
        """Add the links of what PostgreSQL says; whether it lets through."""
        answer.hides_all, answer.columns = verdict.hides_all, verdict.columns
        for reason in verdict.reasons[:-1]:
            answer.add("postgresql", True, reason)
        if not answer.add("postgresql", verdict.allowed, verdict.reasons[-1]):
            return False
        if verdict.triggers:
            answer.add("triggers", True, f"{', '.join(verdict.triggers)} may still refuse it, or do something else")
        if not verdict.row_security:
            answer.add("row security", True, "none: every row")
        elif verdict.hides_all:
            no_row = "no row" if action == "select" else "no row can be changed"
            answer.add("row security", True, f"on, and no policy lets this role through: {no_row}")
        else:
            which = "every row" if verdict.every_row else "some rows only"
            answer.add("row security", True, f"{which}, by {'; '.join(verdict.policies)}")
        return True

    # -- everything ------------------------------------------------------------------------------------------------

    def everything(self, principal: Principal) -> list[tuple[str, str, str]]:
        """(database, what, right) of all that a principal may do: tools, and tables by PostgreSQL's word."""
        start = Answer()
        if not self._who(principal, start):
            return []
        rows = [("", name, CALL) for name, tool in TOOLS.items() if self._offered(principal, tool)]
        for database in self._settings.databases:
            merged: dict[str, list[str]] = {}
            for access in ("read", "write"):
                login = self._login(principal, database, access, Answer())
                if login is None or not self._access.may(principal, TOOLS[_TOOL_OF[access]].permission).allowed:
                    continue
                if (connection := self._connection(login)) is None:
                    continue
                with connection:
                    again = partial(self._connect, login)
                    for target, actions, filtered, unknown in privileges.tables(connection, access, again):
                        shown = f"{target}{' (row security)' if filtered else ''}"
                        merged.setdefault(shown, []).extend(actions)
                        if unknown is not None:
                            self._not_known(login, f"{login.name} {login.role} {target}", unknown)
                            merged[shown].append("not known")
            rows += [
                (database, what, ",".join(dict.fromkeys(rights))) for what, rights in sorted(merged.items()) if rights
            ]
            rows += [(database, name, "set") for name in self._settable(principal, database)]
        return rows + self._own_rows(principal)

    def _own_rows(self, principal: Principal) -> list[tuple[str, str, str]]:
        """The databases that the principal's user has brought. Nobody connects there: what is in them is not said."""
        if not self._access.may(principal, TOOLS[_TOOL_OF["read"]].permission).allowed:
            return []
        return [
            (row.shown, f"{row.user}'s alone, only read, as {told(row)}", "select")
            for row in self._brought.values()
            if row.user == principal.user and self._login(principal, row.shown, "read", Answer()) is not None
        ]

    def _offered(self, principal: Principal, tool: Tool) -> bool:
        """Whether tools/list shows it the principal: one that needs more than to read only with that access somewhere,
        one for databases that users bring only to a user, where there may be some."""
        if not self._access.may(principal, tool.permission).allowed:
            return False
        if tool.own is not None:
            own = principal.user is not None and principal.tenant is None
            return own and bool(self._settings.own_databases.hosts)
        return tool.access == "read" or any(
            self._login(principal, database, tool.access, Answer()) is not None for database in self._settings.databases
        )

    def _settable(self, principal: Principal, database: str) -> list[str]:
        """The listed settings that a principal may change, by PostgreSQL's word."""
        login = self._login(principal, database, "admin", Answer())
        if login is None or not self._access.may(principal, SET.permission).allowed:
            return []
        if (connection := self._connection(login)) is None:
            return []
        with connection:
            return privileges.settable(connection, login.settings.settings)

    def _not_known(self, login: Login, what: str, problem: Error) -> None:
        why = Error(f"{login.name}: {login.role or 'its login'}: {problem.message}", problem.hint)
        self.unasked.setdefault(what, why)

    def _connection(self, login: Login) -> privileges.Connection | None:
        """A connection as that login; None, and why in `unasked`, where there is none."""
        try:
            return self._connect(login)
        except Error as problem:
            self._not_known(login, login.name, problem)
            return None

    def _connect(self, login: Login) -> privileges.Connection:
        """As privileges.connect; what cannot be reached is tried once."""
        if isinstance(known := self.unasked.get(login.name), UnavailableError):
            raise known
        try:
            return privileges.connect(login)
        except UnavailableError as problem:
            self.unasked[login.name] = problem
            raise
