"""The express lane's quick reading of a plain call says what the careful one says."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcpctl.server import express
from mcpctl.server.express import Express

_CALL = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"t","arguments":{"query":"select 1"}}}'
_TURNS = [
    (b'"id":1', b'"id":%b' % number)
    for number in (
        b'"a"', b'"\\u0061"', b"1.0", b"1e2", b"-0", b"true", b"null", b"[]", b"9007199254740991", b"9007199254740992",
        b"-9007199254740992", b"123456789012345678901234567890", b'"' + b"x" * 201 + b'"', b"1,\"id\":2", b'1,"id":2.0',
        b'2.0,"id":1',
    )
] + [
    (b'"2.0"', b'"2.1"'), (b'"2.0"', b"2.0"), (b'"2.0"', b'"2.0","jsonrpc":"1"'), (b'"2.0"', b'"1","jsonrpc":"2.0"'),
    (b'"jsonrpc"', b'"\\u006asonrpc"'), (b"tools/call", b"tools/list"), (b"tools/call", b"tools\\/call"),
    (b'"name":"t"', b'"name":"t","name":"u"'), (b'"name":"t"', b'"name":1,"name":"u"'), (b'"name":"t"', b'"name":null'),
    (b'"name":"t",', b""), (b'"name":"t"', b'"name":"\xff"'), (b'"name":"t"', b'"name":"\\ud800"'),
    (b'"name":"t"', b'"name":"t","x":1'), (b'"name":"t"', b'"name":"t","_meta":{}'),
    *[
        (b'"name":"t"', b'"name":"t","_meta":%b' % meta)
        for meta in (
            b'{"progressToken":1}', b'{"progressToken":"a"}', b'{"progressToken":1.0}', b'{"progressToken":true}',
            b'{"progressToken":null}', b'{"progressToken":12345678901234567890123}', b'{"progressToken":1,"a":2}',
            b'{"traceparent":"00-a","tracestate":"b"}', b'{"traceparent":null,"baggage":[]}', b'{"tracestate":1}',
            b"null", b"[]", b'{},"_meta":{"a":1}', b'{"a":1},"_meta":{}', b'{"progressToken":[],"progressToken":1}',
        )
    ],
    (b'{"query":"select 1"}', b"null"),
    (b'{"query":"select 1"}', b"[]"), (b'{"query":"select 1"}', b"{}"), (b',"arguments":{"query":"select 1"}', b""),
    (b'{"query":"select 1"}', b'{"a":1.0,"b":[true,null,1e400]}'), (b'{"query":"select 1"}', b'{"a":1,"a":2.5}'),
    (b'{"query":"select 1"}', b'{"a":' + b"[" * 149 + b"]" * 149 + b"}"), (b'{"query":"select 1"}', b'{"\xff":1}'),
    (b'"params":{', b'"params":null,"params":{'), (b'"params":{', b'"params":{"name":"z"},"params":{'),
    (b'"id":1,', b""), (b'"id":1', b'"id":1,"more":2'), (b"}}}", b"}}"), (b"}}}", b"}}} "), (b"}}}", b"}}}x"),
    (b'{"jsonrpc"', b'\xef\xbb\xbf{"jsonrpc"'), (b'{"jsonrpc"', b'[{"jsonrpc"'), (_CALL, b""), (_CALL, b"[]"),
]  # fmt: skip


def _refuse(body: bytes) -> None:
    raise msgspec.DecodeError


def _both(body: bytes, monkeypatch: pytest.MonkeyPatch) -> list[express.Call | None]:
    found = [Express().read([], body, (False, ""))]
    with monkeypatch.context() as patched:
        patched.setattr(express, "_decode_plain", _refuse)
        found.append(Express().read([], body, (False, "")))
    return found


@pytest.mark.parametrize("turn", _TURNS, ids=lambda turn: repr(turn)[:60])
def test_both_readings_of_a_body_say_the_same(turn: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    quick, careful = _both(_CALL.replace(*turn), monkeypatch)
    assert quick == careful
    if quick is not None and careful is not None:
        assert [type(one) for one in (quick.id, quick.arguments)] == [
            type(one) for one in (careful.id, careful.arguments)
        ]


@given(
    st.dictionaries(
        st.sampled_from(["jsonrpc", "id", "method", "params", "x"]),
        st.sampled_from(["2.0", "tools/call"])
        | st.integers()
        | st.floats(allow_nan=False)
        | st.dictionaries(
            st.sampled_from(["name", "arguments", "_meta", "x"]),
            st.text(max_size=3)
            | st.none()
            | st.dictionaries(st.just("progressToken"), st.integers() | st.floats())
            | st.dictionaries(st.text(max_size=3), st.integers() | st.booleans()),
        ),
    )
)
def test_both_readings_say_the_same_of_anything(found: dict[str, object]) -> None:
    for one in (found, {**json.loads(_CALL), **found}):
        with pytest.MonkeyPatch.context() as patched:
            quick, careful = _both(json.dumps(one).encode(), patched)
        assert quick == careful


def test_a_plain_call_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(express, "_decode", _refuse)
    found = Express().read([], _CALL, (False, ""))
    assert found == express.Call(1, "t", {"query": "select 1"}, modern=False)
