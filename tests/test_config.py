"""Settings from YAML and environment: every fault at once, with its line and what was meant."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mcpctl import config, config_values
from mcpctl.config_keys import Settings
from mcpctl.errors import ConfigError, NotFoundError
from mcpctl.policy.roles import BUILT_IN
from mcpctl.tools.table import TOOLS

SHOP = "databases: {shop: {dsn: 'host=db dbname=shop'}}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "config.yaml"
    found.touch(0o600)
    return found


def load(path: Path, text: str | bytes, **environ: str) -> Settings:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return config.load(path, environ)


def faults(path: Path, text: str | bytes, **environ: str) -> list[str]:
    """The faults of a config that is not in order, without the file's folder."""
    with pytest.raises(ConfigError) as caught:
        load(path, text, **environ)
    assert caught.value.exit_code == 3
    assert caught.value.hint
    head, *lines = caught.value.message.splitlines()
    assert head == "the configuration is not in order:"
    return [line.strip().replace(f"{path.parent}/", "") for line in lines]


def test_an_empty_file_is_all_defaults(path: Path) -> None:
    for text in ("", "\n", "# nothing\n", "---\n", "{}", "server:\nauth: ~\ndatabases:\n"):
        found = load(path, text)
        assert found.server.port == 8080
        assert found.databases == {}
        assert found.auth.token_file == path.parent / "tokens.yaml"


def test_every_key_that_is_set_arrives(path: Path) -> None:
    found = load(
        path,
        """\
server:
  host: 0.0.0.0
  port: 0
  public_url: https://mcp.example.org/
  tls: {cert: tls/cert.pem, key: /etc/key.pem, chain: chain.pem}
  allowed_hosts: [mcp.example.org]
  trusted_proxies: [10.0.0.0/8, "::1"]
  workers: 4
auth: {token_lifetime: 30d, max_token_lifetime: 1y, token_file: a/t.yaml}
databases:
  shop: {dsn: postgresql://reader@db/shop, default: true, pool: {max_size: 2, wait: 250ms}}
  sales: {host: /run/pg, port: 5433, dbname: s, user: r, password_file: s.pw, limits: {max_rows: 7, max_bytes: 2MiB}}
limits: {statement_timeout: 1.5s, request_bytes: 64KiB, max_bytes: 1000}
audit: {statements: off, on_failure: warn}
log: {level: debug}
""",
    )
    assert (found.server.port, found.server.workers, found.server.public_url) == (0, 4, "https://mcp.example.org")
    assert (found.server.tls.cert, found.server.tls.key) == (path.parent / "tls/cert.pem", Path("/etc/key.pem"))
    assert [str(network) for network in found.server.trusted_proxies] == ["10.0.0.0/8", "::1/128"]
    assert found.auth.token_file == path.parent / "a/t.yaml"
    assert (found.auth.token_lifetime, found.auth.max_token_lifetime) == (30 * 86400, 365 * 86400)
    assert (found.databases["shop"].pool.wait, found.databases["shop"].pool.max_size) == (0.25, 2)
    assert found.databases["sales"].password_file == path.parent / "s.pw"
    assert found.databases["sales"].limits.max_bytes == 2 << 20
    assert (found.limits.statement_timeout, found.limits.request_bytes, found.limits.max_bytes) == (1.5, 65536, 1000)
    assert (found.audit.statements, found.audit.on_failure) == ("off", "warn")
    assert config.default_database(found) == "shop"
    assert found.source == path


