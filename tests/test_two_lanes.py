"""All lanes answer alike, byte for byte, and as it is written down in tests/corpus: not one of those answers was
taken from a lane. What the hot lane takes is asked through it once more."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from uvicorn.protocols.http.flow_control import FlowControl

import corpus
import site_of_mcpctl as site
from corpus import Entry, Expected
from mcpctl import __version__, config
from mcpctl.cli import init
from mcpctl.config_keys import Settings
from mcpctl.identity import tokens, users
from mcpctl.postgres.embedded import Binaries
from mcpctl.server import hot, run
from mcpctl.server.hot import Found
from mcpctl.server.http import Http
from mcpctl.server.parts import running
from pg import oldest_and_newest

T = TypeVar("T")
ENTRIES = corpus.load()
ENOUGH, ENOUGH_EXPRESS = 220, 160
_CALL = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "whoami", "arguments": {}}}
_WORDS = st.sampled_from(["name", "arguments", "_meta", "query", "limit", "uri", "protocolVersion"])
_CONFIG = """\
server: {{port: 8080}}
databases:
  shop: {{host: "{host}", port: {port}, dbname: shop, user: shop_reader, password_file: shop.password, default: true,
         description: a small shop}}
  narrow: {{host: "{host}", port: {port}, dbname: shop, user: shop_reader, password_file: shop.password,
           limits: {{max_rows: 5, max_bytes: 200, statement_timeout: 500ms}}}}
