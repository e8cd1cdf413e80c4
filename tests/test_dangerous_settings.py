"""Which settings the config may list, held to what PostgreSQL's own versions have."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

import pg
from mcpctl import config, dangerous_settings
from mcpctl.errors import ConfigError
from mcpctl.postgres.embedded import Binaries, Cluster

HARMLESS = {
    "application_name",
    "backtrace_functions",
    "cluster_name",
    "datestyle",
    "debug_io_direct",
    "default_table_access_method",
    "default_tablespace",
    "default_text_search_config",
    "event_source",
    "lc_messages",
    "lc_monetary",
    "lc_numeric",
    "lc_time",
    "log_connections",
    "log_destination",
    "log_line_prefix",
    "log_timezone",
    "primary_slot_name",
    "recovery_target",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "restrict_nonsystem_relation_kind",
    "synchronized_standby_slots",
    "synchronous_standby_names",
    "syslog_ident",
    "temp_tablespaces",
    "timezone",
    "timezone_abbreviations",
    "wal_consistency_checking",
}
"""Settings that take a text and name no program, library, file or address: looked at one by one."""
TAKEOVERS = [
    "archive_command",
    "archive_library",
    "archive_cleanup_command",
    "recovery_end_command",
    "restore_command",
    "ssl_passphrase_command",
    "shared_preload_libraries",
    "session_preload_libraries",
    "local_preload_libraries",
    "jit_provider",
    "dynamic_library_path",
    "extension_control_path",
    "oauth_validator_libraries",
    "data_directory",
    "hba_file",
    "ident_file",
    "config_file",
    "external_pid_file",
    "log_directory",
    "log_filename",
    "log_file_mode",
    "promote_trigger_file",
    "unix_socket_directories",
    "unix_socket_permissions",
    "unix_socket_group",
    "listen_addresses",
    "port",
    "primary_conninfo",
    "password_encryption",
    "scram_iterations",
    "krb_server_keyfile",
    "krb_caseins_users",
    "gss_accept_delegation",
    "ssl",
    "ssl_ca_file",
    "ssl_ciphers",
    "ssl_min_protocol_version",
    "db_user_namespace",
    "search_path",
    "session_replication_role",
    "event_triggers",
    "allow_system_table_mods",
    "allow_in_place_tablespaces",
    "lo_compat_privileges",
    "createrole_self_grant",
    "standard_conforming_strings",
    "backslash_quote",
    "plperl.on_init",
    "plperl.on_plperlu_init",
    "pltcl.start_proc",
    "basebackup_to_shell.command",
    "cron.host",
    "pgsodium.getkey_script",
    "pljava.vmoptions",
    "pljava.libjvm_location",
    "anon.salt",
    "some.api_key",
]
USUAL = [
    "work_mem",
    "maintenance_work_mem",
    "shared_buffers",
    "effective_cache_size",
    "max_connections",
    "random_page_cost",
    "max_files_per_process",
    "autovacuum",
    "autovacuum_naptime",
    "log_min_duration_statement",
    "log_statement",
    "log_temp_files",
    "log_hostname",
    "log_replication_commands",
    "statement_timeout",
    "idle_in_transaction_session_timeout",
    "wal_level",
    "max_wal_size",
    "checkpoint_timeout",
    "track_io_timing",
    "default_statistics_target",
    "temp_file_limit",
    "authentication_timeout",
    "auto_explain.log_min_duration",
    "pg_stat_statements.max",
    "pg_stat_statements.track",
    "plpgsql.extra_warnings",
    "remove_temp_files_after_crash",
    "debug_print_plan",
    "superuser_reserved_connections",
]


@pytest.mark.parametrize("binaries", pg.supported(), ids=str)
def test_each_setting_that_takes_a_text_was_judged(binaries: Binaries) -> None:
    with Cluster.start(binaries) as cluster, psycopg.connect(cluster.dsn) as connection:
        found = connection.execute(
            "SELECT lower(name) FROM pg_settings WHERE vartype = 'string' AND context <> 'internal'"
        ).fetchall()
    names = {name for (name,) in found}
    assert len(names) > 50
    assert {name for name in names if dangerous_settings.why(name) is None} == names & HARMLESS


def load(tmp_path: Path, value: str, roles: str = "per_user") -> tuple[str, ...]:
    file = tmp_path / "config.yaml"
    file.touch(0o600)
    file.write_text(f"databases:\n  shop:\n    host: localhost\n    roles: {roles}\n    settings: {value}\n")
    return config.load(file, {}).databases["shop"].settings


@pytest.mark.parametrize("name", TAKEOVERS)
def test_a_setting_that_would_hand_the_server_over_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    reason = dangerous_settings.why(name)
    assert reason
    with pytest.raises(ConfigError) as problem:
        load(tmp_path, f"[work_mem, {name}]")
    assert "config.yaml:5: databases.shop.settings" in problem.value.message
    assert f"{reason}: leave out {name}" in problem.value.message


def test_every_setting_that_is_refused_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as problem:
        load(tmp_path, "[archive_command, Work_Mem, search_path, Odd]")
    for said in ("leave out archive_command", "'Work_Mem' is none", "leave out search_path", "'Odd' is none"):
        assert said in problem.value.message


def test_the_usual_settings_may_be_listed(tmp_path: Path) -> None:
    assert load(tmp_path, f"[{', '.join(USUAL)}]") == tuple(USUAL)


@pytest.mark.parametrize(
    "value", ["[Work_Mem]", "['work mem']", "['work_mem; --']", "['']", "[1]", "work_mem", "['*']"]
)
def test_what_is_no_name_of_a_setting_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"databases\.shop\.settings"):
        load(tmp_path, value)


def test_settings_go_with_logins_of_the_users_own_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs roles: per_user"):
        load(tmp_path, "[work_mem]", roles="shared")
    assert load(tmp_path, "[]", roles="shared") == ()
