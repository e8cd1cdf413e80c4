"""Settings of PostgreSQL that nobody may change through mcpctl, whatever the config lists, and why.

Whoever may change one of them runs programs or loads code as the server's own system user, moves its files or doors,
weakens its logins, or has other people's SQL mean something else. The names are those of `pg_settings` of PostgreSQL 15
to 18; of an extension's settings (`plperl.on_init`) the end of the name tells. Source: the PostgreSQL manual, "Server
Configuration"; a test holds each text setting of the servers at hand to this list.
"""

import re

_PROGRAM = "names a program or a function that the server runs"
_LIBRARY = "names code that the server loads, or where it looks for it"
_FILE = "names the server's files or folders, or who may read them"
_DOOR = "says where the server listens, or where it connects to"
_LOGIN = "decides how logins are checked and connections encrypted"
_MEANING = "changes what the SQL of other roles does, or switches off what guards it"
_SECRET = "may hold a password or a key"  # noqa: S105 - a reason, not a password

_BY_NAME = {
    **dict.fromkeys(("jit_provider", "extension_destdir", "jit_dump_bitcode", "jit_profiling_support"), _LIBRARY),
    **dict.fromkeys(("log_file_mode", "data_directory_mode", "allow_in_place_tablespaces"), _FILE),
    **dict.fromkeys(("listen_addresses", "port", "bonjour", "bonjour_name"), _DOOR),
    **dict.fromkeys(("password_encryption", "scram_iterations", "db_user_namespace"), _LOGIN),
    **dict.fromkeys(
        ("search_path", "session_replication_role", "event_triggers", "role", "session_authorization"),
        _MEANING,
    ),
    **dict.fromkeys(("standard_conforming_strings", "backslash_quote", "client_encoding"), _MEANING),
    **dict.fromkeys(
        ("allow_system_table_mods", "allow_alter_system", "lo_compat_privileges", "createrole_self_grant"), _MEANING
    ),
    "sepgsql.permissive": _MEANING,
}
_BY_FORM = (
    (re.compile(r"(^|[_.])(commands?|scripts?|shell|proc|init|vmoptions)$"), _PROGRAM),
    (re.compile(r"(^|[_.])librar(y|ies)$|(^|[_.])(lib\w*_location|\w*path)$"), _LIBRARY),
    (re.compile(r"(file|filename|files|dir|directory|directories|folder|location)$"), _FILE),
    (re.compile(r"^unix_socket_|(conninfo|dsn|url|uri|hostname|addresses)$|\.(host|port)$"), _DOOR),
    (re.compile(r"^(ssl|krb|gss|oauth|ldap|pam|radius)(_|$)"), _LOGIN),
    (re.compile(r"(^|[_.])(passwords?|passphrase|secret|salt|key|keys|token)$"), _SECRET),
)
_NOT_AS_THEY_SOUND = frozenset({"log_hostname", "log_replication_commands", "log_temp_files"})
"""Names of which the form says too much."""


def why(name: str) -> str | None:
    """Why a setting of that name (in lower case) is never changed through mcpctl; None where it may be listed."""
    if name in _NOT_AS_THEY_SOUND:
        return None
    return _BY_NAME.get(name) or next((reason for form, reason in _BY_FORM if form.search(name)), None)
