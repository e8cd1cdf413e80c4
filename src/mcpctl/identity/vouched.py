"""Whom outside issuers vouch for, as entries of the door: which user each is, and whether that is still so.

One entry stands for all tokens of one identity that give the same: so a renewed token keeps its pool, and one with
fewer roles has another. It ends with the last of those that were shown.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from mcpctl.errors import Error, LimitedError, UnauthorizedError
from mcpctl.identity import guests, links
from mcpctl.identity.claims import Outside
from mcpctl.identity.tokens import Token
from mcpctl.identity.users import User

if TYPE_CHECKING:
    from mcpctl.identity.oidc import Issuers

_MOST = 2_000
"""Texts of which is remembered whom they stand for."""
_EACH = 16
"""Of these, how many of one entry."""
_EACH_ADDRESS = 16
"""Texts from one address that are looked at at once, of the 64 that an issuer is asked about."""
_AT_ONCE = 8
"""Texts about which the issuers are asked at a time, beside requests."""
Identity = tuple[str, str]
"""(issuer, subject)."""


@dataclass(frozen=True, slots=True)
class Vouched(Token):
    """Somebody whom an issuer vouches for. `user` is what they are called in limits and in the audit log, `as_user`
    whose login roles and grants they have where they are no user themselves. `claimed` are the roles that their issuer
    gives them."""

    issuer: str = ""
    subject: str = ""
    tenant: str | None = None
    claimed: tuple[str, ...] = ()
    as_user: str | None = None
    shown: str | None = None

    @property
    def rights(self) -> tuple[object, ...]:
        """What its id is made of never changes."""
        return (self.id,)

    @property
    def person(self) -> str | None:
        """The user in users.yaml by whose entry it is judged."""
        return self.as_user or self.user

    @property
    def pool(self) -> str:
        """The name of its own pools."""
        return _digest("pool", self.id)

    def why_not(self, links: Mapping[Identity, str], people: Mapping[str, User]) -> str | None:
        """Why its identity is not that user any more; None where it is."""
        linked = links.get((self.issuer, self.subject))
        if self.as_user is None and linked != self.user:
            return f"its identity is not linked to {self.user} any more"
        if self.as_user is not None and linked is not None:
            return f"its identity is linked to {linked} by now"
        user = people.get(self.person or "")
        if user is not None and self.tenant is not None and user.tenant != self.tenant:
            return f"its tenant {self.tenant} is not that of its user"
        return None


class Visitors:
    """Those whom the issuers vouch for, one process's. One event loop's."""

    def __init__(self, issuers: "Issuers") -> None:
        self._issuers = issuers
        self._texts: dict[str, str] = {}
        self._people: Mapping[str, User] = {}
        self._asking: Counter[str | None] = Counter()
        self.links: Mapping[Identity, str] = {}
        """Which user an identity is, by users.yaml."""

    def know(self, people: Mapping[str, User]) -> None:
        """Take note of the users."""
        if people is not self._people:
            self._people, self.links = people, links.linked(people)

    def takes(self, text: str) -> bool:
        """Whether such a text is for an issuer to judge."""
        return self._issuers.takes(text)

    async def admit(self, text: str, address: str | None, now: datetime) -> Vouched:
        """As `verify`, for a request from that address: it may have so many asked about at once, so that others' can
        be asked about, too. LimitedError beyond that."""
        if self._asking[address] >= _EACH_ADDRESS:
            said = f"too many outside tokens from {address} are being looked at"
            raise LimitedError(said, kind="address", name=address or "", limit="concurrent", retry_after=1)
        self._asking[address] += 1
        try:
            return await self.verify(text, now)
        finally:
            self._asking[address] -= 1
            if not self._asking[address]:
                del self._asking[address]

    async def verify(self, text: str, now: datetime) -> Vouched:
        """Whom a text stands for. UnauthorizedError where nobody is; UnavailableError where its issuer cannot be
        asked, which says nothing about it."""
        try:
            found = self._entry(await self._issuers.verify(text), now)
        except UnauthorizedError as problem:
            self._texts.pop(text, None)
            raise UnauthorizedError(f"an outside token: {problem.message}", proven=problem.proven) from None
        self._remember(text, found.id)
        return found

    def _remember(self, text: str, name: str) -> None:
        """Remember whom a text stands for. Whoever shows many has their own oldest forgotten, and not another's, of
        whom nobody could then say that they are still vouched for."""
        if self._texts.get(text) == name:
            return
        self._texts.pop(text, None)
        theirs = [one for one, whose in self._texts.items() if whose == name]
        for old in theirs[: max(0, len(theirs) - _EACH + 1)]:
            del self._texts[old]
        while len(self._texts) >= _MOST:
            del self._texts[next(iter(self._texts))]
        self._texts[text] = name

    def _entry(self, found: Outside, now: datetime) -> Vouched:
        user, as_user = self.links.get((found.issuer, found.subject)), None
        if user is None:
            guest = guests.guest(found)
            if guest is None:
                raise UnauthorizedError(f"{found.source}: its identity is linked to no user here")
            user, as_user = guest.name, guest.as_user
        name = "J" + _digest(found.issuer, found.subject, user, as_user, found.tenant, *sorted(found.roles))[:15]
        return Vouched(
            id=name,
            user=user,
            hash="",
            created_at=now,
            expires_at=found.expires_at,
            issuer=found.issuer,
            subject=found.subject,
            tenant=found.tenant,
            claimed=found.roles,
            as_user=as_user,
            shown=found.shown,
        )

    async def look_again(self, ids: frozenset[str], now: datetime) -> list[str]:
        """Which of these entries no text stands for any more, of those that have been shown here: each text is looked
        at again, as a request with it would. What cannot be asked stays as it is until it can."""
        few = asyncio.Semaphore(_AT_ONCE)

        async def look(text: str, name: str) -> str | None:
            async with few:
                try:
                    return (await self.verify(text, now)).id
                except UnauthorizedError:
                    return None
                except Error:
                    return name

        theirs = [(text, name) for text, name in self._texts.items() if name in ids]
        return sorted(ids.difference(await asyncio.gather(*(look(*one) for one in theirs))))

    async def close(self) -> None:
        """Ask nobody any more."""
        await self._issuers.close()


def later(old: Vouched | None, new: Vouched) -> Vouched:
    """One entry for what two tokens of an identity open: until the later of their ends."""
    if old is None or old.expires_at is None or new.expires_at is None:
        return new
    return old if old.expires_at >= new.expires_at else replace(new, created_at=old.created_at)


def _digest(*parts: str | None) -> str:
    whole = "".join(f"{len(part)}:{part}" if part is not None else "-" for part in parts)
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()
