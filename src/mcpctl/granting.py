"""Grants, in users.yaml and in PostgreSQL: recorded as pending before COMMIT, confirmed after it, mended by the next.

What takes a right away is recorded first, and the server refuses whoever could still use it until PostgreSQL is seen to
refuse too; what gives one is recorded as pending, which the server honours as far as PostgreSQL lets the role in.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from mcpctl.config import check_database
from mcpctl.config_keys import Settings
from mcpctl.departing import Departing
from mcpctl.errors import ConflictError, Error, Failures, NotFoundError, UsageError
from mcpctl.identity import tenants, users
from mcpctl.identity.grants import ACCESSES, REVOKING, Grant, login_role
from mcpctl.identity.tenants import Tenant
from mcpctl.identity.users import User
from mcpctl.keyring import Keyring
from mcpctl.postgres import administrator, hba, parameters, roles, scram
from mcpctl.postgres.administrator import Administrator, Connection
from mcpctl.postgres.differences import BY_HAND, differences, of_group
from mcpctl.postgres.login import Login
from mcpctl.postgres.parameters import Parameters
from mcpctl.postgres.roles import GONE, Rights, Terms

Change = Callable[[Grant], Grant]
UNSEEN = "nobody can log in there and look; `mcpctl user ungrant … --done` where the DBA has run the SQL"
"""What is said of a grant that was taken back by hand, perhaps."""


class Granting(Departing):
    """The grants of one installation. `installation` marks its roles; see `audit_log.installation`."""

    def __init__(self, settings: Settings, keyring: Keyring, installation: str) -> None:
        super().__init__(settings, keyring, installation)
        self._keyring = keyring
        self._tenants = tenants.tenant_file(settings.auth.tenant_file)

    def check(self, database: str, access: str | None = None) -> None:
        """Raises where no grant can be made in a database: it is not in the config, all share one login there, or the
        access is admin and the config lists no setting that could be changed."""
        check_database(self._settings, database)
        if not self.logins.per_user(database):
            raise Error(
                f"in the database {database} all users share one login, so there is nothing to grant",
                f"set databases.{database}.roles: per_user",
            )
        if access == "admin" and not self._settings.databases[database].settings:
            raise Error(
                f"in the database {database} nobody may change settings: the config lists none",
                f"name those that may be changed, such as databases.{database}.settings: [work_mem]",
            )

    def terms(self, user: str, database: str) -> Terms:
        """What the user's login roles are given in a database, besides rights."""
        config, limits = self._settings.databases[database], self._settings.limits
        return Terms(
            self.mark(user),
            config.pool.max_per_user + self._settings.server.workers,
            config.limits.statement_timeout or limits.statement_timeout,
            config.allow_open_hba,
            self._enabled(user),
            self._schema(user, database),
        )

    def _enabled(self, user: str) -> bool:
        """Whether the login roles of that user may log in: a grant to one who is disabled lets nobody in."""
        entry = self._file.current().get(user)
        return entry is not None and entry.disabled_at is None

    def _schema(self, user: str, database: str) -> str | None:
        """The schema that the user's tenant has there, if it has one."""
        entry = self._file.current().get(user)
        place = self._tenants.current().get(entry.tenant or "") if entry is not None else None
        return place.schema if place is not None and place.database == database else None

    def confined(self, name: str, database: str, access: str, targets: tuple[str, ...]) -> tuple[str, ...]:
        """The targets of a grant, within the user's tenant. UsageError for what is outside of it; ConflictError where
        the whole grant, with what it has already, would reach another tenant's place, or one that is meant to be."""
        user = self.user(name)
        tenant, old = user.tenant, user.grants.get(database, Grant(database))
        if access == "admin" and tenant is not None:
            raise UsageError(
                f"{name} belongs to the tenant {tenant}, and settings are the whole cluster's",
                "give them to a user without a tenant",
            )
        places = tenants.checked(self._settings)
        if tenant is not None:
            place = tenants.find(places, tenant)
            targets = place.confine(database, targets)
            if (text := place.outside((*old.read, *old.write))) is not None:
                raise ConflictError(
                    f"{name} has a grant on {text} in {database} from before, which is outside of the tenant {tenant}",
                    f"take it back first: mcpctl user ungrant {name} --database {database}",
                )
        wanted = replace(user, grants={database: old.more(access, targets)})
        self._check_strangers(places, wanted)
        for other, meant in tenants.astray(places, self.people()):
            if tenants.strangers(meant, {"": wanted}):
                raise ConflictError(
                    f"{other}, of the tenant {meant.name}, has a grant in {meant.where}: is tenants.yaml right?",
                    f"mend it there; where it is right: mcpctl user ungrant {other} --database {database}",
                )
        return targets

    @staticmethod
    def _check_strangers(places: Mapping[str, Tenant], user: User) -> None:
        """Refuses a grant that reaches into the place of a tenant whom the user does not belong to."""
        for place in places.values():
            if tenants.strangers(place, {"": user}):
                outside = "grant what is outside of it, taking back what is not, or " if place.schema else ""
                raise ConflictError(
                    f"{place.where} is the tenant {place.name}'s alone",
                    f"{outside}make a user who belongs to the tenant: user add --tenant",
                )

    def worst(self, database: str) -> int:
        """The connections that all users with a grant in that cluster could hold at once, by their roles' limits."""
        living = [user for user in self._file.current().values() if user.disabled_at is None]
        place = self.logins.host(database).place
        held = {
            login_role(user.name, access)
            for user in living
            for grant in user.grants.values()
            for access in ACCESSES
            if grant.has(access)
            and grant.database in self._settings.databases
            and self.logins.host(grant.database).place == place
        }
        return len(held) * self.terms("", database).connections

    def may_set(self, user: User, grant: Grant, before: Grant | None = None) -> Parameters:
        """What the user's login role for admin access may set, once the grant is as given. Role and settings are the
        cluster's, so the grants in all its databases count together; `before`: the grant as it was."""
        names: dict[str, None] = {}
        read_all = False
        for one in {**user.grants, grant.database: grant}.values():
            config = self._settings.databases.get(one.database)
            if config is None or not one.admin or not self._one_cluster(one, grant, before):
                continue
            names.update(dict.fromkeys(config.settings))
            read_all = read_all or config.read_all_settings
        return Parameters(tuple(sorted(names)), read_all)

    def _one_cluster(self, one: Grant, *others: Grant | None) -> bool:
        """Whether a grant's database is of the cluster of another one's: they have one address, or one password."""
        for other in others:
            if other is None:
                continue
            if self.logins.host(one.database).place == self.logins.host(other.database).place:
                return True
            sealed = [grant.passwords.get("admin") for grant in (one, other)]
            opened = {self._keyring.open(text, "a password in users.yaml") for text in sealed if text is not None}
            if None not in sealed and len(opened) == 1:
                return True
        return False

    # -- in users.yaml and in PostgreSQL -------------------------------------------------------------------------

    def printed(self, name: str, database: str, change: Change) -> tuple[Grant, str]:
        """Record a change; the grant, and the script for a DBA to run."""
        before, after = self._recorded(name, database, change)
        title = f"mcpctl: {name} in {database}: {told(after)}. Connect to that database, as its owner or a superuser."
        return after, roles.script(self._body(name, before, after, after.recorded - before.recorded), title)

    def applied(self, name: str, database: str, change: Change, who: Administrator) -> Grant:
        """Make a change in PostgreSQL, in one transaction, and record it. Where it fails nothing is changed, unless a
        right is taken away: then the server refuses it already, and the next run ends it in PostgreSQL too.

        What is made is what users.yaml says when it is our turn: another command may have recorded more meanwhile, and
        finds it made."""
        before, after = self._recorded(name, database, change)
        nothing = before.empty and before.state is None
        undo = nothing or (not after.empty and before.recorded <= after.recorded)
        try:
            with who.connected() as connection:
                connection.execute(f"BEGIN; {roles.TURN}".encode())
                made = self.user(name).grants.get(database, Grant(database))
                self._run(connection, name, before, made, after.recorded - before.recorded)
                undo = False  # from here on only PostgreSQL knows
                connection.execute("COMMIT")
                if not self._enabled(name):  # disabled or removed while we waited: who did it saw no role yet
                    failed = Failures()
                    list(administrator.set_login(who, connection, self._there(connection, name), failed, on=False))
                    failed.check()
        except BaseException as problem:
            if undo:
                self._undo(name, before, after)
                if isinstance(problem, NotFoundError):
                    problem.hint = f"{problem.hint}; nothing was changed"
            raise
        self._confirm(name, made)
        return replace(made, state=None)

    def _confirm(self, name: str, made: Grant) -> bool:
        """Record that PostgreSQL has a grant, unless another command has changed it meanwhile; whether it was so."""
        with self._file.edit(though_full=True) as entries:
            user = users.find(entries, name)
            found = user.grants.get(made.database)
            if found is None or not found.same(made):
                return False
            used = {access: sealed for access, sealed in found.passwords.items() if getattr(found, access)}
            entries[name] = user.with_grant(replace(found, state=None, passwords=used))
        return True

    def _undo(self, name: str, before: Grant, after: Grant) -> None:
        """Take out of users.yaml what we have put into it. What another command has added meanwhile stays, and all of
        it where that one has made ours as well."""
        with self._file.edit(though_full=True) as entries:
            if (user := entries.get(name)) is None:
                return
            found = user.grants.get(before.database)
            if found is None or found.same(after):
                entries[name] = user.with_grant(before)
            elif found.state is not None:
                entries[name] = user.with_grant(found.without(before, after))

    def _recorded(self, name: str, database: str, change: Change) -> tuple[Grant, Grant]:
        """Record a change that is still to be made in PostgreSQL: (the grant before, the grant after). A new password
        is sealed under the file's lock, so that no key is dropped meanwhile."""
        with self._file.edit(though_full=True) as entries:
            user = users.find(entries, name)
            before = user.grants.get(database, Grant(database))
            after = before.changed_to(self._with_passwords(user, change(before)))
            entries[name] = user.with_grant(after)
        return before, after

    def _run(self, connection: Connection, name: str, before: Grant, after: Grant, added: Rights) -> None:
        """Run the SQL in the open transaction, and see that it did what it says; Error, and ROLLBACK, where not."""
        connection.execute(self._body(name, before, after, added).encode())
        may_set = self.may_set(self.user(name), after, before)
        found = differences(connection, name, after, self.mark(name), may_set)
        gives = before.recorded < after.recorded or (before.recorded == after.recorded and before.state is None)
        ours = [one for one in found if GONE not in one and BY_HAND not in one]
        missing = [one for one in ours if ": lacks " in one or (not gives and "recorded" in one)]
        if missing:
            raise Error(
                f"PostgreSQL has not {'granted' if gives else 'taken'} all of it: {'; '.join(missing[:5])}",
                "the administrator's login must be a superuser, or own what is granted; nothing was changed",
            )

    def _body(self, name: str, before: Grant, grant: Grant, added: Rights) -> str:
        verifiers = {
            access: scram.verifier(login_role(name, access), self._open(name, grant, access))
            for access in ACCESSES
            if getattr(grant, access)
        }
        new = [access for access in verifiers if access not in before.passwords and self._is_new(name, grant, access)]
        script = roles.grant_body(name, grant, verifiers, self.terms(name, grant.database), added, new)
        may_set = self.may_set(self.user(name), grant, before)
        if grant.admin or (before.admin and may_set.names):
            script += parameters.body(login_role(name, "admin"), may_set, here=grant.admin)
        return script

    def _is_new(self, name: str, grant: Grant, access: str) -> bool:
        """Whether no other database's grant has the login role's password too: then it is of the same cluster."""
        others = [one for one in self.user(name).grants.values() if one.database != grant.database]
        known = [self._open(name, one, access) for one in others if access in one.passwords]
        return self._open(name, grant, access) not in known

    def _open(self, name: str, grant: Grant, access: str) -> str:
        return self._keyring.open(grant.passwords[access], f"users.yaml: the password of {login_role(name, access)}")

    def _with_passwords(self, user: User, grant: Grant) -> Grant:
        """The grant with a sealed password for each login that it needs. A role of a cluster has one password: that of
        another database of the cluster is taken where there is one."""
        passwords = dict(grant.passwords)
        for access in ACCESSES:
            if getattr(grant, access) and access not in passwords:
                passwords[access] = self._known(user, grant.database, access) or self._keyring.seal(
                    scram.new_password(), users.sealed_in(self.people())
                )
        return replace(grant, passwords=passwords)

    def _known(self, user: User, database: str, access: str) -> str | None:
        here = self.logins.host(database).place
        for other in user.grants.values():
            if other.database == database or access not in other.passwords:
                continue
            if other.database not in self._settings.databases:
                continue
            sealed = other.passwords[access]
            if self.logins.host(other.database).place == here:
                return sealed
            login = self.logins.with_role(database, login_role(user.name, access), sealed)
            if administrator.logs_in(login):  # the same cluster, by another name
                return sealed
        return None

    # -- seeing whether they agree ---------------------------------------------------------------------------------

    def connection(self, user: User, grant: Grant, dsns: Mapping[str, str]) -> Connection | None:
        """A connection to look at the grant with: the administrator's, else the user's own, else None."""
        login = self.logins.host(grant.database)
        if grant.database in dsns:
            return Administrator.of(dsns, login).connect()
        found = map(administrator.connect_as, self._own(user, grant))
        return next((connection for connection in found if connection is not None), None)

    def _own(self, user: User, grant: Grant) -> list[Login]:
        return [
            self.logins.with_role(grant.database, login_role(user.name, access), grant.passwords[access])
            for access in ACCESSES
            if access in grant.passwords
        ]

    def disagreements(self, user: User, grant: Grant, dsns: Mapping[str, str]) -> list[str]:
        """Where PostgreSQL is not as the grant says, and what is still to be confirmed."""
        if grant.database not in self._settings.databases:
            return [f"users.yaml has a grant on {grant.database}, which is not in the config"]
        found: list[str] = []
        connection = self.connection(user, grant, dsns)
        if connection is None:  # a role that is gone is refused as one is whose password somebody has changed
            connection = self._others(grant)
            if grant.state != REVOKING:
                found = [f"none of {user.name}'s login roles can log in"]
            elif connection is None:
                found = [UNSEEN]
        if connection is not None:
            with connection:
                found += differences(
                    connection,
                    user.name,
                    grant,
                    self.mark(user.name),
                    self.may_set(user, grant),
                    login=self._enabled(user.name),
                )
        if grant.state is not None and found:
            found.append(f"the grant is {grant.state}")
        return found

    def _others(self, grant: Grant) -> Connection | None:
        """A connection there as anybody else: the catalog is everybody's to read."""
        logins = [*self.logins.own(grant.database), *self.logins.of_people(grant.database, self.people())]
        return next(filter(None, map(administrator.connect_as, logins)), None)

    def believe(self, name: str, database: str, dsns: Mapping[str, str]) -> None:
        """Record that a DBA has taken a grant back, as somebody says, where nobody can log in there and look. Raises
        UsageError where nothing is being taken back, and Error where PostgreSQL is seen to be otherwise."""
        user = self.user(name)
        grant = user.grants.get(database)
        if grant is None or grant.state != REVOKING:
            raise UsageError(
                f"nothing of {name}'s in {database} is being taken back as a whole", f"mcpctl user show {name}"
            )
        found = self.disagreements(user, grant, dsns)
        if found and UNSEEN not in found:
            raise Error(f"it is not so in PostgreSQL: {'; '.join(found[:5])}", "have the SQL run, in that database")
        self._confirm(name, grant)

    def settled(self, user: User, grant: Grant, dsns: Mapping[str, str]) -> bool:
        """Confirm in users.yaml what a DBA has done by hand meanwhile; whether it was."""
        if grant.state is None or self.disagreements(user, grant, dsns):
            return False
        return self._confirm(user.name, grant)

    def cluster(self, database: str) -> list[str]:
        """The databases of its cluster whose roles are per user, itself among them, in the config's order."""
        place = self.logins.host(database).place
        names = [name for name in self._settings.databases if self.logins.per_user(name)]
        return [name for name in names if self.logins.host(name).place == place]

    def strays(self, dsns: Mapping[str, str], among: Collection[str]) -> list[tuple[str, str]]:
        """(database, sentence) of each login role in these databases that bears our mark, and that no grant in
        users.yaml needs; and of what the roles have that stand for all of them. A role that is being taken back is no
        stray: its grant says what is still to be done."""
        found: dict[str, tuple[str, str]] = {}
        people = self.people()
        wanted = {
            login_role(user.name, access)
            for user in people.values()
            for grant in user.grants.values()
            for access in ACCESSES
            if getattr(grant, access) or (grant.state is not None and access in grant.passwords)
        }
        for database in self._settings.databases:
            if database not in among or database not in dsns or not self.logins.per_user(database):
                continue
            with Administrator.of(dsns, self.logins.host(database)).connected() as connection:
                for sentence in (*of_group(connection, hba.GROUP), *of_group(connection, roles.HEIR)):
                    found.setdefault(sentence, (database, sentence))
                for role in administrator.login_roles(connection).values():
                    ours = (role.mark or "").startswith(f"mcpctl {self._installation}: ")
                    if ours and role.name not in wanted:
                        found.setdefault(role.name, (database, f"{role.name}: is there, and no grant needs it"))
        return list(found.values())


def told(grant: Grant) -> str:
    """A grant in words: `read public; write sales.orders; admin`."""
    parts = [f"{access} {', '.join(getattr(grant, access))}" for access in ("read", "write") if getattr(grant, access)]
    parts += ["admin"] if grant.admin else []
    return "; ".join(parts) or "nothing"
