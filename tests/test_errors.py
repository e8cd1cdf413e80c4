"""What no message may show, and what it must."""

from mcpctl.errors import masked
from mcpctl.identity.tokens import mint, token_id


def test_a_token_is_cut_down_to_its_id_whole_or_in_part() -> None:
    text = mint()[1]
    shown = f"mcp_{token_id(text)}_…"
    assert masked(f"x {text} y") == f"x {shown} y"
    assert masked(text.rpartition("_")[0]) == shown
    assert masked(text[:40]) == shown


def test_the_role_of_a_user_whose_name_has_eight_letters_is_shown() -> None:
    assert masked("grant to mcp_jonathan_r, mcp_jonathan_w") == "grant to mcp_jonathan_r, mcp_jonathan_w"
