"""What `server.profile: production` asks of the rest of the configuration: what is only for trying is a fault there."""

from collections.abc import Iterator

from mcpctl.config_keys import Settings

PRODUCTION = "production"
_WANTS = "server.profile is production"


def faults(settings: Settings) -> Iterator[tuple[str, str]]:
    """(key, what is wrong)."""
    if settings.server.profile != PRODUCTION:
        return
    if settings.server.tls.cert is None and not settings.server.trusted_proxies:
        text = "and tokens must not go in clear; give cert and key, or server.trusted_proxies for a proxy that has them"
        yield "server.tls", f"{_WANTS}, {text}"
    if settings.auth.max_token_lifetime is None:
        yield "auth.max_token_lifetime", f"{_WANTS}, and every token must end; such as 90d"
    if settings.auth.credentials_in_url:
        yield "auth.credentials_in_url", f"{_WANTS}, and others log URLs; take it out"
    if settings.audit.on_failure != "refuse":
        yield "audit.on_failure", f"{_WANTS}, and no call goes unrecorded; say refuse"
    for name, database in settings.databases.items():
        if database.allow_privileged_login:
            yield f"databases.{name}.allow_privileged_login", f"{_WANTS}; log in as a role that can only read"
