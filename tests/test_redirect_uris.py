"""Redirect URIs: which are taken, and which of them is which."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcpctl import redirect_uris


@pytest.mark.parametrize(
    "uri",
    [
        "https://claude.ai/api/mcp/auth_callback", "https://a.example:8443/back?x=1", "http://127.0.0.1/back",
        "http://127.0.0.1:33418/back", "http://[::1]:9/back", "http://localhost:1/", "com.example.app:/back",
        "com.example.app://back",
    ],
)  # fmt: skip
def test_a_place_that_belongs_to_somebody_is_taken(uri: str) -> None:
    redirect_uris.check(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "", "/back", "back", "https:", "https:///back", "https://a.example/#x", "https://a.example/\n", "https://a b/",
        "http://a.example/", "http://127.0.0.1.evil.example/", "http://localhost.evil.example/", "http://127.0.0.2/",
        "http://127.1/", "http://[::2]/", "https://user@a.example/", "https://a.example@evil.example/",
        "https://a.example\\@evil.example/", "https://*/", "https://*.a.example/", "https://a.example:0/",
        "https://a.example:x/", "https://[::1/", "javascript:alert(1)", "data:text/html,x", "cursor://back",
        "file:///etc/passwd", "HTTPS://a.example/", "ſttp://a.example/", "https://ä.example/", "//a.example/",
        "https://a.example/" + "a" * 1000,
    ],
)  # fmt: skip
def test_a_place_that_could_be_anybodys_is_not_taken(uri: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        redirect_uris.check(uri)


def test_a_scheme_without_a_dot_is_taken_where_the_config_names_it() -> None:
    redirect_uris.check("cursor://anysphere.cursor-mcp/oauth/callback", ("cursor",))


def test_only_the_port_of_loopback_may_differ() -> None:
    registered = ["http://127.0.0.1:1/back", "https://a.example/back"]
    assert redirect_uris.matching("http://127.0.0.1:65535/back", registered)
    assert redirect_uris.matching("http://127.0.0.1/back", registered)
    for uri in ("http://127.0.0.1:65536/back", "http://127.0.0.1:0/back", "http://localhost:1/back",
                "http://127.0.0.1:1/back/", "http://127.0.0.1:1/", "https://a.example:443/back",
                "https://a.example/Back", "https://127.0.0.1:1/back"):  # fmt: skip
        assert not redirect_uris.matching(uri, registered)


@given(st.text(max_size=40))
def test_what_is_behind_a_registered_place_is_another_place(more: str) -> None:
    registered = ["https://a.example/back"]
    assert redirect_uris.matching("https://a.example/back" + more, registered) == (more == "")
