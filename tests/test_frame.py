"""The frame of a statement, where a function is wrongly labelled PARALLEL SAFE and runs what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import site_of_mcpctl as site
from mcpctl.postgres.embedded import Binaries
from site_of_mcpctl import Client, Shop, Site

MakeSite = Callable[..., Site]
_TRAP = """
CREATE FUNCTION run(text) RETURNS text LANGUAGE plpgsql PARALLEL SAFE AS $$BEGIN EXECUTE $1; RETURN 'done'; END$$;
CREATE TABLE written (x int);
GRANT SELECT, INSERT ON written TO shop_reader;
"""
_IN_PLACE_OF_OURS = """do $$declare one record; begin
for one in select * from pg_prepared_statements where not from_sql and name ~ '(limits|unlock)$' loop
 execute format('deallocate %I', one.name);
 execute format('prepare %I(%s) as select 1, 2, pg_backend_pid(), case current_setting(''transaction_read_only'')
  when ''off'' then run(''insert into written values (1)'') end, set_config(''default_transaction_read_only'', ''off'',
  false)', one.name, array_to_string(one.parameter_types, ','));
end loop; end$$"""


@pytest.fixture(scope="module")
def trapped(newest: Binaries) -> Iterator[Shop]:
    with site.shop(newest) as found:
        with found.admin() as admin:
            admin.execute(_TRAP)
        yield found


@pytest.fixture
def a(make_site: MakeSite, trapped: Shop) -> Iterator[Client]:
    at = make_site(trapped).start()
    with at.client(at.token()[1]) as client:
        yield client


def test_what_is_prepared_in_place_of_ours_writes_nothing(a: Client, trapped: Shop) -> None:
    """A pipeline is run to its end before anybody sees what its first statement was."""
    for query in ("select 1", f"select run($run${_IN_PLACE_OF_OURS}$run$)", *["select 1"] * 3):
        a.rows(query)
    with trapped.admin() as admin:
        assert admin.execute("SELECT count(*) FROM written").fetchone() == (0,)


def test_what_is_prepared_in_place_of_ours_is_noticed(a: Client) -> None:
    before = a.rows("select pg_backend_pid()")
    a.rows(f"select run($run${_IN_PLACE_OF_OURS}$run$)")
    assert a.rows("select pg_backend_pid()") != before
