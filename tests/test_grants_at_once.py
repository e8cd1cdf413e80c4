"""Grants of one user at once, in one database and in two: each arrives, and none takes another's away."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

import pg
from mcpctl.errors import Error, NotFoundError
from mcpctl.identity.grants import PENDING
from mcpctl.postgres import administrator, roles
from mcpctl.postgres.administrator import Administrator
from place import Place, place
from site_of_mcpctl import eventually, in_background


@pytest.fixture(scope="module", params=pg.oldest_and_newest(), ids=str)
def here(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(tmp_path_factory.mktemp("grants-at-once") / "site", request.param, tcp=True) as found:
        yield found


_COUNT = iter(range(1000))


@pytest.fixture
def user(here: Place) -> Iterator[str]:
    """A user of this test's own, of whose roles nothing is left afterwards."""
    found = here.add(f"u{next(_COUNT)}")
    yield found
    here.granting().end(found, here.dsns)
    for role in ("r", "w"):
        here.do(f"DROP ROLE IF EXISTS mcp_{found}_{role}")


def left_of(here: Place, user: str) -> list[str]:
    """What the catalogs of both databases still say about a user's roles."""
    rows = [row for dbname in ("shop", "other") for found in here.catalog(dbname).values() for row in found]
    return [row for row in rows if f"mcp_{user}_" in row]


# -- two at once --------------------------------------------------------------------------------------------------


@pytest.mark.newest
def test_two_grants_at_once_to_one_user_both_arrive(here: Place, user: str) -> None:
    with here.held_up():
        first = in_background(here.grant, user, "read", "public")
        eventually(here.waiting)
        tables = ("public.orders", "public.customers", "public.products")
        others = [in_background(here.grant, user, "write", table) for table in tables]
        eventually(lambda: set(tables) <= set(here.recorded(user).write))  # type: ignore[union-attr]
    for one in (first, *others):
        one.result()
    grant = here.recorded(user)
    assert grant is not None
    assert (grant.state, grant.read, grant.write) == (None, tuple(sorted(("public", *tables))), tuple(sorted(tables)))
    assert here.granting().disagreements(here.granting().user(user), grant, here.dsns) == []


class Late:
    """An administrator who connects only when told to, or then cannot."""

    def __init__(self, who: Administrator, fails: bool = False) -> None:
        self._who = who
        self._fails = fails
        self.now = threading.Event()

    def connected(self) -> contextlib.AbstractContextManager[administrator.Connection]:
        assert self.now.wait(30)
        if self._fails:
            raise Error("cannot be reached")
        return self._who.connected()


@pytest.mark.parametrize("made", [True, False])
def test_a_grant_that_fails_at_last_takes_nothing_of_what_others_recorded_meanwhile(
    here: Place, user: str, made: bool
) -> None:
    late, granting = Late(here.who(), fails=True), here.granting()
    first = in_background(
        lambda: granting.applied(user, "shop", lambda old: old.more("read", ("public.orders",)), late)  # type: ignore[arg-type]
    )
    eventually(lambda: here.recorded(user))
    if made:
        here.grant(user, "read", "public.customers")
    else:
        granting.printed(user, "shop", lambda old: old.more("read", ("public.customers",)))
    late.now.set()
    with pytest.raises(Error, match="cannot be reached"):
        first.result()
    grant = here.recorded(user)
    assert grant is not None
    if made:  # the other one has made both, and what PostgreSQL has is recorded
        assert (grant.state, grant.read) == (None, ("public.customers", "public.orders"))
        assert here.granting().disagreements(here.granting().user(user), grant, here.dsns) == []
    else:
        assert (grant.state, grant.read) == (PENDING, ("public.customers",))


def test_a_grant_that_was_recorded_first_and_is_made_last_takes_nothing_back(here: Place, user: str) -> None:
    late = Late(here.who())
    granting = here.granting()
    first = in_background(
        lambda: granting.applied(user, "shop", lambda old: old.more("read", ("public.orders",)), late)  # type: ignore[arg-type]
    )
    eventually(lambda: here.recorded(user))
    here.grant(user, "write", "public.customers")
    late.now.set()
    first.result()
    grant = here.recorded(user)
    assert grant is not None
    assert (grant.state, grant.read) == (None, ("public.customers", "public.orders"))
    assert here.granting().disagreements(here.granting().user(user), grant, here.dsns) == []


