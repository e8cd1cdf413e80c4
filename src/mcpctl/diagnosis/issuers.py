"""Outside issuers: whether each can be asked, as the first of its tokens would have us."""

import asyncio
from collections.abc import Iterator

from mcpctl.diagnosis.patient import Check, Finding, Patient
from mcpctl.identity import users


def issuer(patient: Patient, check: Check) -> Iterator[Finding]:
    """Its keys, our secret there, and whether anybody is linked to it."""
    from mcpctl.identity.oidc import Issuers  # it brings httpx2 and PyJWT

    name = check.about or ""
    one = patient.settings.auth.oidc[name]
    people = users.user_file(patient.settings.auth.user_file).current()

    async def ask() -> int:
        issuers = Issuers({name: one}, lambda: patient.now)
        try:
            return await issuers.tried()
        finally:
            await issuers.close()

    count = asyncio.run(ask())
    if not count:
        yield check.fail("issuer.no-keys", f"{one.issuer} has no key that can be used", "are its algorithms listed?")
        return
    linked = sum(any(link.issuer == one.issuer for link in user.links) for user in people.values())
    asked = ", answers about tokens" if one.introspection.client_id is not None else ""
    yield check.ok(f"{one.issuer} is reached{asked}; {count} keys, {linked} users linked")
    if not linked and not one.just_in_time:
        what = f"no user is linked to {one.issuer}, so none of its tokens opens"
        yield check.warn("issuer.no-links", what, "mcpctl user link U --issuer …, or just_in_time")
