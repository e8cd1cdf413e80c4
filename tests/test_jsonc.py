"""JSON with comments, changed in one place."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcpctl import jsonc

ENTRY = {"url": "https://mcp.example.org/mcp", "headers": {"Authorization": "Bearer ${X}"}}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


def without(text: str, *gone: str) -> str:
    for one in gone:
        assert one in text
        text = text.replace(one, "", 1)
    return text


@pytest.mark.parametrize(
    "text",
    [
        "", " \n", "// nothing yet", "{}", "{ /* none */ }", '{"a": 1}', '{"a": 1,}', "\ufeff{}",
        '{\r\n\t"a": {\r\n\t\t"b": [1, 2,],\r\n\t},\r\n}', '{\n  "mcpServers": {}\n}',
        '{\n  // c\n  "mcpServers": {\n    "x": {"a": "// no comment"} // note\n    /* last */\n  }\n}\n',
        '{"mcpServers": {"mcpctl": {"url": "old"}, "y": [1]}}',
    ],
)  # fmt: skip
def test_an_entry_is_put_in_once_and_everything_else_stays(text: str) -> None:
    wanted = jsonc.parse(text).value
    wanted.setdefault("mcpServers", {})["mcpctl"] = ENTRY
    new = jsonc.put(text, ["mcpServers", "mcpctl"], ENTRY)
    assert jsonc.parse(new).value == wanted
    assert jsonc.put(new, ["mcpServers", "mcpctl"], ENTRY) == new


def test_comments_order_and_indentation_stay_to_the_byte() -> None:
    text = '{\n    // mine\n    "b": 1, /* two */\n    "mcpServers": {\n        "x": {"url": "u"} // note\n    },\n}\n'
    new = jsonc.put(text, ["mcpServers", "mcpctl"], {"url": "v"})
    added = '\n        "mcpctl": {\n            "url": "v"\n        }'
    assert without(new, added).replace('"u"}, //', '"u"} //') == text


@given(PLAIN)
def test_any_json_is_read_as_json_reads_it(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, indent=3, ensure_ascii=False)):
        assert jsonc.parse(text).value == value
    if isinstance(value, dict):
        new = jsonc.put(json.dumps(value, indent=1), ["entry of ours"], ENTRY)
        assert json.loads(new) == {**value, "entry of ours": ENTRY}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "line 1: a key"), ('{"a":1 "b":2}', "a comma or }"), ("[1", "a comma or ]"),
        ('{"a":1}x', "behind its end"),
        ('{"a":1,\n"a":2}', "line 2: the key 'a' stands there twice"), ("nul", "a value"), ("{a:1}", "double quotes"),
        ('{"a":NaN}', "a value"), ("[" * 5000, "too deeply"), ("/* x", "a value"), ('{"a":1,,}', "a key"),
        ("[]", "it is no object"), ('{"mcpServers": null}', "mcpServers is no object"), ('{"a" 1}', "a colon"),
    ],
)  # fmt: skip
def test_what_is_broken_or_of_another_form_is_refused_with_its_line(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=r"^line \d+: ") as told:
        jsonc.put(text, ["mcpServers", "mcpctl"], ENTRY)
    assert fault in str(told.value)


@pytest.mark.parametrize(
    "text", ["{}", '{"inputs": []}', '{"inputs": [{"id": "q"}]}', '{\n "inputs": [\n  {"id": "t", "old": 1},\n ]\n}']
)
def test_an_item_of_a_list_is_known_by_its_id(text: str) -> None:
    new = jsonc.put_item(text, "inputs", {"id": "t", "password": True}, "id")
    items = jsonc.parse(new).value["inputs"]
    assert [one for one in items if one["id"] == "t"] == [{"id": "t", "password": True}]
    assert [one for one in items if one["id"] == "q"] == [one for one in [{"id": "q"}] if '"q"' in text]
    assert jsonc.put_item(new, "inputs", {"id": "t", "password": True}, "id") == new
