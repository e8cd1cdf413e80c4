"""Passwords of users: which may be one, how they are kept, and what it costs to ask for one."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import argon2
import pytest

import timing
from mcpctl.errors import ConfigError, LimitedError, NotFoundError, UnavailableError, UsageError
from mcpctl.identity import passwords, tokens, users
from mcpctl.identity.password_queue import PATIENCE, Passwords

NOW = datetime(2026, 11, 20, 13, 5, 10, tzinfo=UTC)
HORSE = "correct horse battery"
KEPT = "$argon2id$v=19$m=65536,t=3,p=4$bm9ib2R5J3Mgc2FsdCEhIQ$Zqg1UhU4Q3h2mS0vT0bq2v2m0c1d9Qk7o0c7G4lJ1nE"


def in_a_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """The test, run in an event loop of its own."""

    @functools.wraps(test)
    def run(**given: Any) -> None:
        asyncio.run(test(**given))

    return run


def cheap(memory: int = 8) -> argon2.PasswordHasher:
    """A profile that costs next to nothing, or with more KiB a little."""
    return argon2.PasswordHasher(time_cost=1, memory_cost=memory, parallelism=1, hash_len=32, salt_len=16)


@asynccontextmanager
async def queue(hasher: argon2.PasswordHasher | None = None, **more: Any) -> AsyncIterator[Passwords]:
    """The queue, with a hasher in this process."""
    found = Passwords(hasher or cheap(), **more)
    try:
        yield found
    finally:
        found.close()


# -- what may be a password -------------------------------------------------------------------------------------------


def test_the_profile_is_the_second_recommended_one_of_rfc_9106() -> None:
    assert argon2.extract_parameters(passwords.hashed(HORSE)) == argon2.profiles.RFC_9106_LOW_MEMORY


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("fourteen chars", "has 14 characters, and needs 15"),
        ("e\u0301" * 14, "has 14 characters"),
        ("x\u0301" * 800, "longer than 1024 bytes"),
        ("correct horse battery" * 49, "longer than 1024 bytes"),
        ("correct horse battery" * 50_000, "longer than 1024 bytes"),
        ("correct horse battery\n", "a control character"),
        ("correct\x00horse battery", "a control character"),
        ("correct horse battery \ud83d", "half a character"),
        ("correct horse battery \u0378", "a character that Unicode does not have"),
        ("my " + tokens.signed("mcp_1hrspjl1_" + "Zy" * 21 + "x"), "holds a token"),
        ("aaaaaaaaaaaaaaaaaaaa", "again and again"),
        ("barbara-of-sales", "the user's name"),
        ("Barbara-Of-Sales123", "the user's name"),
    ],
)
def test_what_may_not_be_a_password_is_refused_and_not_repeated(text: str, why: str) -> None:
    with pytest.raises(UsageError) as refused:
        passwords.check_new(text, "barbara-of-sales")
    assert why in refused.value.message
    assert refused.value.hint
    assert not text or text not in f"{refused.value.message} {refused.value.hint}"


@pytest.mark.parametrize(
    "text",
    [
        HORSE,
        "ein Schlüssel für Öl",
        "пароль из четырёх слов",
        "  leading and trailing  ",
        "👩‍🚀 goes to the moon",
        "x" * 10 + "abcde",
    ],
)
def test_any_text_of_fifteen_characters_is_a_password(text: str) -> None:
    passwords.check_new(text, "bob")
    hasher = cheap()
    assert hasher.verify(passwords.hashed(text, hasher), passwords.normal(text) or b"")


def test_no_character_is_made_of_twice_as_many_as_it_has_bytes() -> None:
    """So a text of more than twice as many characters as a password may have bytes is none in any form."""
    every = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert max(len(unicodedata.normalize("NFD", one)) / len(one.encode()) for one in every) < 2


@in_a_loop
async def test_the_longest_password_fits_in_whatever_form_it_is_typed() -> None:
    text = "of words: " + "\u01d6" * 507  # two bytes each, of three characters
    assert len(text.encode()) == passwords.MOST
    passwords.check_new(unicodedata.normalize("NFD", text), "bob")
    async with queue() as found:
        stored = passwords.hashed(unicodedata.normalize("NFD", text), cheap())
        assert await found.matches(stored, text)
        assert await found.matches(stored, unicodedata.normalize("NFD", text))
        assert not await found.matches(stored, text[:-1])
    with pytest.raises(UsageError, match="longer than 1024 bytes"):
        passwords.check_new(unicodedata.normalize("NFD", text + "x"), "bob")


# -- the user file ----------------------------------------------------------------------------------------------------


def people(tmp_path: Path, entry: str = "") -> Any:
    path = tmp_path / "users.yaml"
    path.touch(0o600)
    path.write_text(f"version: 1\nusers:\n  alice: {{created_at: '2026-11-20T13:05:10Z'{entry}}}\n")
    return users.user_file(path)


def test_a_password_is_kept_as_its_hash_and_shown_nowhere(tmp_path: Path) -> None:
    file, kept = people(tmp_path, ", note: sales"), passwords.hashed(HORSE)
    before = file.current()["alice"]
    assert users.set_password(file, "alice", kept) == (file.current()["alice"], True)
    found = users.user_file(file.path).current()["alice"]
    assert (found.password, found.note) == (kept, "sales")
    assert kept not in repr(found)
    assert "password" not in repr(found)
    assert found != before
    assert found.narrowed(before, lambda old, new: False) == {}, "what tokens have open goes on"
    assert users.set_password(file, "alice", None) == (before, True)
    assert users.set_password(file, "alice", None) == (before, False)
    assert b"argon2" not in file.path.read_bytes()
    with pytest.raises(NotFoundError):
        users.set_password(file, "bob", kept)


def test_the_next_user_of_a_name_has_no_password(tmp_path: Path) -> None:
    file = people(tmp_path, f", password: '{KEPT}'")
    users.remove(file, "alice")
    assert users.add(file, "alice", None, NOW).password is None


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (KEPT.replace("t=3", "t=4"), "t=4, m=65536, p=4, 16+32 bytes; only t=3, m=65536, p=4"),
        (KEPT.replace("m=65536", "m=4194304"), "t=3, m=4194304"),
        (KEPT.replace("m=65536,t=3,p=4", "m=8,t=1,p=1"), "t=1, m=8, p=1"),
        (KEPT.replace("p=4", "p=1"), "p=1"),
        (KEPT + "AAAA", "16+35 bytes"),
        (KEPT.replace("argon2id", "argon2i"), "is not of the type Argon2id"),
        (KEPT.replace("argon2id", "argon2d"), "is not of the type Argon2id"),
        (HORSE, "is not an Argon2id hash"),
        ("$2b$12$" + "a" * 53, "is not an Argon2id hash"),
        ("", "is not an Argon2id hash"),
        (True, "is not an Argon2id hash"),
        (17, "is not an Argon2id hash"),
        ([KEPT], "is not an Argon2id hash"),
    ],
)
def test_a_hash_of_another_cost_or_kind_is_refused_on_load(value: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        people(tmp_path, f", password: {json.dumps(value)}").current()
    assert f"{tmp_path}/users.yaml:3: alice: password: " in refused.value.message
    assert why in refused.value.message
    assert "`mcpctl user passwd`" in refused.value.message
    assert HORSE not in refused.value.message
    assert people(tmp_path, f", password: {json.dumps(KEPT)}").current()["alice"].password == KEPT


# -- the queue --------------------------------------------------------------------------------------------------------


class Held(argon2.PasswordHasher):
    """Checks nothing before it is let: how many it checks at once, and how many in all."""

    def __init__(self) -> None:
        super().__init__(time_cost=1, memory_cost=8, parallelism=1)
        self.let, self.begun = threading.Event(), threading.Event()
        self.now = self.most = self.all = 0

    def verify(self, *given: Any) -> Any:
        self.now += 1
        self.all += 1
        self.most = max(self.most, self.now)
        self.begun.set()
        assert self.let.wait(30)
        try:
            return super().verify(*given)
        finally:
            self.now -= 1


async def waited(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.002)


@in_a_loop
async def test_the_right_password_matches_and_no_other() -> None:
    stored = passwords.hashed(HORSE, cheap())
    async with queue() as found:
        assert await found.matches(stored, HORSE)
        for text in (HORSE.upper(), HORSE + " ", HORSE[:-1], "", "\x00", "\ud83d", HORSE * 50_000):
            assert not await found.matches(stored, text), text[:40]
            assert not await found.matches(None, text)
        assert not await found.matches(None, HORSE)


class Gullible(argon2.PasswordHasher):
    """Finds that everything matches, as if somebody had guessed what was hashed for nobody."""

    def verify(self, *given: Any) -> Any:
        return True


@in_a_loop
async def test_nothing_matches_where_nothing_is_stored() -> None:
    async with queue(Gullible()) as found:
        assert await found.matches(KEPT, HORSE)
        assert not await found.matches(None, HORSE)


@in_a_loop
async def test_a_text_that_is_nobodys_password_is_not_hashed_whoever_is_named() -> None:
    hasher = Held()
    async with queue(hasher) as found:
        for stored in (KEPT, None):
            for text in (HORSE * 50_000, "x" * 1025, "\ud83d"):
                assert not await found.matches(stored, text)
    assert hasher.all == 0


@in_a_loop
async def test_one_is_checked_at_a_time_and_what_would_wait_too_long_is_refused() -> None:
    hasher = Held()
    async with queue(hasher, clock=lambda: 0.0) as found:
        asked = [asyncio.ensure_future(found.matches(None, HORSE)) for _ in range(60)]
        await waited(lambda: sum(one.done() for one in asked) == 20)
        refused = [one.exception() for one in asked if one.done()]
        assert {type(one) for one in refused} == {LimitedError}
        assert {one.status for one in refused} == {429}
        assert {one.retry_after for one in refused} == {int(PATIENCE)}
        assert found.waiting == 40, "a quarter of a second each, until it is known better"
        hasher.let.set()
        assert [await one for one in asked if not isinstance(one.done() and one.exception(), LimitedError)] == [
            False
        ] * 40
        assert (hasher.most, hasher.all, found.waiting) == (1, 40, 0)
        assert not await found.matches(None, HORSE), "there is room again"


@in_a_loop
async def test_a_machine_that_is_slow_or_busy_makes_the_queue_shorter() -> None:
    hasher, times = Held(), [0.0]
    async with queue(hasher, clock=lambda: times[0]) as found:
        first = asyncio.ensure_future(found.matches(None, HORSE))
        await waited(hasher.begun.is_set)
        times[0] = 4.0
        second = asyncio.ensure_future(found.matches(None, HORSE))
        await waited(lambda: found.waiting == 2)
        with pytest.raises(LimitedError) as refused:  # two before it, and the one at work has taken four seconds
            await found.matches(None, HORSE)
        assert refused.value.retry_after == 8
        hasher.let.set()
        assert [await first, await second] == [False, False]


@in_a_loop
async def test_who_comes_alone_is_let_in_however_long_the_last_one_took() -> None:
    hasher, times = Held(), [0.0]
    async with queue(hasher, clock=lambda: times[0]) as found:
        first = asyncio.ensure_future(found.matches(None, HORSE))
        await waited(hasher.begun.is_set)
        times[0] = 100.0
        hasher.let.set()
        assert not await first
        asked = [asyncio.ensure_future(found.matches(None, HORSE)) for _ in range(2)]
        assert not await asked[0]
        with pytest.raises(LimitedError):
            await asked[1]


@in_a_loop
async def test_who_has_waited_too_long_after_all_is_refused_without_a_hash() -> None:
    hasher, times = Held(), [0.0]
    async with queue(hasher, clock=lambda: times[0]) as found:
        first = asyncio.ensure_future(found.matches(None, HORSE))
        await waited(hasher.begun.is_set)
        second = asyncio.ensure_future(found.matches(None, HORSE))
        await waited(lambda: found.waiting == 2)
        times[0] = PATIENCE + 1
        hasher.let.set()
        assert not await first
        with pytest.raises(LimitedError) as refused:
            await second
        assert 1 <= refused.value.retry_after <= PATIENCE
        assert (hasher.all, found.waiting) == (1, 0)


@in_a_loop
async def test_who_goes_away_while_waiting_costs_no_hash() -> None:
    hasher = Held()
    async with queue(hasher) as found:
        asked = [asyncio.ensure_future(found.matches(None, HORSE)) for _ in range(10)]
        await waited(hasher.begun.is_set)
        for one in asked[1:]:
            one.cancel()
        await asyncio.gather(*asked[1:], return_exceptions=True)
        assert found.waiting == 1
        hasher.let.set()
        assert not await asked[0]
        assert not await found.matches(None, HORSE)
        assert hasher.all == 2


@in_a_loop
async def test_the_event_loop_goes_on_while_a_password_is_checked() -> None:
    hasher = Held()
    async with queue(hasher) as found:
        asked = asyncio.ensure_future(found.matches(None, HORSE))
        await waited(hasher.begun.is_set)  # this itself runs on the loop
        assert not asked.done()
        hasher.let.set()
        assert not await asked


@in_a_loop
async def test_no_memory_for_a_hash_is_told_as_a_fault_of_ours_and_not_as_a_wrong_password() -> None:
    async with queue() as found:
        huge = KEPT.replace("m=65536", "m=4294967295")
        with pytest.raises(UnavailableError, match="could not be checked"):
            await found.matches(huge, HORSE)


# -- the time it takes ------------------------------------------------------------------------------------------------


@in_a_loop
async def test_a_wrong_password_takes_as_long_as_a_user_who_is_not_there() -> None:
    hasher, wrong = cheap(2048), "incorrect horse battery"
    stored = passwords.hashed(HORSE, hasher)
    async with queue(hasher) as found:
        await found.matches(None, wrong)
        pairs = await timing.tried(lambda: found.matches(stored, wrong), lambda: found.matches(None, wrong))
    assert abs(timing.difference(pairs)) < timing.SAME


@in_a_loop
async def test_the_same_test_finds_five_percent_more() -> None:
    hasher, wrong = cheap(2048), "incorrect horse battery"
    stored = passwords.hashed(HORSE, cheap(2048 * 105 // 100))
    async with queue(hasher) as found:
        await found.matches(None, wrong)
        pairs = await timing.tried(lambda: found.matches(stored, wrong), lambda: found.matches(None, wrong))
    assert timing.difference(pairs) > timing.SAME


def test_what_a_try_took_is_told_although_the_machine_becomes_slower_and_others_hold_some_up() -> None:
    pairs = [(1.05 * slow * late, slow) for slow in (1.0, 3.0) for late in [1.0] * 90 + [50.0] * 10]
    assert timing.difference(pairs) == pytest.approx(0.05)
