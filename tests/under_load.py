"""Callers who ask without pause while something breaks: what they were told, and what the audit log says of it."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from site_of_mcpctl import Client, Site, eventually

REACHED = "your token is fine"
LOST = "the connection to the database was lost"
SAID = (  # what a caller may be told of a database that breaks
    REACHED,
    LOST,
    "terminating connection",
    "canceling statement due to",
    "the database system is",
)


@dataclass
class Load:
    """Some callers with a token each. Each statement names its request, and so must each answer."""

    at: Site
    database: str = "shop"
    callers: int = 4
    query: str = "select {tag}, pg_sleep(0.002)"
    asked: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        tokens = [self.at.token(("alice", "bob")[n % 2]) for n in range(self.callers)]
        self._ids = {id for id, _ in tokens}
        self._threads = [
            threading.Thread(target=self._ask, args=(n, text), daemon=True) for n, (_, text) in enumerate(tokens)
        ]
        for thread in self._threads:
            thread.start()
        self.goes_on()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert kind is not None or not any(thread.is_alive() for thread in self._threads)

    def _ask(self, number: int, token: str) -> None:
        with self.at.client(token) as client:
            for turn in itertools.count():
                if self._stop.is_set():
                    return
                tag = f"'{self.database} {id(self)} {number}-{turn}'"
                query = self.query.format(tag=tag)
                answer = _said(client, query, self.database, f"{number}-{turn}")
                with self._lock:
                    self.asked.append(query)
                    self._file(tag.strip("'"), f"{number}-{turn}", answer)

    def _file(self, tag: str, id: str, answer: Any) -> None:
        text = answer if isinstance(answer, str) else answer["result"]["content"][0]["text"]
        if isinstance(answer, str) or answer["id"] != id:
            self.wrong.append(text)
        elif answer["result"]["isError"]:
            (self.refused if any(one in text for one in SAID) else self.wrong).append(text)
        elif answer["result"]["structuredContent"]["rows"][0][0] == tag:
            self.answered.append(tag)
        else:
            self.wrong.append(text)

    def goes_on(self, seconds: float = 20) -> None:
        """Wait until each caller may have had an answer from now on."""
        before = len(self.answered)
        eventually(lambda: len(self.answered) >= before + 2 * self.callers, seconds)

    def judge(self, *secret: str) -> None:
        """Each answer was its request's, nothing that was said tells of `secret`, and each call is in the log once."""
        assert not self.wrong, self.wrong[:3]
        for text in self.refused:
            assert not any(one in text for one in secret), text
        lines = [line for line in self.at.audit() if line["event"].startswith("tool.") and line["token"] in self._ids]
        assert len(lines) == len(self.asked)
        kept = [line["statement"] for line in lines if "statement" in line]
        assert len(kept) == len(set(kept))
        assert len([line for line in lines if line["outcome"] == "ok"]) == len(self.answered)


def _said(client: Client, query: str, database: str, id: str) -> Any:
    answer = client.call("query_database", {"query": query, "database": database}, id=id)
    return answer.json() if answer.status_code == 200 else f"{answer.status_code} {answer.text}"
