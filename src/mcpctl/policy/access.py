"""What a principal may do. Pure: (principal, permission) → decision with its reason.

A permission is `<family>:<object>[:<right>]`: `tools:query_database`, `databases:sales:read`. A pattern is the same
with `*` for a part; a `*` at the end stands for all further parts. The user's roles give permissions; a token's own
list narrows them, and a token without one has all of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mcpctl.config import covers
from mcpctl.config_keys import Auth
from mcpctl.errors import ScopeError
from mcpctl.identity.principal import Principal
from mcpctl.identity.users import Roles
from mcpctl.policy import roles
from mcpctl.policy.scopes import Scopes

_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Decision:
    """Yes or no, and why."""

    allowed: bool
    reason: str


def within(patterns: Iterable[str], bounds: Iterable[str]) -> tuple[str, ...]:
    """What is left of `patterns` where only what `bounds` cover is allowed: the patterns of what both cover."""
    bounds = tuple(bounds)
    found = (_both(one.split(":"), other.split(":")) for one in patterns for other in bounds)
    return tuple(dict.fromkeys(":".join(parts) for parts in found if parts is not None))


def _both(one: list[str], other: list[str]) -> list[str] | None:
    """What two patterns both cover, as one; None where that is nothing."""
    if one == ["*"]:
        return other
    if other == ["*"]:
        return one
    if not one and not other:
        return []
    if not one or not other or (one[0] != other[0] and "*" not in (one[0], other[0])):
        return None
    rest = _both(one[1:], other[1:])
    return None if rest is None else [other[0] if one[0] == "*" else one[0], *rest]


def _covering(patterns: Iterable[str], permission: str) -> str | None:
    return next((pattern for pattern in patterns if covers(pattern, permission)), None)


class Access:
    """The rules of one configuration: its roles, who is an admin, and who only reads."""

    def __init__(self, auth: Auth) -> None:
        self._roles: Mapping[str, tuple[str, ...]] = {
            **roles.BUILT_IN,
            **{name: role.permissions for name, role in auth.roles.items()},
        }
        self._admins = frozenset(auth.admin_users)
        self._readers = frozenset(auth.read_only_users)
        self._scopes = Scopes(auth.oauth)
        self._decided: dict[tuple[int, str], tuple[Principal, Decision]] = {}

    def roles_of(self, principal: Principal) -> tuple[str, ...]:
        """The roles that a principal has, by its own entry and by the config's lists."""
        given = roles.DEFAULT if principal.claimed is None else principal.claimed
        own = given if principal.roles is None else principal.roles
        return (*own, roles.ADMIN) if principal.user in self._admins and roles.ADMIN not in own else own

    def patterns(self, principal: Principal) -> tuple[str, ...]:
        """The permissions of its roles, within the read-only list and the token's own. A role that the config no longer
        has gives nothing."""
        every = (pattern for name in self.roles_of(principal) for pattern in self._roles.get(name, ()))
        found = tuple(dict.fromkeys(every))
        if principal.claimed is not None and principal.roles is not None:
            found = within(found, self._given(principal.claimed))
        if principal.user in self._readers:
            found = within(found, roles.READ_ONLY)
        return found if principal.permissions is None else within(found, principal.permissions)

    def fewer(self, before: Roles, after: Roles) -> bool:
        """Whether a user who had those roles has less with these; their place in the config's lists stays."""
        left = self._given(after)
        return any(_covering(left, pattern) is None for pattern in self._given(before))

    def _given(self, roles_held: Roles) -> list[str]:
        held = roles.DEFAULT if roles_held is None else roles_held
        return [pattern for name in held for pattern in self._roles.get(name, ())]

    def chain(self, principal: Principal, permission: str) -> list[Decision]:
        """Each link's own answer: roles, those of its issuer, read-only list, tenant, the token's databases, the
        token's permissions."""
        return [
            self._by_role(principal, permission),
            *self._by_issuer(principal, permission),
            *([self._by_list(permission)] if principal.user in self._readers else []),
            *self._by_closed(principal, permission),
            *([] if principal.tenant is None else [self._by_tenant(principal, permission)]),
            *([] if principal.databases is None else [self._by_databases(principal.databases, permission)]),
            self._by_token(principal, permission),
        ]

    def may(self, principal: Principal, permission: str) -> Decision:
        """Whether a principal has `permission`: the first link that says no, or else the last one's yes. A principal
        never changes, so each call of its does not ask the links again."""
        asked = (id(principal), permission)
        known = self._decided.get(asked)
        if known is None:
            if len(self._decided) >= _REMEMBERED:
                self._decided.clear()
            links = self.chain(principal, permission)
            decision = next((link for link in links if not link.allowed), links[-1])
            known = self._decided[asked] = principal, decision  # kept, so that no other has its id
        return known[1]

    def check_scope(self, principal: Principal, *permissions: str) -> None:
        """Raises ScopeError where only the scopes of its client keep a principal from having all of these."""
        if not principal.scoped:
            return
        links = [link for one in permissions for link in self.chain(principal, one)[:-1]]
        lacking = [one for one in permissions if not self._by_token(principal, one).allowed]
        scopes = self._scopes.covering(permissions) if lacking and all(link.allowed for link in links) else ()
        if scopes:
            needed = " ".join(scopes)
            raise ScopeError(f"this needs the scope {needed}", "have the client ask for it", scopes)

    def _by_role(self, principal: Principal, permission: str) -> Decision:
        held = self.roles_of(principal)
        for name in held:
            if pattern := _covering(self._roles.get(name, ()), permission):
                return Decision(True, f"the role {name} has {pattern}")
        shown = f"the roles {', '.join(held)} have" if len(held) > 1 else f"the role {', '.join(held) or '(none)'} has"
        return Decision(False, f"{shown} not the permission {permission}")

    def _by_issuer(self, principal: Principal, permission: str) -> list[Decision]:
        """Where users.yaml says which roles a user has, those that an issuer gives bound them."""
        if principal.claimed is None or principal.roles is None:
            return []
        shown = f"by its issuer it has the roles {', '.join(principal.claimed) or '(none)'}"
        if pattern := _covering(self._given(principal.claimed), permission):
            return [Decision(True, f"{shown}, with {pattern}")]
        return [Decision(False, f"{shown}, and not the permission {permission}")]

    @staticmethod
    def _by_list(permission: str) -> Decision:
        if _covering(roles.READ_ONLY, permission):
            return Decision(True, "auth.read_only_users lets it read")
        return Decision(False, f"auth.read_only_users leaves no {permission}")

    @staticmethod
    def _by_closed(principal: Principal, permission: str) -> list[Decision]:
        """A database that is one tenant's alone is not there for anybody else, nor one for whoever was granted another
        tenant's schema of it."""
        family, _, rest = permission.partition(":")
        name = rest.partition(":")[0]
        return [Decision(False, principal.closed[name])] if family == "databases" and name in principal.closed else []

    @staticmethod
    def _by_tenant(principal: Principal, permission: str) -> Decision:
        place = principal.within
        if place is None:
            return Decision(False, f"the tenant {principal.tenant} is gone")
        family, _, rest = permission.partition(":")
        if family == "databases" and rest.partition(":")[0] != place.database:
            return Decision(False, f"the tenant {place.name} has {place.where}")
        grant = principal.grants.get(place.database)
        if family == "databases" and grant and (beyond := place.outside((*grant.read, *grant.write))) is not None:
            return Decision(False, f"the tenant {place.name} has {place.where}, and the user's grant reaches {beyond}")
        return Decision(True, f"the tenant {place.name} has {place.where}")

    @staticmethod
    def _by_databases(databases: tuple[str, ...], permission: str) -> Decision:
        family, _, rest = permission.partition(":")
        if family == "databases" and rest.partition(":")[0] not in databases:
            return Decision(False, f"this token is for the databases {', '.join(databases) or '(none)'}")
        return Decision(True, f"the token's databases {', '.join(databases)}")

    @staticmethod
    def _by_token(principal: Principal, permission: str) -> Decision:
        if principal.permissions is None:
            return Decision(True, "the token has all that its user has")
        if pattern := _covering(principal.permissions, permission):
            return Decision(True, f"the token's permission {pattern}")
        return Decision(False, f"this token lacks the permission {permission}")
