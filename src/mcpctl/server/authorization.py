"""The embedded authorization server, put together: what it is made of, and what it forgets each minute."""

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from mcpctl.config_sign_in import Oauth
from mcpctl.errors import UnavailableError
from mcpctl.identity.browsers import Browsers
from mcpctl.identity.client_documents import Documents
from mcpctl.identity.oauth import Connections
from mcpctl.identity.oauth_clients import Client, Clients, secret_of
from mcpctl.identity.tokens import utcnow
from mcpctl.identity.users import User
from mcpctl.in_turn import in_turn
from mcpctl.policy.scopes import Scopes
from mcpctl.server.cors import Cors
from mcpctl.server.forms import FormTokens
from mcpctl.server.oauth import Endpoints, Parts
from mcpctl.server.oauth_pages import SignInPages
from mcpctl.server.parts import Core
from mcpctl.server.routes import Addition

log = logging.getLogger("mcpctl.oauth")
_SWEEP = 60.0


class Authorization(NamedTuple):
    """What the app takes: routes, and the scopes that it tells clients of. `parts` is swept."""

    additions: Sequence[Addition]
    scopes: Scopes
    parts: Parts

    async def sweep(self) -> None:
        """Fit the connections to the config, and forget what nobody needs any more: now, and each minute."""
        connections = self.parts.connections
        while True:
            try:
                for one in await in_turn(lambda: connections.fit(self.parts.is_known)):
                    self.parts.closed(one, f"its client {one.client} is not in the config any more")
                self.parts.door.look()
                await in_turn(connections.sweep)
                await in_turn(self.parts.clients.sweep)
            except UnavailableError as problem:
                log.warning("the connections were not looked after, it is tried again: %s", problem.message)
            except Exception:
                log.exception("looking after the connections failed; it is tried again")
            await asyncio.sleep(_SWEEP)


async def build(core: Core) -> Authorization | None:
    """The authorization server of a process; None where the config has none. ConfigError where it cannot be."""
    settings, door, sessions = core.settings, core.authenticator, core.authenticator.sessions
    oauth = settings.auth.oauth
    if not oauth.enabled or sessions is None or core.signing_in is None:
        return None
    scopes = Scopes(oauth)
    connections = Connections(
        core.state, sessions, lambda: door.read().people, scopes.permissions, timedelta(seconds=oauth.access_lifetime)
    )
    documents = Documents(oauth.allow_metadata_from, oauth.app_schemes) if oauth.metadata_documents else None
    clients = Clients(core.state, oauth, listed(oauth))
    cors = Cors(settings.server.allowed_origins)
    parts = Parts(connections, clients, documents, scopes, door, core.recorder, cors, oauth.registration)
    browsers = Browsers(core.state, lambda: door.read().people)

    def databases(user: User, permissions: Sequence[str]) -> list[str]:
        return core.calls.reach.databases(door.supposed(user.name, tuple(permissions)), "read")

    pages = SignInPages(
        parts, browsers, FormTokens(await in_turn(browsers.key), utcnow), core.signing_in.prove, databases
    )
    return Authorization([Endpoints(parts), pages], scopes, parts)


def listed(oauth: Oauth) -> dict[str, Client]:
    """The clients that the config lists, by id."""
    return {
        name: Client(name, one.title or name, one.redirect_uris, listed=True, secret=secret_of(name, one.secret_file))
        for name, one in oauth.clients.items()
    }
