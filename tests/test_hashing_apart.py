"""Passwords are checked by processes that stand back, which say what the library says, and leave nothing."""

from __future__ import annotations

import asyncio
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import argon2
import pytest
from argon2.exceptions import VerificationError, VerifyMismatchError

from mcpctl.errors import UnavailableError
from mcpctl.identity import passwords
from mcpctl.identity.hashing_apart import HashingApart
from mcpctl.identity.hashing_child import Share
from mcpctl.identity.password_queue import Passwords
from site_of_mcpctl import eventually

CHEAP = argon2.PasswordHasher(time_cost=2, memory_cost=2048, parallelism=4, hash_len=32, salt_len=16)
HORSE = "correct horse battery"


@pytest.fixture
def apart() -> Iterator[HashingApart]:
    found = HashingApart(CHEAP, (Share.EQUAL,))
    yield found
    found.close()


def process(apart: HashingApart, share: Share = Share.EQUAL) -> subprocess.Popen[bytes]:
    [found] = [child.process for child in apart.children if child.share is share]
    assert found is not None
    return found


def pid(apart: HashingApart, share: Share = Share.EQUAL) -> int:
    return process(apart, share).pid


@pytest.mark.parametrize("right", [b"", b"\x00\n\xff", HORSE.encode(), "é".encode(), b"x" * 1024])
def test_it_says_of_a_hash_what_the_library_says(apart: HashingApart, right: bytes) -> None:
    stored = CHEAP.hash(right)
    assert apart.verify(stored, right)
    for other in (right + b"x", b"other"):
        with pytest.raises(VerifyMismatchError):
            apart.verify(stored, other)


def test_the_profile_of_passwords_is_checked_by_the_queue() -> None:
    async def checked() -> list[bool]:
        queue = Passwords()
        try:
            stored = passwords.hashed(HORSE)
            return [await queue.matches(*one) for one in ((stored, HORSE), (stored, "wrong"), (None, HORSE))]
        finally:
            queue.close()

    assert asyncio.run(checked()) == [True, False, False]


def test_no_code_is_run_from_the_folder_that_the_server_was_started_in(
    apart: HashingApart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "argon2.py").write_text("open('was_run', 'w')\nraise SystemExit\n")
    monkeypatch.chdir(tmp_path)
    assert apart.verify(CHEAP.hash(HORSE), HORSE)
    assert not (tmp_path / "was_run").exists()


def test_nobodys_hash_has_the_profile_and_fits_nothing(apart: HashingApart) -> None:
    found = apart.nobodys()
    assert argon2.extract_parameters(found) == argon2.extract_parameters(CHEAP.hash("x"))
    assert found != apart.nobodys()
    for text in ("", "x", found):
        with pytest.raises(VerifyMismatchError):
            apart.verify(found, text)


def test_one_process_checks_all_of_them_and_a_dead_one_is_replaced(apart: HashingApart) -> None:
    stored = CHEAP.hash(HORSE)
    assert apart.children[0].process is None, "who never signs in costs no process"
    apart.verify(stored, HORSE)
    first = pid(apart)
    apart.verify(stored, HORSE)
    assert pid(apart) == first
    os.kill(first, 9)
    with pytest.raises(VerificationError, match="has ended"):
        apart.verify(stored, HORSE)
    assert apart.verify(stored, HORSE)
    assert pid(apart) != first


def test_what_cannot_be_checked_is_no_wrong_password(apart: HashingApart) -> None:
    huge = CHEAP.hash(HORSE).replace("m=2048", "m=4294967295")
    with pytest.raises(VerificationError, match=r"[Mm]emory"):
        apart.verify(huge, HORSE)
    with pytest.raises(VerificationError):
        apart.verify("no hash", HORSE)
    assert apart.verify(CHEAP.hash(HORSE), HORSE), "the process has outlived it"


