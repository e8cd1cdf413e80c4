"""A login that is tried: what it could become counts; and the administrator's password is told to nobody in clear."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hostile import Hostile
from mcpctl.config_keys import Database
from mcpctl.errors import Error, ForbiddenError
from mcpctl.keyring import Keyring
from mcpctl.postgres import privileges, trial
from mcpctl.postgres.administrator import Administrator
from mcpctl.postgres.login import Login
from site_of_mcpctl import Shop

NO_KEYS = Keyring(Path("/nonexistent/secret.key"))


@pytest.mark.parametrize("group", ["postgres", "pg_read_server_files", "pg_execute_server_program"])
def test_a_member_of_a_role_with_too_much_power_has_it_too(shop: Shop, group: str, tmp_path: Path) -> None:
    with shop.admin() as admin:
        admin.execute(f"CREATE ROLE sneaky LOGIN PASSWORD 'its own' IN ROLE {group}".encode())
    try:
        dsn = shop.cluster.dsn_for("sneaky", "its own", "postgres")
        with shop.admin() as admin:
            admin.execute("GRANT CONNECT ON DATABASE postgres TO sneaky")
        login = Login("shop", Database(dsn=dsn), NO_KEYS)
        about = trial.log_in(login)
        assert about.privileged
        with pytest.raises(Error, match="can become a superuser"):
            about.check(login)
        with pytest.raises(ForbiddenError):
            privileges.connect(login)
    finally:
        with shop.admin() as admin:
            admin.execute("REVOKE CONNECT ON DATABASE postgres FROM sneaky")
            admin.execute("DROP ROLE sneaky")


def test_the_administrators_password_is_not_told_in_clear_to_whoever_answers() -> None:
    fake = Hostile()
    threading.Thread(target=fake.serve, daemon=True).start()
    login = Login("shop", Database(host="127.0.0.1", port=fake.port), NO_KEYS)
    who = Administrator(login, "postgresql://postgres:CANARY@/")
    with pytest.raises(Error, match="cannot reach"):
        who.connect()
    fake.listener.close()
    assert fake.connections
    assert b"CANARY" not in fake.heard
