"""Hundreds of hostile requests, from tests/corpus/requests.yaml: each gets exactly the answers that it is due, none of
them tells a token, a path or a fault of ours, and whoever asks honestly meanwhile is served."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable

import pytest

import attacked
from attacked import Address, Case
from site_of_mcpctl import Shop, Site

MakeSite = Callable[..., Site]
ENOUGH = 120
AT_ONCE = 40


def test_every_hostile_request_gets_the_answers_that_it_is_due_and_no_other(
    make_site: MakeSite, newest_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """All of them on connections of their own, some at once: many wait until the server loses its patience."""
    at = make_site(newest_shop)
    names = attacked.credentials(at)
    secrets = [names[one] for one in ("SECRET", "OTHER-SECRET")] + [str(at.folder), "Traceback", "echoed"]

    async def all_of_them() -> tuple[list[str], int]:
        async with attacked.served(at) as address:
            cases = list(attacked.cases("{}:{}".format(*address), names))
            turn = asyncio.Semaphore(AT_ONCE)

            async def one(case: Case) -> list[str]:
                async with turn:
                    return await _faults(address, case, secrets)

            found = await asyncio.gather(*(one(case) for case in cases))
            honest = next(case for case in cases if case.want == ([200],))
            found.append(await _faults(address, honest, secrets))
            return [fault for faults in found for fault in faults], len({case.send for case in cases})

    with caplog.at_level(logging.WARNING):
        faults, many = asyncio.run(all_of_them())
    assert not faults, "\n".join(faults)
    assert many >= ENOUGH
    said = [record.getMessage() for record in caplog.records if record.name.startswith("mcpctl")]
    assert [text for text in said if not text.startswith("Unauthorized: ")] == []
    log = (at.folder / "audit.jsonl").read_text(encoding="utf-8")
    assert not [secret for secret in secrets[:2] if secret in log]


async def _faults(address: Address, case: Case, secrets: list[str]) -> list[str]:
    """What is not as it should be with the answers to a case."""
    try:
        async with asyncio.timeout(30):
            data = await attacked.converse(address, case.send)
        found = attacked.answers(data)
    except (TimeoutError, AssertionError, ValueError) as problem:
        return [f"{case.name}: {problem!r}"]
    told = [secret for secret in secrets if secret.encode() in data]
    statuses = [status for status, _, _ in found]
    faults = [] if statuses in case.want else [f"{case.name}: answered {statuses}, not {case.want}: {data[:300]!r}"]
    faults += [f"{case.name}: tells {told}"] * bool(told)
    for status, head, body in found:
        if not body or (status == 200) == (b'"error"' in body):
            faults.append(f"{case.name}: {status} with the body {body[:200]!r}")
        elif status == 401 and _message(body) != UNAUTHORIZED:
            faults.append(f"{case.name}: another 401: {body!r}")
        if b"x-request-id: " not in head or b"cache-control: no-store" not in head:
            faults.append(f"{case.name}: {head!r}")
    return faults


def _message(body: bytes) -> str:
    return str(json.loads(body)["error"]["message"])


UNAUTHORIZED = "Unauthorized: a valid token is needed"