def test_every_fault_is_told_at_once_with_its_line_and_what_was_meant(path: Path) -> None:
    text = """\
serverr: {}
server:
  prot: 8080
  port: 99999
  tls:
    cert: a.pem
  workers: no
databases:
  Shop: {dsn: x}
  shop:
    dns: host=db
  sales:
    dsn: host=db password=hunter2
  both: {dsn: host=db, host: db}
limits: {statement_timeout: 30, max_rows: 0, max_bytes: 1TB}
audit: {statements: some}
log: loud
"""
    found = faults(path, text)
    expected = [
        "config.yaml:1: serverr: there is no such key; did you mean server?",
        "config.yaml:3: server.prot: there is no such key; did you mean port?",
        "config.yaml:4: server.port: takes a whole number from 0 to 65535, not 99999",
        "config.yaml:5: server.tls: cert and key go together",
        "config.yaml:7: server.workers: takes a whole number from 1 to 64, not False",
        "config.yaml:9: databases.Shop: a name is a-z",
        "config.yaml:11: databases.shop.dns: there is no such key; did you mean dsn?",
        "config.yaml:10: databases.shop: needs dsn, or host",
        "config.yaml:13: databases.sales.dsn: holds a password",
        "config.yaml:14: databases.both: dsn, or host",
        "config.yaml:15: limits.statement_timeout: takes a duration such as",
        "config.yaml:15: limits.max_rows: takes a whole number from 1",
        "config.yaml:15: limits.max_bytes: takes a size such as",
        "config.yaml:16: audit.statements: takes one of full, hash, off, not 'some'",
        "config.yaml:17: log: expected keys and values below it",
    ]
    for one in expected:
        assert any(line.startswith(one) for line in found), (one, found)
    assert len(found) == len(expected)
    assert "hunter2" not in "".join(found)


