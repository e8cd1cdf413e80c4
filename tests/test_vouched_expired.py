"""Tokens of an outside issuer that are only over, beside those that are wrong."""

from __future__ import annotations

import pytest

from authenticating import FAILED, house
from mcpctl.errors import UnauthorizedError
from test_vouched import Site, site

__all__ = ["house", "site"]


async def status(site: Site, text: str) -> int:
    with pytest.raises(UnauthorizedError) as caught:
        await site.enter(text)
    return caught.value.status


def test_a_token_that_has_only_expired_is_401_however_many_were_wrong(site: Site) -> None:
    site.link("alice")

    async def work(_: Site) -> None:
        seconds = int(site.house.now.timestamp())
        over = [site.token(exp=seconds - 3600, iat=seconds - 7200, jti=str(one)) for one in range(FAILED + 1)]
        wrong = [site.token(aud="another", jti=str(one)) for one in range(FAILED + 1)]
        assert [await status(site, text) for text in over] == [401] * len(over)  # and none of them counts
        assert [await status(site, text) for text in wrong] == [401] * FAILED + [429]
        assert await status(site, over[0]) == 401
        forged = over[0][:-8] + ("A" * 8 if over[0][-8:] != "A" * 8 else "B" * 8)
        assert await status(site, forged) == 429

    site.use(work)
