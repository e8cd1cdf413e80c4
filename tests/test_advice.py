"""What a command says comes next is a command that would work."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import Home

DATABASES = """databases:
  first: {host: /nonexistent, roles: per_user}
  acme: {host: /nonexistent, roles: per_user}
"""


@pytest.mark.parametrize(("tenant", "database"), [(None, "first"), ("acme", "acme")])
def test_a_new_user_is_to_be_granted_a_database_that_they_can_have(
    tmp_path: Path, tenant: str | None, database: str
) -> None:
    home = Home(tmp_path / "home")
    home.config.write_text(DATABASES)
    assert home("tenant", "add", "acme", "--database", "acme").good
    done = home("user", "add", "ann", *(("--tenant", tenant) if tenant else ()))
    assert done.good == "ann added\n"
    assert f"next: mcpctl user grant ann --database {database} --access read --apply" in done.err