limits: {{request_bytes: 256KiB, rate: 100000, burst: 100000}}
"""
_MORE = """
CREATE SCHEMA vault;
CREATE TABLE vault.payroll (person text, salary int);
GRANT USAGE ON SCHEMA vault TO shop_reader;
CREATE TABLE letter (id int, body text);
CREATE TABLE nothing ();
CREATE TYPE pair AS (a int, b text);
CREATE DOMAIN percent AS int CHECK (VALUE BETWEEN 0 AND 100);
CREATE TYPE mood AS ENUM ('fine', 'so so', 'say "hi", \\');
CREATE FUNCTION complain() RETURNS int LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'no tea' USING ERRCODE = 'P0042', DETAIL = 'The pot is empty.', HINT = 'Make some.'; END $$;
CREATE PROCEDURE greet(INOUT word text) LANGUAGE plpgsql AS $$ BEGIN word := 'hello ' || word; END $$;
REVOKE TEMPORARY ON DATABASE shop FROM PUBLIC;
"""


@dataclass(frozen=True)
class Reply:
    """An HTTP answer as it left the app."""

    status: int
    content_type: bytes | None
    body: bytes


@dataclass
class _Asking:
    """Who asks on the hot lane, and what was written to him."""

    answering: asyncio.Task[None] | None
    written: list[hot.Reply] = field(default_factory=list)
    flow: FlowControl = field(default_factory=lambda: FlowControl(asyncio.Transport()))

    def gone(self) -> bool:
        return False

    def know(self, token: str | None) -> None:
        pass

    def write(self, reply: hot.Reply) -> bool:
        self.written.append(reply)
        return True

    async def write_long(self, reply: hot.Reply, wanted: object) -> bool:
        return self.write(reply)


@dataclass
class Lanes:
    """The app twice over one core: with the express lane, and with the SDK alone."""

    loop: asyncio.AbstractEventLoop
    both: Http
    sdk: Http
    major: int
    token: str
    facts: dict[str, str]
    hot: int = 0
    _asked: dict[str, tuple[Reply, Reply, str]] = field(default_factory=dict)

    def ask(self, entry: Entry) -> tuple[Reply, Reply, str]:
        """(the answer of the app with both lanes, that of the SDK alone, which lane answered the first)."""
        if entry.title not in self._asked:
            self._asked[entry.title] = _on(self.loop, self._ask(entry))
        return self._asked[entry.title]

    async def _ask(self, entry: Entry) -> tuple[Reply, Reply, str]:
        express, sdk = self.both.answered_express, self.both.answered_sdk
        first = await self._post(self.both, entry)
        lane = "sdk" if self.both.answered_sdk > sdk else "neither"
        if self.both.answered_express > express:
            lane = "express"
        return first, await self._post(self.sdk, entry), lane

    async def _again(self, found: Found | None, body: bytes) -> tuple[int, bytes] | None:
        """The answer of the hot lane to a further call with the same head, where it takes it."""
        if found is None or self.both.read(found, body) is None:
            return None
        counted = self.both.answered_express
        asking = _Asking(asyncio.create_task(asyncio.sleep(0)))
        assert await self.both.again(found, self.token, body, asking) is True
        self.both.answered_express = counted  # of the first calls alone
        self.hot += 1
        [reply] = asking.written
        return reply.status, corpus.mask(reply.body)

    async def _post(self, app: Http, entry: Entry) -> Reply:
        request = entry.request()
        headers = [(b"host", b"127.0.0.1:8080"), (b"authorization", b"Bearer " + self.token.encode()), *request.headers]
        scope: dict[str, Any] = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http",
            "method": request.method, "path": request.path, "raw_path": request.path.encode(), "query_string": b"",
            "root_path": "", "headers": headers, "client": ("127.0.0.1", 50000), "server": ("127.0.0.1", 8080),
            "state": {},
        }  # fmt: skip
        given = False
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            nonlocal given
            if given:
                await asyncio.Event().wait()
            given = True
            return {"type": "http.request", "body": request.body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        async with asyncio.timeout(30):
            await app(scope, receive, send)
        types = [value for key, value in sent[0]["headers"] if key == b"content-type"]
        body = b"".join(message.get("body", b"") for message in sent[1:])
        if (again := await self._again(scope["state"].get("found"), request.body)) is not None:
            assert again == (sent[0]["status"], corpus.mask(body))
        return Reply(sent[0]["status"], types[0] if types else None, body)


def _on(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(work, loop).result(60)


@pytest.fixture(scope="session", params=oldest_and_newest(), ids=str)
def lanes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lanes]:
    """Both apps over a PostgreSQL with the shop, in a thread's event loop."""
    binaries: Binaries = request.param
    with site.shop(binaries, settings={"timezone": "UTC"}) as shop:
        settings, token, facts = _files(shop, tmp_path_factory.mktemp("two-lanes"))
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        done: asyncio.Event = asyncio.Event()
        ready: asyncio.Future[tuple[Http, Http]] = loop.create_future()

        async def live() -> None:
            async with _apps(run.Listening(settings)) as apps:
                ready.set_result(apps)
                await done.wait()

        async def wait() -> tuple[Http, Http]:
            return await ready

        try:
            living = asyncio.run_coroutine_threadsafe(live(), loop)
            living.add_done_callback(lambda ended: ended.exception() and loop.stop())
            both, sdk = _on(loop, wait())
            yield Lanes(loop, both, sdk, binaries.version[0], token, facts)
            loop.call_soon_threadsafe(done.set)
            living.result(30)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


@contextlib.asynccontextmanager
async def _apps(listening: run.Listening) -> AsyncIterator[tuple[Http, Http]]:
    async with (
        running(listening.settings, files=True) as core,
        run._app(listening, core) as both,
        run._app(listening, core) as sdk,
    ):
        yield both, Http(replace(sdk._parts, express=None))


def _files(shop: site.Shop, folder: Path) -> tuple[Settings, str, dict[str, str]]:
    """mcpctl's own files beside a shop: (settings, a token, what the corpus may say of it)."""
    with shop.admin() as connection:
        connection.execute(_MORE)
    init.make(folder, _CONFIG.format(host=shop.cluster.host, port=shop.cluster.port))
    secret = folder / "shop.password"
    secret.touch(0o600)
    secret.write_text(site.PASSWORD)
    now = tokens.utcnow()
    users.add(users.user_file(folder / "users.yaml"), "ada", None, now)
    ends = now + datetime.timedelta(days=1)
    _, token = tokens.add(tokens.token_file(folder / "tokens.yaml"), tokens.Wanted(user="ada", expires_at=ends), now)
    facts = {"VERSION": __version__, "TOKEN": token.split("_")[1], "EXPIRES": ends.isoformat().replace("+00:00", "Z")}
    return config.load(folder / "config.yaml", {}), token, facts


# -- the tests -----------------------------------------------------------------------------------------------------