def test_a_user_who_is_removed_while_a_grant_waits_gets_no_role(here: Place) -> None:
    user = here.add(f"u{next(_COUNT)}")
    late = Late(here.who())
    granting = here.granting()
    first = in_background(lambda: granting.applied(user, "shop", lambda old: old.more("read", ("public",)), late))  # type: ignore[arg-type]
    eventually(lambda: here.recorded(user))
    here.site.run("user", "remove", user, "--yes")
    late.now.set()
    with pytest.raises(NotFoundError, match="there is no user"):
        first.result()
    assert left_of(here, user) == []


def test_who_is_disabled_while_a_grant_is_made_may_not_log_in_after_it(here: Place, user: str) -> None:
    with here.held_up():
        first = in_background(here.grant, user, "read", "public")
        eventually(here.waiting)
        here.site.run("user", "disable", user)
    first.result()
    assert here.query("SELECT rolcanlogin FROM pg_roles WHERE rolname = %s", f"mcp_{user}_r") == [(False,)]


def test_no_lock_that_anybody_can_take_holds_a_superusers_grant_up(here: Place, user: str) -> None:
    with here.admin() as reader:
        reader.execute("SELECT pg_advisory_lock(6210384617)")
        here.grant(user, "read", "public.orders")


@pytest.mark.parametrize("who", ["superuser", "createrole"])
def test_a_grant_whose_turn_does_not_come_says_why_and_changes_nothing(
    here: Place, user: str, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "lock_timeout = '10s'" in roles.TURN
    monkeypatch.setattr(roles, "TURN", roles.TURN.replace("'10s'", "'500ms'"))
    here.do("CREATE ROLE dba LOGIN CREATEROLE PASSWORD 'dba'", "GRANT CONNECT ON DATABASE shop TO dba")
    dsn = here.dsns["shop"] if who == "superuser" else here.cluster.dsn_for("dba", "dba", "shop")
    asked = Administrator(here.who().login, dsn)
    with here.admin() as holder:
        holder.execute("BEGIN")
        superuser = who == "superuser"
        holder.execute(
            "LOCK TABLE pg_authid IN ROW EXCLUSIVE MODE" if superuser else "SELECT pg_advisory_xact_lock(6210384617)"
        )
        with pytest.raises(Error, match="another grant is being made there, or somebody holds its lock") as caught:
            here.granting().applied(user, "shop", lambda old: old.more("read", ("public.orders",)), asked)
    assert "pg_locks" in (caught.value.hint or "")
    assert here.recorded(user) is None
    here.do("DROP OWNED BY dba", "DROP ROLE dba")


def test_what_a_reader_holds_is_waited_for_a_while_and_then_said(
    here: Place, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DROP OWNED takes a policy of the role's, and waits for whoever reads the table, such as pg_dump."""
    here.grant(user, "read", "public.orders")
    here.do(f"CREATE POLICY theirs ON orders TO mcp_{user}_r USING (true)")
    try:
        with here.who().connected() as connection:
            assert connection.execute("SHOW lock_timeout").fetchone() == ("10s",)
        monkeypatch.setitem(administrator._FIRM, "lock_timeout", "300ms")
        with here.admin() as reader:
            reader.execute("BEGIN; SELECT FROM orders")
            with pytest.raises(
                Error, match="shop: a table or another object that is to be changed is in use"
            ) as caught:
                here.ungrant(user)
            assert str(caught.value.hint).startswith("run it again")
        here.ungrant(user)
    finally:
        here.do("DROP POLICY IF EXISTS theirs ON orders")


def test_of_two_grants_at_once_the_one_that_fails_takes_nothing_of_the_other(here: Place, user: str) -> None:
    with here.held_up():
        good = in_background(here.grant, user, "read", "public")
        eventually(here.waiting)
        bad = in_background(here.grant, user, "read", "public.nothing")
        eventually(lambda: "public.nothing" in here.recorded(user).read)  # type: ignore[union-attr]
    good.result()
    with pytest.raises(NotFoundError):
        bad.result()
    here.site.run("grant", "diff", "--user", user)  # the good one may have met the other's name, and left it to this
    assert (here.recorded(user).read, here.recorded(user).state) == (("public",), None)  # type: ignore[union-attr]


@pytest.mark.newest
def test_grants_in_two_databases_at_once_both_arrive(here: Place, user: str) -> None:
    for _ in range(5):
        first = in_background(here.grant, user, "write", "public.orders")
        second = in_background(lambda: here.grant(user, "write", "public.things", database="other"))
        for one in (first, second):
            one.result()
        for database in ("shop", "other"):
            here.connect(user, "write", database).close()
        for database in ("shop", "other"):
            here.ungrant(user, database=database)