@pytest.mark.parametrize(
    "text, told",
    [
        ("server: {port: 1, port: 2}", "config.yaml:1: port: stands there twice"),
        ("server: {port: 1}\nserver: {port: 2}", "config.yaml:2: server: stands there twice"),
        ("server: [1, 2]", "server: expected keys and values below it"),
        ("server: {port: {a: b}}", "server.port: expected one value, not keys below it"),
        ("server: {port: '8080'}", "server.port: takes a whole number"),
        ("server: {port: 1:20}", "server.port: takes a whole number"),
        ("server: {port: 010}", "server.port: takes a whole number"),
        ("server: {port: 80.5}", "server.port: takes a whole number"),
        ("server: {port: true}", "server.port: takes a whole number"),
        ("server: {port: -1}", "server.port: takes a whole number"),
        ("server: {port: " + "9" * 5000 + "}", "looks like a number"),
        ("server: {port: 2026-99-99}", "looks like a number or time"),
        ("server: {host: ''}", "server.host: takes a text"),
        ("server: {host: 5}", "server.host: takes a text"),
        ('server: {host: "a\\0b"}', "without control characters"),
        ('auth: {token_file: "a\\nb"}', "without control characters"),
        ('auth: {token_file: "\\x9b"}', "without control characters"),
        ("server: {allowed_hosts: a}", "takes a list of texts"),
        ("server: {allowed_hosts: [{a: b}]}", "takes a text, not [{'a': 'b'}]"),
        ("server: {trusted_proxies: [10.0.0.1/8]}", "an address or network such as"),
        ("server: {trusted_proxies: ['*']}", "an address or network such as"),
        ("server: {public_url: 'https://a@b'}", "server.public_url: takes a URL"),
        ("limits: {statement_timeout: 25d}", "config.yaml:1: limits.statement_timeout: takes a duration of 24d"),
        ("server: {public_url: 'https://b/path'}", "server.public_url: takes a URL"),
        ("server: {public_url: ftp://b}", "server.public_url: takes a URL"),
        ("server: {public_url: 'https://[::1'}", "server.public_url: takes a URL"),
        ("server: {public_url: 'https://x:abc'}", "server.public_url: takes a URL"),
        ("server: {public_url: 'https://x:99999'}", "server.public_url: takes a URL"),
        ("server: {public_url: 'https://é.example'}", "server.public_url: takes a URL"),
        ("server: {allowed_hosts: ['http://x/']}", "takes hosts such as"),
        ("server: {allowed_origins: ['http://x/']}", "takes origins such as"),
        ("server: {allowed_origins: ['http://x/path']}", "takes origins such as"),
        ("server: {allowed_origins: ['*']}", "takes origins such as"),
        ("server: {sse: 'yes'}", "takes true or false"),
        ("server: {sse: true, workers: 2}", "config.yaml:1: server.sse: its sessions live in one process"),
        ("server: {tls: {key: k.pem}}", "server.tls: cert and key go together"),
        ("server: {tls: {chain: k.pem}}", "server.tls.chain: goes with cert and key"),
        ("server: {workers: 30}\nlimits: {connections: 20}", "config.yaml:2: limits.connections: each of the 30"),
        ("auth: {token_lifetime: 2y, max_token_lifetime: 1y}", "auth.token_lifetime: is above"),
        ("auth: {token_lifetime: 0s}", "a duration of 1ms or more"),
        ("auth: {max_token_lifetime: 99999999y}", "a duration of 1000y at most"),
        ("limits: {statement_timeout: 0.1ms}", "a duration of 1ms or more"),
        ("limits: {statement_timeout: " + "9" * 400 + "y}", "1000y at most"),
        ("limits: {max_bytes: 0}", "a size from 1B"),
        ("limits: {max_bytes: -1}", "a size from 1B"),
        ("limits: {max_bytes: true}", "a size such as"),
        ("limits: {max_bytes: 9999999999GiB}", "a size from 1B to 1024GiB"),
        ("limits: {max_bytes: " + "9" * 5000 + "}", ""),
        ("auth: {token_file: '~no-such-user-at-all/x'}", "a path cannot be found"),
        ("databases: {a: {dsn: x, default: true}, b: {dsn: x, default: true}}", "only one can be the default"),
        ("databases: {a: 5}", "databases.a: expected keys and values below it"),
        ("databases: {a: }", "databases.a"),
        ("databases: {'a b': {dsn: x}}", "a name is a-z"),
        ("databases: {a: {host: ~}}", "needs dsn, or host"),
        ("databases: {a: {host: 'postgresql://u:hunter2@h/db'}}", "databases.a.host: is a URL"),
        ("databases: {a: {host: h, user: 'u:hunter2@h'}}", "databases.a.user: holds a password"),
        ("own_databases: {hosts: [h, '10.0.0.1/8', 'postgresql://u:hunter2@h']}", "(number 2 is none), not"),
        ("own_databases: {hosts: [h, 'postgresql://u:hunter2@h']}", "(number 2 is none), not what stands there"),
        ("databases: {a: {dsn: ['postgresql://u:hunter2@h/db']}}", "not what stands there"),
        ("port: 1", "did you mean server.port or metrics.port?"),
        ("SERVER: {port: 1}", "did you mean server?"),
        ("limits: {MAX_ROWS: 1}", "did you mean max_rows?"),
        ("databases: {a: {dsn: x, sslmode: verify-full}}", "not both"),
        ("databases: {a: {host: x, sslmode: maybe}}", "takes one of disable, allow"),
        ("a: &a [x]\nb: *a", "anchors and aliases are not taken"),
        ("server: &s {port: 1}", "anchors and aliases are not taken"),
        ("server: {<<: {port: 1}}", "server.<<: there is no such key"),
        ("server: !!python/object/apply:os.system ['true']", "the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("server: !!python/object:x {port: 1}", "is not plain data"),
        ("server: {port: !!int '8080'}", "is not plain data"),
        ("server: {port: !env PORT}", "is not plain data"),
        ("? [a, b]\n: c", "a key must be a text"),
        ("? {a: b}\n: c", "a key must be a text"),
        ("- a\n- b", "expected keys and values"),
        ("just text", "expected keys and values"),
        ("a: b\n---\nc: d", "config.yaml:2: "),
        ("a: [", "config.yaml:"),
        ("a: b: c", "config.yaml:1: not YAML"),
        ("a\tb: [\t", "not YAML"),
        ("\tserver:", "config.yaml:1: not YAML"),
        ("server: {host: \x07}", "config.yaml:1: not YAML"),
        ("%YAML 9.9\n---\na: b", "not YAML"),
        ("[" * 500_000, "nested deeper than"),
        ("{a: " * 500_000, "nested deeper than"),
        ("- " * 100_000, "nested deeper than"),
        ("".join(f"{' ' * i}a:\n" for i in range(2000)), "nested deeper than"),
        ("a: &a ['x','x']\n" + "".join(f"b{i}: &b{i} [*a,*a,*a,*a]\n" for i in range(100)), "anchors and aliases"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_line_and_never_crashes(path: Path, text: str, told: str) -> None:
    found = faults(path, text)
    assert any(told in line for line in found), found
    assert "hunter2" not in "".join(found)
    assert all(len(line) < 400 for line in found)


def test_bytes_that_are_no_utf8_are_told_with_their_line(path: Path) -> None:
    assert faults(path, b"server:\n  port: 1\n  host: \xff\n") == ["config.yaml:3: not UTF-8"]


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(max_size=80), st.text(alphabet="ab:{}[],-?&*!|>'\"%@`#~<= \n\t0", max_size=60)))
def test_any_text_is_settings_or_faults_and_nothing_else(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config.load(path, {})
    except ConfigError as problem:
        told = problem.message
    else:
        told = "config.yaml"
    assert "config.yaml" in told


@pytest.mark.parametrize(
    "dsn, held",
    [
        ("host=db dbname=shop user=reader", False),
        ("postgresql://reader@db/shop", False),
        ("postgresql://reader:@db/shop", False),
        ("postgresql://db/shop?application_name=a:b@c", False),
        ("postgresql://reader@db:5432/shop?sslmode=require", False),
        ("postgresql://db:5432,other:5433/shop", False),
        ("postgresql://reader@[::1]:5432/shop", False),
        ("host=db passfile=/x", False),
        ("postgresql://reader:secret@db/shop", True),
        ("postgres://:secret@db/shop", True),
        ("postgres://r:s@[::1]:5432,[::2]:5433/shop", True),
        ("postgres://r:s@[not closed/shop", True),
        ("postgres://r:a?b#c@db/shop", True),
        ("postgresql://db/shop?user=a&password=secret", True),
        ("postgresql://db/shop?pass%77ord=secret", True),
        ("postgresql://db/shop?sslpassword=secret", True),
        ("host=db password=secret", True),
        ("host='/tmp'password=secret", True),
        ("password = 'se cret' host=db", True),
        ("host=db\tpassword\n=\nx", True),
        ("host=db sslpassword=x", True),
    ],
)
def test_a_password_in_a_dsn_is_seen_however_libpq_would_take_it(dsn: str, held: bool) -> None:
    assert config_values.has_password(dsn) is held


def test_a_password_in_the_file_is_refused_and_not_repeated_wherever_the_file_is(tmp_path: Path) -> None:
    folder = tmp_path / "environment MCPCTL_X"  # a name that once let it pass
    folder.mkdir()
    path = folder / "config.yaml"
    path.touch(0o600)
    with pytest.raises(ConfigError) as caught:
        load(path, "databases:\n  shop:\n    dsn: postgresql://r:hunter2@db/shop\n")
    assert "config.yaml:3: databases.shop.dsn: holds a password" in caught.value.message
    assert "hunter2" not in caught.value.message


# -- the environment ---------------------------------------------------------------------------------------------


def test_a_variable_replaces_its_key_and_can_add_one(path: Path) -> None:
    found = load(
        path,
        "server: {port: 1}\n" + SHOP,
        MCPCTL_SERVER__PORT="2",
        MCPCTL_SERVER__ALLOWED_HOSTS="[a.example, b.example]",
        MCPCTL_SERVER__TLS__CERT="c.pem",
        MCPCTL_SERVER__TLS__KEY="k.pem",
        MCPCTL_AUTH__TOKEN_LIFETIME="12h",
        MCPCTL_AUDIT__STATEMENTS="off",
        MCPCTL_SERVER__SSE="true",
        MCPCTL_DATABASES__SALES__HOST="db",
        MCPCTL_DATABASES__SALES__DBNAME="123",
        MCPCTL_DATABASES__SALES__USER="no",
        OTHER="x",
    )
    assert (found.server.port, found.server.sse, found.audit.statements) == (2, True, "off")
    assert found.server.allowed_hosts == ("a.example", "b.example")
    assert found.server.tls.cert == path.parent / "c.pem"
    assert found.auth.token_lifetime == 43200
    assert set(found.databases) == {"shop", "sales"}
    assert (found.databases["sales"].dbname, found.databases["sales"].user) == ("123", "no")


def test_a_variable_can_mend_what_is_wrong_in_the_file(path: Path) -> None:
    assert load(path, "server: {port: x}", MCPCTL_SERVER__PORT="5").server.port == 5


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("MCPCTL_SERVER__PROT", "1", "server.prot: there is no such key; did you mean port?"),
        ("MCPCTL_SEVER__PORT", "1", "sever: there is no such key; did you mean server?"),
        ("MCPCTL_PROT", "1", "names no key; the form is MCPCTL_<SECTION>__<KEY>"),
        ("MCPCTL_DATABSE_URL", "x", "did you mean MCPCTL_DATABASE_URL?"),
        ("MCPCTL_SERVER", "1", "names no key"),
        ("MCPCTL_SERVER__", "1", "server.: there is no such key"),
        ("MCPCTL_SERVER__PORT__X", "1", "server.port"),
        ("MCPCTL_SERVER__PORT", "http", "server.port: takes a whole number from 0 to 65535, not 'http'"),
        ("MCPCTL_SERVER__PORT", "", "server.port: takes a whole number"),
        ("MCPCTL_SERVER__PORT", "9" * 5000, "server.port: takes a whole number"),
        ("MCPCTL_SERVER__PORT", "2026-99-99", "server.port: takes a whole number"),
        ("MCPCTL_SERVER__HOST", "[" * 100_000, "server.host"),
        ("MCPCTL_SERVER__HOST", "&a [*a]", "server.host"),
        ("MCPCTL_SERVER__HOST", "\udcff", "server.host: takes a text without control characters"),
        ("MCPCTL_SERVER__SSE", "yes please", "takes true or false"),
        ("MCPCTL_SERVER_PORT", "9", "did you mean MCPCTL_SERVER__PORT?"),
        ("MCPCTL_PORT", "9", "did you mean MCPCTL_SERVER__PORT or MCPCTL_METRICS__PORT?"),
        ("MCPCTL_TOKEN_FILE", "x", "did you mean MCPCTL_AUTH__TOKEN_FILE?"),
        ("MCPCTL_SERVER", "x", "did you mean MCPCTL_SERVER__"),
        ("MCPCTL_DATABASES__SHOP", "x", "databases.shop: expected keys and values below it"),
        ("MCPCTL_DATABASES__A.B__DSN", "x", "a name is a-z"),
    ],
)  # fmt: skip
def test_a_variable_with_a_typo_is_a_fault_like_one_in_the_file(path: Path, name: str, value: str, told: str) -> None:
    if name == "MCPCTL_SERVER__HOST" and "control" not in told:
        assert load(path, SHOP, **{name: value}).server.host == value  # a text, if a strange one
        return
    found = faults(path, SHOP, **{name: value})
    assert any(told in line and name in line for line in found), found
    assert all(len(line) < 400 for line in found)


def test_what_kubernetes_puts_into_the_environment_of_a_service_of_our_name_is_no_typo(path: Path) -> None:
    load(
        path,
        SHOP,
        MCPCTL_SERVICE_HOST="10.0.0.1",
        MCPCTL_SERVICE_PORT="8080",
        MCPCTL_SERVICE_PORT_HTTP="8080",
        MCPCTL_PORT="tcp://10.0.0.1:8080",
        MCPCTL_PORT_8080_TCP="tcp://10.0.0.1:8080",
        MCPCTL_PORT_8080_TCP_PROTO="tcp",
        MCPCTL_PORT_8080_TCP_PORT="8080",
        MCPCTL_PORT_8080_TCP_ADDR="10.0.0.1",
    )


@pytest.mark.parametrize("text", ["", "databases:\n  # none yet\n", "databases: {}\n", "server: {port: 5}\n"])
def test_a_database_url_is_a_database_named_default_beside_whatever_the_file_has(path: Path, text: str) -> None:
    found = load(path, text, MCPCTL_DATABASE_URL="postgresql://r:secret@db/shop")
    assert found.databases["default"].dsn == "postgresql://r:secret@db/shop"


def test_a_database_url_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find", lambda *_: None)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    found = config.load(None, {"MCPCTL_DATABASE_URL": "postgresql://r:secret@db/shop"})
    assert found.source is None
    assert list(found.databases) == ["default"]
    assert config.default_database(found) == "default"
    with pytest.raises(NotFoundError) as caught:
        config.load(None, {})
    assert caught.value.exit_code == 3
    with pytest.raises(NotFoundError):
        config.load(None, {"MCPCTL_DATABASE_URL": ""})


def test_a_database_url_beside_a_database_named_default_is_a_conflict(path: Path) -> None:
    text = "databases: {default: {dsn: host=db}}\n"
    assert "named `default` too" in faults(path, text, MCPCTL_DATABASE_URL="postgresql://db/x")[0]


def test_a_password_in_a_variables_dsn_is_taken_since_it_is_in_no_file(path: Path) -> None:
    text = "databases:\n  shop: {dsn: host=db, description: a shop}\n"
    found = load(path, text, MCPCTL_DATABASES__SHOP__DSN="postgresql://r:secret@db/shop")
    assert found.databases["shop"].dsn == "postgresql://r:secret@db/shop"
    assert found.databases["shop"].description == "a shop"


# -- the file ----------------------------------------------------------------------------------------------------


def test_the_file_may_be_0640_and_no_more(path: Path) -> None:
    path.chmod(0o640)
    load(path, SHOP)
    for mode in (0o644, 0o660, 0o604, 0o666):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=f"{mode:04o}"):
            config.load(path, {})