def test_the_end_of_the_queue_ends_the_process_while_it_checks() -> None:
    slow = argon2.PasswordHasher(time_cost=2000, memory_cost=2048, parallelism=1)
    stored = CHEAP.hash(HORSE).replace("t=2,", "t=200000,")

    async def ended() -> int:
        apart = HashingApart(slow, (Share.EQUAL,))
        queue = Passwords(apart)
        asked = asyncio.ensure_future(queue.matches(stored, HORSE))
        async with asyncio.timeout(20):
            while apart.children[0].process is None:
                await asyncio.sleep(0.002)
        number = pid(apart)
        queue.close()
        with pytest.raises(UnavailableError):
            await asked
        with pytest.raises(VerificationError, match="stops"):
            apart.verify(stored, HORSE)
        return number

    begun = time.monotonic()
    number = asyncio.run(ended())
    assert time.monotonic() - begun < 15
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="SCHED_IDLE and /proc are Linux's")
def test_it_has_the_idle_time_of_one_processor_and_the_server_keeps_its_own_and_its_size() -> None:
    apart, before = HashingApart(CHEAP), (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0))
    stored, sizes, over = CHEAP.hash(HORSE), set[int](), threading.Event()
    try:
        apart.verify(stored, HORSE)
        idle = pid(apart, Share.IDLE)
        assert os.sched_getscheduler(idle) == os.SCHED_IDLE
        assert len(os.sched_getaffinity(idle)) == 1
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
        assert (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)) == before
        file = os.open("/proc/self/statm", os.O_RDONLY)

        def look() -> None:
            while not over.is_set():
                sizes.add(int(os.pread(file, 32, 0).split()[0]))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            for _ in range(20):
                apart.verify(stored, HORSE)
        finally:
            over.set()
            thread.join()
            os.close(file)
        assert (max(sizes) - min(sizes)) * os.sysconf("SC_PAGE_SIZE") < 1 << 20
    finally:
        apart.close()


@pytest.fixture
def starved() -> Iterator[HashingApart]:
    """One whose first process is stopped, as one of idle time is on a machine that is always busy."""
    found = HashingApart(CHEAP, (Share.EQUAL, Share.LOW), turn=30.0)
    assert found.verify(CHEAP.hash(HORSE), HORSE)
    found._turn = 0.05
    os.kill(pid(found), signal.SIGSTOP)
    yield found
    found.close()


def test_what_gets_no_idle_time_is_checked_with_the_lowest_priority(starved: HashingApart) -> None:
    stored = CHEAP.hash(HORSE)
    assert starved.verify(stored, HORSE)
    assert os.getpriority(os.PRIO_PROCESS, pid(starved, Share.LOW)) == 19
    with pytest.raises(VerifyMismatchError):
        starved.verify(stored, "other")


def test_it_works_where_more_than_a_thousand_descriptors_are_open() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1200
    if hard < wanted:
        pytest.skip(f"this machine lets a process have {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1030)]
    found = HashingApart(CHEAP, (Share.EQUAL, Share.LOW), turn=30.0)
    try:
        assert found.verify(CHEAP.hash(HORSE), HORSE)
    finally:
        found.close()
        for one in held:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_answer_that_comes_too_late_is_no_answer_to_what_is_asked_next(starved: HashingApart) -> None:
    """The first process would say "right" of the first password, while the third one is asked about."""
    stored, first = CHEAP.hash(HORSE), pid(starved)
    assert starved.verify(stored, HORSE)
    assert starved.verify(stored, HORSE), "at once, and by the other one: the first one owes an answer"
    os.kill(first, signal.SIGCONT)
    assert eventually(lambda: select.select([process(starved).stdout], [], [], 0)[0])
    os.kill(pid(starved, Share.LOW), signal.SIGSTOP)
    starved._turn = 30.0
    with pytest.raises(VerifyMismatchError):
        starved.verify(stored, "other")
    assert pid(starved) == first


def test_one_that_dies_owing_an_answer_is_started_again(starved: HashingApart) -> None:
    stored, first = CHEAP.hash(HORSE), pid(starved)
    assert starved.verify(stored, HORSE)
    os.kill(first, signal.SIGKILL)
    process(starved).wait(10)
    starved._turn = 30.0
    os.kill(pid(starved, Share.LOW), signal.SIGSTOP)
    assert starved.verify(stored, HORSE)
    assert pid(starved) != first


def test_none_of_several_is_left_when_it_is_closed(starved: HashingApart) -> None:
    assert starved.verify(CHEAP.hash(HORSE), HORSE)
    both = [process(starved), process(starved, Share.LOW)]
    starved.close()
    assert [one.returncode for one in both] == [-signal.SIGKILL] * 2


def test_the_process_ends_with_the_pipe_to_it(apart: HashingApart) -> None:
    apart.verify(CHEAP.hash(HORSE), HORSE)
    child = process(apart)
    assert child.stdin is not None
    child.stdin.close()
    assert eventually(lambda: child.poll() is not None)
    assert child.returncode == 0
