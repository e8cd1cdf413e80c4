"""What `user grant --json` says of a grant is what users.yaml then holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from site_of_mcpctl import Shop, Site


def test_the_state_that_a_grant_s_json_names_is_the_recorded_one(newest_shop: Shop, tmp_path: Path) -> None:
    site = Site(tmp_path, newest_shop, per_user=True)

    def changed(*how: str) -> Any:
        said = json.loads(site.run("user", *how, "--database", "shop", "--json").stdout)
        recorded = json.loads(site.run("user", "show", "alice", "--json").stdout)["grants"].get("shop")
        assert recorded in (None, {name: said[name] for name in ("read", "write", "admin", "state")})
        return said["state"]

    try:
        grant = ("grant", "alice", "--access", "read", "--schema", "public")
        assert changed(*grant) == "pending"
        assert changed(*grant, "--apply") is None
        assert changed("ungrant", "alice") == "revoking"
    finally:
        assert changed("ungrant", "alice", "--apply") is None
