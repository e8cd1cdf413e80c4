"""OAuth clients: those that the config lists, those that have registered themselves (RFC 7591), and those that a
document of their own describes (`client_documents.py`).

A client that registers proves nothing: anybody may use any name. So it is bounded how many there are and how many one
address makes, and what it says of itself is shown as no more than that. Where there is no room, who was never allowed
by anybody goes first, and then whoever was allowed longest ago and has no connection any more: else one user could fill
all places for ever.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mcpctl import private_file, redirect_uris
from mcpctl.config_sign_in import Oauth
from mcpctl.config_values import CONTROL
from mcpctl.errors import ConfigError, Error, LimitedError, UnavailableError
from mcpctl.identity import tokens
from mcpctl.shared_counters import source
from mcpctl.state import State

NAME = 200
"""Characters of a client's name."""
PLACES = 20
"""Redirect URIs of one client."""
AN_HOUR = 20
"""Clients that one address (of IPv6, one /64) may register in an hour."""
_UNUSED = timedelta(days=1)
"""For which a client stays that nobody has allowed, unless there is no room."""
_BEGUN = timedelta(minutes=15)
"""For which it stays even so, so that a flow that has begun ends."""
_FORGOTTEN = timedelta(days=90)
"""After which a client goes that nobody has a connection with any more."""
_SECRET = 1024
"""Bytes of a secret's file."""
_COLUMNS = "id, name, redirects, renews"


@dataclass(frozen=True, slots=True)
class Client:
    """One client. `host` is where it has proved to be at home; `listed`: the config vouches for it. `renews`: whether
    it takes refresh tokens. `secret` is what it shows at /token; a public one has none."""

    id: str
    name: str
    redirects: tuple[str, ...]
    host: str | None = None
    listed: bool = False
    renews: bool = True
    secret: str | None = None

    @property
    def proven(self) -> bool:
        """Whether it is known who it is, and not only who it says it is."""
        return self.listed or self.host is not None


class MetadataError(Error):
    """What a client says of itself cannot be taken. `error` is the code of RFC 7591, section 3.2.2."""

    status = 400

    def __init__(self, message: str, error: str = "invalid_client_metadata") -> None:
        super().__init__(message)
        self.error = error


