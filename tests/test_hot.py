"""What goes the hot way behind the door, and what is known of a head."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from mcpctl.server import door, encoding
from mcpctl.server.exchange import Receive, Scope, Send
from mcpctl.server.hot import Apart, Asking, Found, Lane, Lanes, Reply
from site_of_mcpctl import Site, eventually
from visiting import answer, visited

MakeSite = Callable[..., Site]
_HEAD = b"POST /mcp HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nAuthorization: y\r\n\r\n"


class _App:
    """An app, and the reading of a config that it was made of, which counts what goes the hot way."""

    in_force = True
    looked = True

    def __init__(self) -> None:
        self.looks: list[bool] = []
        self.busy: dict[asyncio.Task[Any], str] = {}
        self.again_for: list[bytes] = []
        self.ordinary: list[bytes] = []
        self.gone = self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        body = b""
        while (message := await receive()).get("more_body", False) or message.get("body"):
            body += message["body"]
            if not message["more_body"]:
                break
        self.ordinary.append(body)
        scope["state"] |= {
            "found": Found(self, None, scope["headers"], 100, (False, "")),
            "generation": self,
            "known": "t",
        }
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def again(self, found: Found, text: str | None, body: bytes, asking: Asking) -> bool | str:
        self.looks.append(not self.looked)
        self.looked = True
        if body == b"sdk":
            return "its number"
        self.again_for.append(body if text is None else b"%b as %b" % (body, text.encode()))
        try:
            await asyncio.sleep(60 if body == b"long" else 0)
        finally:
            self.gone += asking.gone()
        return asking.write(Reply(401 if body == b"no" else 200, b"again", "1"))


def test_a_further_call_with_the_same_head_goes_the_hot_way_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door, "_AT_ONCE_SECONDS", 60.0)
    app = _App()

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def ask(*pieces: bytes, answers: int = 1) -> None:
                for piece in pieces:
                    wire.sendall(piece)
                for _ in range(answers):
                    answer(wire)

            def whole(body: bytes) -> bytes:
                return _HEAD % len(body) + body

            ask(whole(b"first"))
            ask(whole(b"second"))
            ask(whole(b"another length"))
            ask(_HEAD % 8, b"in ", b"drops")
            ask(whole(b"sdk"))
            ask(whole(b"one") + whole(b"two"), answers=2)
            ask(whole(b"x" * 101))
            ask(whole(b"head").replace(b"y\r\n", b"z\r\n"))
            ask(whole(b"no").replace(b"y\r\n", b"z\r\n"))
            ask(whole(b"anew").replace(b"y\r\n", b"z\r\n"))
            app.in_force = False
            ask(whole(b"reloaded").replace(b"y\r\n", b"z\r\n"))
            time.sleep(0.1)  # its head would be kept a moment after its answer has left
            app.in_force = True
            ask(whole(b"ours").replace(b"y\r\n", b"z\r\n"))
            ask(whole(b"close").replace(b"y\r\n", b"y\r\nConnection: close\r\n"))
            assert wire.recv(1) == b""
        with socket.create_connection(address, timeout=10) as wire:
            wire.sendall((_HEAD % 9).replace(b"y\r\n", b"z\r\n") + b"elsewhere")
            answer(wire)
            wire.sendall((_HEAD % 4).replace(b"y\r\n", b"z\r\n") + b"long")
            eventually(lambda: app.again_for[-1] == b"long")
        eventually(lambda: app.gone)

    asyncio.run(visited(app, visit, 20))
    assert app.again_for == [b"second", b"another length", b"in drops", b"no", b"anew", b"elsewhere", b"long"]
    others = [b"first", b"sdk", b"one", b"two", b"x" * 101, b"head", b"reloaded", b"ours", b"close"]
    assert app.ordinary == others


def test_what_does_not_come_at_once_goes_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_AT_ONCE_SECONDS", 0.0)
    app = _App()

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            for number in range(2):
                wire.sendall(_HEAD % 3 + b"on")
                eventually(lambda number=number: app.asked > number)
                wire.sendall(b"e")
                answer(wire)

    asyncio.run(visited(app, visit, 20))
    assert (app.ordinary, app.again_for) == ([b"one", b"one"], [])


def test_who_asks_nothing_more_is_sent_away_and_who_is_answered_is_not() -> None:
    app = _App()

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            began = time.monotonic()
            while time.monotonic() - began < 1.5:  # longer than anybody may be silent
                wire.sendall(_HEAD % 3 + b"one")
                answer(wire)
            wire.sendall(_HEAD % 3 + b"on")
            wire.sendall(b"e")
            answer(wire)
            assert wire.recv(1) == b""

    asyncio.run(visited(app, visit, 20, timeout_keep_alive=1))
    assert len(app.ordinary) == 1


def test_a_long_answer_stops_when_it_is_no_longer_wanted_and_waits_for_who_reads_it() -> None:
    class Long(_App):
        wanted = True

        async def again(self, found: Found, text: str | None, body: bytes, asking: Asking) -> bool | str:
            return await asking.write_long(Reply(200, bytes(8 << 20), "1"), lambda: self.wanted)

    app = Long()

    def visit(address: tuple[str, int]) -> None:
        for app.wanted in (True, False):
            with socket.create_connection(address, timeout=10) as wire:
                wire.sendall((_HEAD % 3).replace(b"y\r\n", b"%r\r\n" % app.wanted) + b"one")
                answer(wire)
                wire.sendall((_HEAD % 3).replace(b"y\r\n", b"%r\r\n" % app.wanted) + b"two")
                read = 0
                while read < 8 << 20 and (more := wire.recv(1 << 20)):
                    read += len(more)
                assert (read >= 8 << 20) is app.wanted

    asyncio.run(visited(app, visit, 20))


def test_a_connection_that_is_hung_up_while_a_long_answer_leaves_ends_behind_it() -> None:
    class HungUp(_App):
        async def again(self, found: Found, text: str | None, body: bytes, asking: Asking) -> bool | str:
            def wanted() -> bool:
                asking.shutdown()  # type: ignore[attr-defined]
                return True

            return await asking.write_long(Reply(200, bytes(1 << 20), "1"), wanted)

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            for _ in range(2):
                wire.sendall(_HEAD % 3 + b"one")
                answer(wire)
            assert wire.recv(1) == b""

    asyncio.run(visited(HungUp(), visit, 60, timeout_keep_alive=60))


def test_who_was_answered_just_now_is_not_sent_away_however_long_it_took() -> None:
    class Slow(_App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.sleep(1.5)  # until shortly before the second look
            await super().__call__(scope, receive, send)

        async def again(self, found: Found, text: str | None, body: bytes, asking: Asking) -> bool | str:
            await asyncio.sleep(1.35)
            return asking.write(Reply(200, b"again", "1"))

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            for _ in range(2):
                wire.sendall(_HEAD % 3 + b"one")
                answer(wire)
                wire.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    wire.recv(1)
                wire.settimeout(10)

    asyncio.run(visited(Slow(), visit, 0.8))


def test_the_headers_of_an_answer_are_the_same_in_both_lanes() -> None:
    for body in (b"", b"{}"):
        ordinary = b"".join(b"%b: %b\r\n" % header for header in encoding.headers(body, "abc"))
        assert Reply(200, body, "abc").lines() == ordinary


def test_what_a_head_has_said_is_not_shown() -> None:
    headers = [(b"authorization", b"Bearer mcp_secret")]
    assert "mcp_" not in repr(Found(_App(), None, headers, 9, (False, "")))


def test_each_request_that_comes_has_the_app_look_at_the_files_again() -> None:
    app = _App()

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=20) as one, socket.create_connection(address, timeout=20) as two:
            for wire in (one, one, two, one, two):
                wire.sendall(_HEAD.replace(b"y", b"Bearer t") % 3 + b"abc")
                answer(wire)

    asyncio.run(visited(app, visit, 20.0))
    assert app.looks == [True] * 4


def test_a_large_head_is_not_kept() -> None:
    app = _App()

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            for _ in range(2):
                wire.sendall((_HEAD % 3).replace(b"y\r\n", b"y" * 9000 + b"\r\n") + b"one")
                answer(wire)

    asyncio.run(visited(app, visit, 20))
    assert (app.ordinary, app.again_for) == ([b"one", b"one"], [])


def test_what_a_head_has_of_its_own_is_read_anew_each_time() -> None:
    app = _App()
    heads = [
        b"POST /mcp HTTP/1.1\r\nHost: x\r\nauthorization:\tBEARER  %b \r\nContent-Length:%d\t\r\nA: b\r\n\r\n",
        b"POST /mcp HTTP/1.1\r\nContent-Length: %d\r\nX-API-Key: %b\r\nHost: x\r\n\r\n",
    ]
    for head in heads:
        words = (lambda *found: found) if head.index(b"%b") < head.index(b"%d") else (lambda *found: found[::-1])
        apart = Apart.of(head % words(b"mcp_first", 3) + b"one")
        assert apart is not None
        lane = Lane(apart, Found(app, None, [], 9, (False, "")), app)
        for text, length in ((b"mcp_first", 3), (b"another1", 7654321), (b"x" * 128, 0)):
            whole = head % words(text, length)
            assert lane.read(whole + b"body") == (text.decode(), length, len(whole))
        changed = [
            (b"x" * 129, 3), (b"", 3), (b"_", 3), (b"two words", 3), (b"a.b", 3), (b"a\r\nHost: y", 3),
            (b"\xc3\xa9", 3), (b"a", 12345678), (b"a", -1),
        ]  # fmt: skip
        for text, length in changed:
            assert lane.read(head % words(text, length) + b"body") is None
        whole = head % words(b"a", 3)
        assert lane.read(whole.replace(b"Host: x", b"Host: y")) is None
        assert lane.read(whole.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")) is None
        assert lane.read(whole[:-1]) is None


def test_tokens_in_turn_go_the_hot_way_on_any_connection() -> None:
    app, head = _App(), _HEAD.replace(b"y\r\n", b"Bearer %b\r\n")

    def visit(address: tuple[str, int]) -> None:
        for _ in range(2):
            with socket.create_connection(address, timeout=10) as wire:
                for token in (b"one", b"two"):
                    wire.sendall(head % (4, token) + b"call")
                    answer(wire)

    asyncio.run(visited(app, visit, 20))
    assert (app.ordinary, app.again_for) == ([b"call"], [b"call as two", b"call as one", b"call as two"])


def _lane(name: str, app: _App, size: int = 0) -> tuple[Apart, Lane]:
    apart = Apart.of(b"POST /%b HTTP/1.1\r\nContent-Length: 1\r\nX: %b\r\n\r\n" % (name.encode(), b"x" * size))
    assert apart is not None
    return apart, Lane(apart, Found(app, None, [], 9, (False, "")), app)


def test_of_the_heads_that_are_known_the_one_asked_for_least_recently_goes() -> None:
    app, lanes = _App(), Lanes(3, 3000)
    known = {name: _lane(name, app) for name in "abcd"}
    for name in "abc":
        lanes.keep("::1", known[name][1])
        lanes.keep("::1", known[name][1])
    assert lanes.find("::1", known["a"][0]) is known["a"][1]
    lanes.keep("::1", known["d"][1])
    assert [name for name in "abcd" if lanes.find("::1", known[name][0])] == ["a", "c", "d"]
    large, lane = _lane("large", app, 2900)
    lanes.keep("::1", lane)
    assert [name for name in "abcd" if lanes.find("::1", known[name][0])] == ["d"]
    assert lanes.find("::1", large) is lane
    assert len(lanes) == 2


def test_a_head_is_known_for_who_sent_it_and_as_long_as_the_config_is_in_force() -> None:
    app, lanes = _App(), Lanes()
    apart, lane = _lane("a", app)
    lanes.keep("127.0.0.1", lane)
    assert lanes.find("127.0.0.2", apart) is None
    assert lanes.find("127.0.0.1", apart) is lane
    later = _App()
    lanes.keep("127.0.0.1", _lane("b", later)[1])
    assert lanes.find("127.0.0.1", apart) is None
    later.in_force = False
    assert lanes.find("127.0.0.1", _lane("b", later)[0]) is None
    assert len(lanes) == 0


def test_a_head_that_nobody_was_let_in_with_is_known_on_its_connection_alone() -> None:
    class Refused(_App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] |= {"found": Found(self, None, scope["headers"], 100), "generation": self}
            self.ordinary.append((await receive())["body"])
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"no"})

    app = Refused()

    def visit(address: tuple[str, int]) -> None:
        for word in (b"1", b"2"):
            with socket.create_connection(address, timeout=10) as wire:
                for body in (b"first", b"again"):
                    wire.sendall(_HEAD % 6 + body + word)
                    answer(wire)

    asyncio.run(visited(app, visit, 20))
    assert (app.ordinary, app.again_for) == ([b"first1", b"first2"], [b"again1", b"again2"])


def test_what_is_no_call_goes_on_the_ordinary_way_before_what_came_meanwhile() -> None:
    class Slow(_App):
        visits: ClassVar[list[object]] = []

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            self.visits.append(scope["state"].get("visited"))
            await super().__call__(scope, receive, send)

        async def again(self, found: Found, text: str | None, body: bytes, asking: Asking) -> bool | str:
            asking.know("t")
            await asyncio.sleep(0.2)
            return await super().again(found, text, body, asking)

    app = Slow()

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            wire.sendall(_HEAD % 3 + b"one")
            answer(wire)
            wire.sendall(_HEAD % 3 + b"sdk")
            time.sleep(0.1)
            wire.sendall(_HEAD % 3 + b"two")
            for _ in range(2):
                answer(wire)
            wire.sendall(_HEAD % 3 + b"hot")
            answer(wire)

    asyncio.run(visited(app, visit, 20))
    assert (app.ordinary, app.again_for) == ([b"one", b"sdk", b"two"], [b"hot"])
    assert app.visits == [None, (app, "its number"), None]


def test_what_comes_while_the_first_request_goes_the_hot_way_is_answered_after_it() -> None:
    class Slow(_App):
        async def again(self, found: Found, text: str | None, body: bytes, asking: Asking) -> bool | str:
            await asyncio.sleep(0.2)
            return await super().again(found, text, body, asking)

    app = Slow()

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            wire.sendall(_HEAD % 3 + b"one")
            answer(wire)
        with socket.create_connection(address, timeout=10) as wire:
            wire.sendall(_HEAD % 3 + b"two")
            time.sleep(0.1)
            wire.sendall(_HEAD % 5 + b"three")
            assert [answer(wire)[1] for _ in range(2)] == [b"again", b"ok"]

    asyncio.run(visited(app, visit, 20))
    assert (app.ordinary, app.again_for) == ([b"one", b"three"], [b"two"])


def test_a_head_of_a_config_that_is_no_longer_in_force_is_not_kept() -> None:
    class Reloaded(_App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            self.in_force = bool(self.ordinary)
            await super().__call__(scope, receive, send)

    app = Reloaded()

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            for body in (b"one", b"two", b"hot"):
                wire.sendall(_HEAD % 3 + body)
                answer(wire)

    asyncio.run(visited(app, visit, 20))
    assert (app.ordinary, app.again_for) == ([b"one", b"two"], [b"hot"])


def test_who_asks_the_hot_way_first_of_all_is_not_taken_for_silent() -> None:
    app = _App()

    def visit(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as wire:
            wire.sendall(_HEAD % 3 + b"one")
            answer(wire)
        with socket.create_connection(address, timeout=10) as wire:
            began = time.monotonic()
            while time.monotonic() - began < 1.5:
                wire.sendall(_HEAD % 3 + b"two")
                answer(wire)
                time.sleep(0.1)
            began = time.monotonic()
            assert wire.recv(1) == b""
            assert time.monotonic() - began > 0.3

    asyncio.run(visited(app, visit, 0.5))
    assert len(app.ordinary) == 1


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"x\r\nContent-Length: 1\r\nX-API-Key: a\r\nAuthorization: Bearer a\r\n\r\n",
        b"x\r\nContent-Length: 1\r\n",
    ],
)
def test_a_head_without_one_length_and_one_credential_at_most_is_never_known(head: bytes) -> None:
    assert Apart.of(head) is None