_NOT_ASKED = ("arguments", "broken", "protocol")
"""Of which PostgreSQL hears little or nothing."""


@pytest.mark.parametrize(
    "entry",
    [pytest.param(entry, id=entry.title, marks=[pytest.mark.newest] if entry.file in _NOT_ASKED else [])
     for entry in ENTRIES],
)  # fmt: skip
def test_both_lanes_answer_as_it_is_written_down(lanes: Lanes, entry: Entry) -> None:
    with_express, sdk_alone, lane = lanes.ask(entry)
    expected = entry.expected(lanes.major, lanes.facts)
    assert _faults(with_express, expected) == [], "the app with both lanes"
    assert _faults(sdk_alone, expected) == [], "the SDK alone"
    assert corpus.mask(with_express.body) == corpus.mask(sdk_alone.body)
    assert lane == entry.lane


def _faults(reply: Reply, expected: Expected) -> list[str]:
    """What is not as it was written down."""
    if reply.status != expected.status or reply.content_type != expected.content_type:
        found, wanted = (reply.status, reply.content_type), (expected.status, expected.content_type)
        return [f"{found}, not {wanted}: {reply.body[:2000]!r}"]
    if expected.body is None:
        return _error_faults(reply.body, expected)
    body, right = corpus.mask(reply.body), corpus.mask(expected.body)
    alike = json.loads(body) == json.loads(right) if expected.as_json else body == right
    return [] if alike else [f"got    {_shown(body)}", f"wanted {_shown(right)}"]


def _shown(body: bytes) -> str:
    return body[:4000].decode(errors="replace")


def _error_faults(body: bytes, expected: Expected) -> list[str]:
    """The same for a JSON-RPC error whose text nobody has specified."""
    try:
        found = json.loads(body)
        code = found["error"]["code"]
        shape = found.keys() == {"jsonrpc", "id", "error"} and found["jsonrpc"] == "2.0" and found["id"] == expected.id
    except (ValueError, KeyError, TypeError):
        return [f"no JSON-RPC error: {body[:2000]!r}"]
    return [] if shape and code == (expected.code or code) else [repr(found)]


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["2.0", "whoami"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner, max_size=5),
    max_leaves=12,
)
_MESSAGES = st.dictionaries(st.sampled_from(["jsonrpc", "id", "method", "params"]), _VALUES, max_size=4)


@pytest.mark.newest
@hypothesis_settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    st.binary(max_size=60)
    | st.builds(
        lambda fields, more: corpus.dumps({**fields, **more}).encode(errors="replace"), st.just(_CALL), _MESSAGES
    )
    | _VALUES.map(lambda value: corpus.dumps({**_CALL, "params": value}).encode(errors="replace")),
    st.sampled_from([corpus.MODERN, corpus.LEGACY, "none", "x"]),
)
def test_any_body_is_answered_alike_by_both_lanes_and_never_with_a_fault_of_ours(
    lanes: Lanes, body: bytes, era: str
) -> None:
    entry = Entry("any", "any", era, {"bytes": body.decode("latin-1"), "json": None})
    counted = lanes.both.answered_express
    both, alone, _ = _on(lanes.loop, lanes._ask(entry))
    lanes.both.answered_express = counted  # of the corpus alone
    assert both.status < 500, both.body
    assert b"Internal error" not in both.body
    assert (both.status, corpus.mask(both.body)) == (alone.status, corpus.mask(alone.body))


@pytest.mark.newest
def test_the_express_lane_answers_most_of_the_corpus_itself(lanes: Lanes) -> None:
    by_express = [entry for entry in ENTRIES if lanes.ask(entry)[2] == "express"]
    assert len({(entry.file, entry.name) for entry in by_express}) >= ENOUGH_EXPRESS
    assert lanes.hot >= len(by_express)
    assert (lanes.both.answered_express, lanes.sdk.answered_express) == (len(by_express), 0)


def test_the_corpus_is_large_enough() -> None:
    assert len({(entry.file, entry.name) for entry in ENTRIES}) >= ENOUGH
    assert len({(entry.file, entry.name) for entry in ENTRIES if entry.lane == "express"}) >= ENOUGH_EXPRESS