def test_a_file_that_is_missing_a_folder_or_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name in ("none.yaml", "none/none.yaml", ".", "fifo", "x" * 300):
        with pytest.raises((ConfigError, NotFoundError)) as caught:
            config.load(tmp_path / name, {})
        assert caught.value.exit_code == 3


def test_a_file_of_more_than_four_megabytes_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="larger than"):
        load(path, "#" * (5 << 20))


def test_the_file_is_the_one_named_then_the_variables_then_the_systems_then_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    own = tmp_path / "mcpctl" / "config.yaml"
    own.parent.mkdir()
    own.touch()
    if not Path("/etc/mcpctl/config.yaml").exists():
        assert config.find(None, {}) == own
    assert config.find(None, {"MCPCTL_CONFIG": "/named/by/variable"}) == Path("/named/by/variable")
    assert config.find(Path("here.yaml"), {"MCPCTL_CONFIG": "/x"}) == Path.cwd() / "here.yaml"
    assert config.find(None, {"MCPCTL_CONFIG": ""}) != Path()


def test_a_user_without_a_home_has_no_config_of_its_own_and_nothing_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    if not Path("/etc/mcpctl/config.yaml").exists():
        assert config.find(None, {}) is None
    config.load(None, {"MCPCTL_DATABASE_URL": "postgresql://db/x"})


