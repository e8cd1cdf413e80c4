"""mcpctl database passwd: what a leaked password of a database opens afterwards, what the callers see of it, and what
is left where it fails."""

from __future__ import annotations

import json
from pathlib import Path

import psycopg
import pytest

import site_of_mcpctl as site
from mcpctl.identity import users
from mcpctl.keyring import Keyring, is_sealed
from site_of_mcpctl import PASSWORD, READER, in_background

ROLE = "mcp_alice_r"


def kept(found: site.Site, user: str | None = None, access: str = "read") -> str:
    """The password of the shop's login, or of a user's, as it is kept now."""
    text = (found.folder / "shop.password").read_text().strip()
    if user is not None:
        text = users.user_file(found.folder / "users.yaml").current()[user].grants["shop"].passwords[access]
    return Keyring(found.folder / "secret.key").open(text, "it") if is_sealed(text) else text


def lets_in(shop: site.Shop, role: str, password: str) -> bool:
    try:
        shop.login(role, password).close()
    except psycopg.OperationalError:
        return False
    return True


def last(found: site.Site) -> dict[str, object]:
    return [line for line in found.audit() if line["event"] == "config.database_password"][-1]
