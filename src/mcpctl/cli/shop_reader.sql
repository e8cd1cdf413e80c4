-- A login role that can read the database `shop` and do nothing else. Run as a superuser, connected to `shop`, after
-- its tables are there; the caller then sets the role's password (as a SCRAM verifier), and hardens the database.

CREATE ROLE shop_reader LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS CONNECTION LIMIT 60;
COMMENT ON ROLE shop_reader IS 'mcpctl demo: reads the shop';

-- The first four are defaults that a session may change; temp_file_limit only a superuser can.
ALTER ROLE shop_reader SET default_transaction_read_only = on;
ALTER ROLE shop_reader SET statement_timeout = '30s';
ALTER ROLE shop_reader SET idle_in_transaction_session_timeout = '60s';
ALTER ROLE shop_reader SET client_connection_check_interval = '1s';
ALTER ROLE shop_reader SET temp_file_limit = '256MB';

-- What PUBLIC holds, every role holds: temporary tables, and the doors into the other databases, which are not hardened.
REVOKE ALL ON DATABASE shop, postgres, template1 FROM PUBLIC;
REVOKE ALL ON SCHEMA public FROM PUBLIC;

GRANT CONNECT ON DATABASE shop TO shop_reader;
GRANT USAGE ON SCHEMA public TO shop_reader;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO shop_reader;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO shop_reader;
