"""The SQL that makes the login role of a shared login: one that can only read.

PostgreSQL, "CREATE ROLE", "GRANT", "ALTER DEFAULT PRIVILEGES". The password goes as its SCRAM verifier, so that neither
this text nor PostgreSQL's log holds it.
"""

from mcpctl.identity.grants import identifier
from mcpctl.postgres import scram
from mcpctl.postgres.roles import literal, script

CONNECTIONS = 24
"""The role's CONNECTION LIMIT: the 20 of limits.connections, and room for a command."""


def sql(dbname: str, role: str, password: str | None) -> str:
    """What a superuser runs in that database, all of it or nothing; it fails where the role is there. Without a
    password, which has to be one made here, psql asks for one."""
    name = identifier(role)
    given = f"ALTER ROLE {name} PASSWORD {literal(scram.verifier(role, password))};\n" if password else ""
    body = f"""\
CREATE ROLE {name} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS CONNECTION LIMIT {CONNECTIONS};
{given}ALTER ROLE {name} SET default_transaction_read_only = on;
ALTER ROLE {name} SET statement_timeout = '30s';
ALTER ROLE {name} SET temp_file_limit = '256MB';
GRANT CONNECT ON DATABASE {identifier(dbname)} TO {name};
GRANT USAGE ON SCHEMA public TO {name};
GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name};
-- for tables to come, of the role that runs this; others say it themselves, or FOR ROLE
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO {name};
"""
    asked = "" if password else f"\\password {name}\n"
    return script(body, f"mcpctl: a login role that can only read {dbname}. Connect to it, as a superuser.") + asked
