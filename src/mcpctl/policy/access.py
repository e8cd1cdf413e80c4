"""What a principal may do. Pure: (principal, permission) → decision with its reason.

A permission is `<family>:<object>[:<right>]`: `tools:query_database`, `databases:sales:read`. A pattern is the same
with `*` for a part; a `*` at the end stands for all further parts. The user's roles give permissions; a token's own
list narrows them, and a token without one has all of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mcpctl.config_keys import Auth
from mcpctl.identity.principal import Principal
from mcpctl.policy import roles


@dataclass(frozen=True, slots=True)
class Decision:
    """Yes or no, and why."""

    allowed: bool
    reason: str


def covers(pattern: str, permission: str) -> bool:
    """Whether a pattern such as `databases:*:read` covers a permission such as `databases:sales:read`."""
    wanted = permission.split(":")
    parts = pattern.split(":")
    for index, part in enumerate(parts):
        if part == "*" and index == len(parts) - 1:
            return True
        if index >= len(wanted) or part not in ("*", wanted[index]):
            return False
    return len(parts) == len(wanted)


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

    def roles_of(self, principal: Principal) -> tuple[str, ...]:
        """The roles that a principal has, by its own entry and by the config's lists."""
        own = roles.DEFAULT if principal.roles is None else principal.roles
        return (*own, roles.ADMIN) if principal.user in self._admins and roles.ADMIN not in own else own

    def patterns(self, principal: Principal) -> tuple[str, ...]:
        """All permissions of its roles. A role that the config no longer has gives nothing."""
        found = (pattern for name in self.roles_of(principal) for pattern in self._roles.get(name, ()))
        return tuple(dict.fromkeys(found))

    def chain(self, principal: Principal, permission: str) -> list[Decision]:
        """Each link's own answer: roles, read-only list, tenant, the token's databases, the token's permissions."""
        return [
            self._by_role(principal, permission),
            *([self._by_list(permission)] if principal.user in self._readers else []),
            *self._by_closed(principal, permission),
            *([] if principal.tenant is None else [self._by_tenant(principal, permission)]),
            *([] if principal.databases is None else [self._by_databases(principal.databases, permission)]),
            self._by_token(principal, permission),
        ]

    def may(self, principal: Principal, permission: str) -> Decision:
        """Whether a principal has `permission`: the first link that says no, or else the last one's yes."""
        links = self.chain(principal, permission)
        return next((link for link in links if not link.allowed), links[-1])

    def _by_role(self, principal: Principal, permission: str) -> Decision:
        held = self.roles_of(principal)
        for name in held:
            if pattern := _covering(self._roles.get(name, ()), permission):
                return Decision(True, f"the role {name} has {pattern}")
        shown = f"the roles {', '.join(held)} have" if len(held) > 1 else f"the role {', '.join(held) or '(none)'} has"
        return Decision(False, f"{shown} not the permission {permission}")

    @staticmethod
    def _by_list(permission: str) -> Decision:
        if _covering(roles.READ_ONLY, permission):
            return Decision(True, "auth.read_only_users lets it read")
        return Decision(False, f"auth.read_only_users leaves no {permission}")

    @staticmethod
    def _by_closed(principal: Principal, permission: str) -> list[Decision]:
        """A database that is one tenant's alone is not there for anybody else."""
        family, _, rest = permission.partition(":")
        name = rest.partition(":")[0]
        closed = family == "databases" and name in principal.closed
        return [Decision(False, f"the database {name} is a tenant's alone")] if closed else []

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
