"""Which identities of outside issuers are a user's: (issuer, subject), and nothing that can change hands."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mcpctl.config_values import issuer as read_issuer

_LONGEST = 255
"""Characters of a subject (OpenID Connect Core 1.0, section 2)."""


@dataclass(frozen=True, slots=True)
class Link:
    """One identity: the issuer's URL to the letter, and its subject there."""

    issuer: str
    subject: str


class Linked(Protocol):
    """Whoever has links."""

    @property
    def links(self) -> tuple[Link, ...]: ...


def link_of(issuer: Any, subject: Any) -> Link:
    """That identity; ValueError where it cannot be one."""
    try:
        issuer = read_issuer(issuer)
    except ValueError as problem:
        raise ValueError(f"issuer: expected {problem}") from None
    if not (isinstance(subject, str) and 0 < len(subject) <= _LONGEST and subject.isascii() and subject.isprintable()):
        raise ValueError(f"subject: expected a text of {_LONGEST} printable ASCII characters at most")
    return Link(issuer, subject)


def read(found: Any) -> tuple[Link, ...]:
    """The links of an entry of users.yaml; ValueError with what is wrong."""
    if found is None:
        return ()
    listed: list[Any] = found if isinstance(found, list) else [None]
    if not all(isinstance(one, dict) and one.keys() == {"issuer", "subject"} for one in listed):
        raise ValueError("links: expected a list of {issuer: …, subject: …}")
    try:
        return tuple(link_of(one["issuer"], one["subject"]) for one in listed)
    except ValueError as problem:
        raise ValueError(f"links: {problem}") from None


def as_values(links: tuple[Link, ...]) -> list[dict[str, str]] | None:
    """The links as plain values; None for none."""
    return [{"issuer": one.issuer, "subject": one.subject} for one in links] or None


def twice(people: Mapping[str, Linked]) -> Iterator[tuple[str, str]]:
    """(user, what is wrong) of each identity that is somebody's already: it would not be clear whose it is."""
    owners: dict[Link, str] = {}
    for name, person in people.items():
        for link in person.links:
            if link in owners:
                yield name, f"links: {link.subject!r} of {link.issuer} is linked to {owners[link]} already"
            owners.setdefault(link, name)


def linked(people: Mapping[str, Linked]) -> Mapping[tuple[str, str], str]:
    """The user's name of each identity, by (issuer, subject)."""
    return {(link.issuer, link.subject): name for name, person in people.items() for link in person.links}
