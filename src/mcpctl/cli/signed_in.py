"""The sessions that users have signed in for, for the commands that show and end them: they are in state.db, whether a
server runs or not."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mcpctl.cli import output

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings
    from mcpctl.identity.sessions import Sessions


@contextlib.contextmanager
def store(found: "Settings") -> "Iterator[Sessions]":
    """The sessions of an installation."""
    from mcpctl.identity.sessions import Sessions, rules_of
    from mcpctl.state import State

    state = State(found.server.state_file, must_exist=True)
    try:
        yield Sessions(state, rules_of(found.auth))
    finally:
        state.close()


def listed(found: "Settings") -> list[dict[str, Any]]:
    """All of them, as `--json` shows them; the one that was used last first."""
    from mcpctl.identity.sessions import as_values

    with store(found) as sessions:
        return [as_values(one, sessions) for one in sessions.all()]


def is_one(name: str) -> bool:
    """Whether an id is a session's."""
    from mcpctl.identity.sessions import is_id

    return is_id(name)


def records(found: "Settings") -> dict[str, tuple[str, bool]]:
    """(whose, whether it has ended) of each session that is remembered, by id."""
    with store(found) as sessions:
        return sessions.records()


def of(found: "Settings", user: str) -> list[str]:
    """The ids of a user's, those of a kind that the config has turned off too; none where nobody can say, with a
    warning."""
    from mcpctl.errors import Error

    try:
        with store(found) as sessions:
            return sessions.ids_of(user)
    except Error as problem:
        output.warn(f"the sessions of {user} cannot be read: {problem.message}", problem.hint)
        return []


def end(found: "Settings", ids: Iterable[str]) -> list[str]:
    """End them for good, and have their users asked again what a client may; the ids of those that had not ended.
    Raises an Error where they cannot be written."""
    ids = list(ids)
    with store(found) as sessions:
        sessions.ask_again(ids)
        return sessions.end(ids)


def out_of_browsers(found: "Settings", user: str | None) -> None:
    """Sign a user out of all browsers, or (None) everybody. Raises an Error where that cannot be written."""
    from mcpctl.identity import browsers
    from mcpctl.state import State

    state = State(found.server.state_file, must_exist=True)
    try:
        browsers.forget(state, user)
    finally:
        state.close()


def end_theirs(found: "Settings", user: str, ids: list[str]) -> list[str]:
    """End those of a user whom the server lets in no more, and what they have signed in for since these were read.
    Where they cannot be written, a warning says what that means."""
    from mcpctl.errors import Error

    try:
        out_of_browsers(found, user)
        with store(found) as sessions:
            return sessions.end(dict.fromkeys([*ids, *sessions.ids_of(user)]))
    except Error as problem:
        output.warn(
            f"the sessions of {user} open nothing now, but are not ended: {problem.message}",
            f"before {user} may come in again: mcpctl session revoke --user {user}",
        )
        return []


def closed(ids: Iterable[str], user: str | None, why: str) -> list[tuple[str, dict[str, Any]]]:
    """The audit lines of sessions of a user that were ended."""
    return [("session.closed", {"token": one, "user": user, "reason": why}) for one in ids]
