"""What a backup holds, by kind: all that an installation cannot be made from again. `admin.dsn` is root's, and never in
it; neither are certificates, which are renewed elsewhere, nor what the limits have counted."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mcpctl.config_keys import Settings
from mcpctl.errors import ConfigError

CONFIG, TOKENS, USERS, TENANTS = "config", "tokens", "users", "tenants"
SECRET_KEY, AUDIT_KEY, LOCKDOWN, STATE, ANCHORS = "secret.key", "audit.key", "lockdown", "state", "anchors"
SECRET, LOG = "secret", "log"
"""Of these two there may be several files: told apart by the config's key, and by the end of the log's name."""
NEEDED = (CONFIG, TOKENS, USERS, TENANTS, AUDIT_KEY)
"""Without one of these it is no backup."""
_SECRETS = ("password_file", "service_password_file", "secret_file", "client_secret_file", "sslcert", "sslkey")
_ELSEWHERE = ("cert", "key", "chain", "client_ca", "ca_file", "sslrootcert")


def places(settings: Settings) -> dict[str, Path]:
    """{kind: path} of what there is one of. Raises ConfigError where the settings came from no file."""
    if settings.source is None:
        raise ConfigError("there is no config file, and so nothing to keep", "make one with `mcpctl init`")
    found = {
        CONFIG: settings.source,
        TOKENS: settings.auth.token_file,
        USERS: settings.auth.user_file,
        TENANTS: settings.auth.tenant_file,
        SECRET_KEY: settings.keyring.file,
        AUDIT_KEY: settings.audit.key_file,
        LOCKDOWN: settings.auth.token_file.with_name("lockdown"),
        STATE: settings.server.state_file,
    }
    if settings.audit.anchor_file is not None:
        found[ANCHORS] = settings.audit.anchor_file
    return found


def secrets(settings: Settings) -> dict[str, Path]:
    """{the config's key: path} of each file of a secret, or of a client certificate, that the config names."""
    return {key: path for key, path in _paths(settings, "") if key.rpartition(".")[2] in _SECRETS}


def left_out(settings: Settings) -> list[tuple[str, Path]]:
    """(the config's key, path) of what it names, and what no backup holds."""
    return [(key, path) for key, path in _paths(settings, "") if key.rpartition(".")[2] in _ELSEWHERE]


def secret_mode(key: str) -> tuple[int, int | None]:
    """The rights that the file of such a key may have at most, and who else may own it: what libpq takes."""
    name = key.rpartition(".")[2]
    return (0o644, 0) if name == "sslcert" else (0o640, 0) if name == "sslkey" else (0o600, None)


def mode(kind: str) -> int:
    """The rights that such a file may have at most."""
    return 0o640 if kind == CONFIG else 0o600


def _paths(value: Any, above: str) -> Iterator[tuple[str, Path]]:
    if isinstance(value, Path):
        yield above, value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _paths(one, f"{above}.{name}")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.name != "source":
                yield from _paths(getattr(value, field.name), f"{above}.{field.name}" if above else field.name)