def test_a_relative_config_folder_of_the_environment_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert config.default_folder().is_absolute()


def test_one_database_is_the_default_and_of_several_the_one_that_says_so(path: Path) -> None:
    assert config.default_database(load(path, SHOP)) == "shop"
    two = "databases:\n  a: {dsn: host=a}\n  b: {dsn: host=b}\n"
    assert config.default_database(load(path, two)) is None
    assert config.default_database(load(path, two.replace("host=b", "host=b, default: true"))) == "b"
    assert config.default_database(load(path, "")) is None


def test_a_role_that_gives_nothing_that_there_is_or_has_a_built_in_name_is_a_fault(path: Path) -> None:
    text = (
        "auth:\n"
        "  roles:\n"
        "    a: {permissions: ['tool:*']}\n"
        "    b: {permissions: ['databases:shop:reed', 'databases:shop:read']}\n"
        "    c: {permissions: ['tools:whoami', 'databases:nope:read']}\n"
        "    mcp-user: {permissions: ['*']}\n"
    )
    assert faults(path, text + SHOP) == [
        "config.yaml:3: auth.roles.a.permissions: tool:* covers nothing that there is",
        "config.yaml:4: auth.roles.b.permissions: databases:shop:reed covers nothing that there is; "
        "did you mean databases:shop:read?",
        "config.yaml:5: auth.roles.c.permissions: databases:nope:read covers nothing that there is; "
        "did you mean databases:shop:read?",
        "config.yaml:6: auth.roles.mcp-user: names that begin with mcp- are the built-in roles'",
    ]
    good = ["*", "tools:*", "tools:whoami", "databases:*", "databases:shop:*", "databases:*:write", "*:whoami"]
    assert load(path, f"auth: {{roles: {{a: {{permissions: {good}}}}}}}\n{SHOP}").auth.roles["a"].permissions


def test_a_permission_can_name_each_tool_and_access_that_there_is() -> None:
    assert set(config.TOOLS) == set(TOOLS)
    assert {tool.access for tool in TOOLS.values()} <= set(config.ACCESSES)
    assert all(name.startswith(config._BUILT_IN) for name in BUILT_IN)
