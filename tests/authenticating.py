"""An authenticator with its files: whom it lets in, and what it was seen to do."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

from mcpctl import private_file
from mcpctl.config_keys import Limits
from mcpctl.errors import UnauthorizedError
from mcpctl.identity import authenticate, tokens, users
from mcpctl.identity.authenticate import Authenticator
from mcpctl.identity.principal import Principal
from mcpctl.identity.tokens import Token, Wanted
from mcpctl.policy.limits import Limiter
from mcpctl.shared_counters import Counters

T = TypeVar("T")
START = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
FAILED = 10
HERE, THERE = "192.0.2.1", "192.0.2.2"


class House:
    """An authenticator with its files, a clock that stands still, and a count of hashes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = START
        self.hashes = 0
        self.ended: list[dict[str, str]] = []
        self.tokens = tokens.token_file(folder / "tokens.yaml")
        self.users = users.user_file(folder / "users.yaml")
        private_file.create(self.tokens.path, self.tokens.render({}))
        private_file.create(self.users.path, self.users.render({}))
        private_file.create(folder / "tenants.yaml", b"version: 1\ntenants: {}\n")
        users.add(self.users, "alice", None, START)
        self.limiter = Limiter(Limits(failed_sign_ins=FAILED), Counters(), lambda: self.now.timestamp())
        self.door = Authenticator(self.tokens.path, self.users.path, now=lambda: self.now, wrong=self.limiter.wrong)
        self.door.ended = self.ended.append
        matches = tokens.matches

        def counted(token: Token, text: str) -> bool:
            self.hashes += 1
            return matches(token, text)

        monkeypatch.setattr(authenticate.tokens, "matches", counted)

    def token(self, **wanted: Any) -> tuple[str, str]:
        entry, text = tokens.add(self.tokens, Wanted(**wanted), self.now)
        return entry.id, text

    def change(self, name: str, **fields: Any) -> None:
        with self.tokens.edit() as entries:
            entries[name] = replace(entries[name], **fields)

    def later(self, **time: float) -> None:
        self.now += timedelta(**time)


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    found = House(tmp_path, monkeypatch)
    yield found
    found.door.close()


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def enter(house: House, text: str, address: str | None = HERE) -> Principal:
    return run(house.door.authenticate(text, address))


def refused(house: House, text: str, address: str | None = HERE) -> UnauthorizedError:
    with pytest.raises(UnauthorizedError) as caught:
        enter(house, text, address)
    return caught.value


def forged(text: str, number: int = 0) -> str:
    """A token of the same id, with a right checksum and a wrong secret."""
    body = text[:13] + f"{number:043}"
    return f"{body}_{tokens._checksum(body)}"
