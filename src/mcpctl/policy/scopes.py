"""OAuth scopes × permissions: what a client that a user has let in may do, within what the user may do.

Three are always there, each of the later ones gives what `mcp:read` gives too, so that a client needs one of them. The
config may add others. A scope never gives anything: it is a bound (`policy/access.py`, the token's permissions).
"""

from collections.abc import Iterable, Mapping

from mcpctl.config import covers
from mcpctl.config_oauth import OFFLINE as OFFLINE
from mcpctl.config_sign_in import Oauth
from mcpctl.policy import roles

_SETTINGS = ("tools:get_pg_configuration", "tools:set_pg_configuration", "databases:*:admin")
_READ = (*roles.READ_ONLY, "tools:list_my_databases")
_WRITE = (*_READ, "tools:execute_statement", "tools:register_database", "tools:remove_database", "databases:*:write")
PERMISSIONS: Mapping[str, tuple[str, ...]] = {
    "mcp:read": _READ,
    "mcp:write": _WRITE,
    "mcp:admin": (*_READ, *_SETTINGS),
}
"""The permissions of each scope that is always there."""
_WORDS: Mapping[str, str] = {
    "mcp:read": "Ask your databases questions, read the answers, and see how the databases are doing",
    "mcp:write": "Ask questions, and change and delete data; add databases in your name",
    "mcp:admin": "Ask questions, and change settings of PostgreSQL",
}
_CHANGING = ("mcp:write", "mcp:admin")


class Scopes:
    """The scopes of one configuration."""

    def __init__(self, oauth: Oauth) -> None:
        own = {name: scope.permissions for name, scope in oauth.scopes.items()}
        self._permissions: dict[str, tuple[str, ...]] = {**PERMISSIONS, **own}
        self._words = {**_WORDS, **{name: scope.description or "" for name, scope in oauth.scopes.items()}}
        self.on = oauth.enabled
        """Whether anybody can ask for scopes."""
        self.default = oauth.default_scopes
        """Those of a client that asks for none, and that clients are told to ask for."""

    @property
    def names(self) -> tuple[str, ...]:
        """All that give a permission."""
        return tuple(self._permissions)

    def known(self, asked: Iterable[str]) -> tuple[str, ...]:
        """Those of `asked` that there are, each once, OFFLINE among them."""
        return tuple(dict.fromkeys(name for name in asked if name in self._permissions or name == OFFLINE))

    def permissions(self, names: Iterable[str]) -> tuple[str, ...]:
        """What these scopes allow; one that the config no longer has allows nothing."""
        return tuple(dict.fromkeys(one for name in names for one in self._permissions.get(name, ())))

    def words(self, name: str) -> str:
        """What people are told that a scope allows."""
        return self._words.get(name) or ", ".join(self._permissions.get(name, ()))

    def changes(self, name: str) -> bool:
        """Whether whoever has it can change anything that stays."""
        if name in PERMISSIONS:
            return name in _CHANGING
        return any(not _only_reads(one) for one in self._permissions.get(name, ()))

    def covering(self, permissions: Iterable[str]) -> tuple[str, ...]:
        """The scopes to ask for so that all of these are allowed: the smallest one that covers them together, else one
        for each; () where there are none."""
        wanted = tuple(permissions)
        by_size = sorted(self._permissions, key=lambda name: len(self._permissions[name]))
        together = next((name for name in by_size if all(self._has(name, one) for one in wanted)), None)
        if together is not None:
            return (together,)
        each = [next((name for name in by_size if self._has(name, one)), None) for one in wanted]
        return () if None in each else tuple(dict.fromkeys(name for name in each if name is not None))

    def _has(self, name: str, permission: str) -> bool:
        return any(covers(pattern, permission) for pattern in self._permissions[name])


def _only_reads(pattern: str) -> bool:
    return any(covers(one, pattern) for one in _READ) or (
        pattern.startswith("databases:") and pattern.endswith(":read")
    )
