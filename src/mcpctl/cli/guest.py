"""Guests on the command line: those whom an outside issuer vouches for and who are no users, by the names they have."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from mcpctl.cli import output
from mcpctl.cli.common import by_whom, note, proof, ready_to_note, settings

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings
    from mcpctl.identity.guest_book import GuestBook, Known


def is_guest(name: str) -> bool:
    """Whether a name is that of a guest. No user can have one."""
    from mcpctl.identity.users import OUTSIDE

    return OUTSIDE.fullmatch(name) is not None


@contextlib.contextmanager
def _book(found: "Settings") -> Iterator["GuestBook"]:
    from mcpctl.identity.blocked import store
    from mcpctl.identity.guest_book import GuestBook
    from mcpctl.identity.tokens import utcnow

    state = store(found)
    try:
        book = GuestBook(state, utcnow)
        book.look()
        yield book
    finally:
        state.close()


def known(found: "Settings") -> list["Known"]:
    """Those who have come; none where the config lets nobody come so."""
    if not any(one.just_in_time for one in found.auth.oidc.values()):
        return []
    with _book(found) as book:
        return [*book.known.values()]


def find(found: "Settings", name: str) -> "Known":
    """The guest of that name, or NotFoundError (exit 4)."""
    with _book(found) as book:
        return book.find(name)


def values(one: "Known") -> dict[str, Any]:
    """A guest as `--json` shows them."""
    from mcpctl.identity.users import rfc3339

    return {
        "guest": one.name,
        "issuer": one.issuer,
        "subject": one.subject,
        "shown": one.shown,
        "as_user": one.as_user,
        "since": rfc3339(one.since),
        "seen": rfc3339(one.seen),
        "disabled_at": one.disabled_at and rfc3339(one.disabled_at),
    }


def row(one: "Known", linked: str | None) -> tuple[Any, ...]:
    """A guest in the table of users; `linked` is the user who their identity is by now."""
    told = values(one)
    status = "active" if one.disabled_at is None else "disabled"
    return (one.name, told["since"], "by issuer", None, f"as {linked or one.as_user}", 0,
            "linked" if linked else status, one.shown)  # fmt: skip


def show(context: typer.Context, name: str, json: bool, config: Any) -> None:
    """Show one guest."""
    found = values(find(settings(context, config, needs_log=False), name))
    if json:
        output.put_json(found)
    else:
        output.put_table(["FIELD", "VALUE"], [*found.items()])


def switch(context: typer.Context, name: str, reason: str | None, json: bool, config: Any, *, off: bool) -> None:
    """Refuse a guest from now on, and cut what runs; or let them in again. Their login roles are others', too, and
    stay."""
    from mcpctl.identity.tokens import utcnow

    found = settings(context, config, needs_log=not off, forgiving=off)
    if not off:
        ready_to_note(found)
    with _book(found) as book:
        changed = book.disable(name, utcnow() if off else None)
    word = "disabled" if off else "enabled"
    if changed:
        note(found, f"user.{word}", user=name, reason=by_whom(context, reason))
    words, cut = proof(found, [], name) if off else ("", None)
    if json:
        output.put_json({"user": name, "changed": changed, "roles": [], "failed": None, "cut": cut})
        return
    output.put(f"{name} {word}" if changed else f"{name} was {word} already")
    if off:
        output.put(words)