class Clients:
    """The clients of an installation that are listed or registered. `schemes`: see `redirect_uris.check`."""

    def __init__(
        self, state: State, oauth: Oauth, listed: Mapping[str, Client], now: Callable[[], datetime] = tokens.utcnow
    ) -> None:
        self._state = state
        self._most = oauth.registrations
        self._schemes = oauth.app_schemes
        self._listed = listed
        self._now = now

    def lists(self, name: str) -> bool:
        """Whether the config names that client."""
        return name in self._listed

    def find(self, name: str) -> Client | None:
        """The client of that id, if the config lists it or it has registered."""
        if (listed := self._listed.get(name)) is not None:
            return listed
        rows = self._state.rows(f"SELECT {_COLUMNS} FROM oauth_clients WHERE id = ?", (name,))  # noqa: S608 - constants
        return Client(rows[0][0], rows[0][1], tuple(json.loads(rows[0][2])), renews=bool(rows[0][3])) if rows else None

    def register(self, said: Mapping[str, Any], address: str | None) -> Client:
        """A new client, by what it says of itself (RFC 7591, section 2). MetadataError; LimitedError where the address
        has made too many; UnavailableError where there is no room."""
        name, redirects, renews = read(said, self._schemes)
        client, address = Client(f"client-{secrets.token_hex(12)}", name, redirects, renews=renews), source(address)
        now = self._now().timestamp()
        with self._state.change() as connection:
            since = now - 3600
            (recent,) = connection.execute(
                "SELECT count(*) FROM oauth_clients WHERE address IS ? AND created > ?", (address, since)
            ).fetchone()
            if recent >= AN_HOUR:
                raise LimitedError(
                    f"{recent} clients were registered from this address within the hour",
                    kind="address", name=address or "", limit="registrations", retry_after=3600,
                )  # fmt: skip
            self._make_room(connection, now)
            connection.execute(
                "INSERT INTO oauth_clients (id, name, redirects, renews, created, address) VALUES (?, ?, ?, ?, ?, ?)",
                (client.id, name, json.dumps(redirects), renews, now, address),
            )
        return client

    def _make_room(self, connection: Any, now: float) -> None:
        (count,) = connection.execute("SELECT count(*) FROM oauth_clients").fetchone()
        if count < self._most:
            return
        (strange,) = connection.execute("SELECT count(*) FROM oauth_clients WHERE used IS NULL").fetchone()
        crowded = 2 * strange > self._most  # strangers who register do not drive out those whom users know
        before = now - _BEGUN.total_seconds()
        gone = connection.execute(
            "DELETE FROM oauth_clients WHERE id = (SELECT id FROM oauth_clients WHERE coalesce(used, created) < ? AND "
            "(used IS NULL OR NOT ? AND id NOT IN (SELECT client FROM oauth_connections WHERE session IN (SELECT id "
            "FROM sessions WHERE NOT ended))) ORDER BY used IS NOT NULL, coalesce(used, created) LIMIT 1)",
            (before, crowded),
        )
        if not gone.rowcount:
            raise UnavailableError(f"there are {count} registered clients, as many as auth.oauth.registrations allows")

    def use(self, name: str) -> None:
        """Note that a user has allowed this client."""
        with self._state.change() as connection:
            connection.execute("UPDATE oauth_clients SET used = ? WHERE id = ?", (self._now().timestamp(), name))

    def sweep(self) -> None:
        """Forget registered clients that nobody needs."""
        now = self._now().timestamp()
        with self._state.change() as connection:
            connection.execute(
                "DELETE FROM oauth_clients WHERE CASE WHEN used IS NULL THEN created < ? ELSE used < ? END "
                "AND id NOT IN (SELECT client FROM oauth_connections)",
                (now - _UNUSED.total_seconds(), now - _FORGOTTEN.total_seconds()),
            )


def read(said: Mapping[str, Any], schemes: Sequence[str]) -> tuple[str, tuple[str, ...], bool]:
    """(name, redirect URIs, whether it takes refresh tokens) of what a client says of itself, or MetadataError."""
    uris = said.get("redirect_uris")
    if not isinstance(uris, list) or not 0 < len(uris) <= PLACES or not all(isinstance(one, str) for one in uris):
        raise MetadataError(f"redirect_uris: expected 1 to {PLACES} of them", "invalid_redirect_uri")
    for uri in uris:
        try:
            redirect_uris.check(uri, schemes)
        except ValueError as problem:
            raise MetadataError(f"redirect_uris: expected {problem}", "invalid_redirect_uri") from None
    grants = said.get("grant_types", ["authorization_code"])
    if not isinstance(grants, list) or "authorization_code" not in grants:
        raise MetadataError("grant_types: has to have authorization_code")
    answers = said.get("response_types", ["code"])
    if not isinstance(answers, list) or "code" not in answers:
        raise MetadataError("response_types: has to have code")
    name = said.get("client_name") or ""
    if not isinstance(name, str) or len(name) > NAME or CONTROL.search(name):
        raise MetadataError(f"client_name: expected a text of {NAME} characters at most, without control characters")
    return name, tuple(dict.fromkeys(uris)), "refresh_token" in grants


def secret_of(name: str, file: Path | None) -> str | None:
    """The secret of a client that the config lists; None for a public one. ConfigError for a file that cannot be it."""
    if file is None:
        return None
    try:
        found = private_file.read(file, limit=_SECRET).data.decode("ascii").strip()
    except UnicodeDecodeError:
        found = ""
    if len(found) < 32:
        hint = "make one with: openssl rand -hex 32"
        raise ConfigError(f"{file}: the secret of the client {name} has fewer than 32 ASCII characters", hint)
    return found
