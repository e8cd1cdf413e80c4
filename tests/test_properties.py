"""What holds for any text that comes from outside: it is taken for what it is, or refused with an Error; never more."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import json
import string
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mcpctl import config, config_values, plain_yaml, private_file
from mcpctl.audit import log as audit_log
from mcpctl.audit.log import AuditLog
from mcpctl.config_keys import Settings
from mcpctl.errors import ConfigError, Error, UsageError
from mcpctl.identity import grants, tenants, tokens, users
from mcpctl.identity.entry_file import EntryFile
from mcpctl.identity.grants import Grant
from mcpctl.identity.tenants import Tenant
from mcpctl.identity.tokens import Token
from mcpctl.identity.users import User
from mcpctl.postgres import own_login
from mcpctl.server import credentials
from mcpctl.server.credentials import Gatekeeper

QUICK = settings(max_examples=60)
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
HASH = tokens.CHEAP_ARGON2ID.hash("x")
anything = st.text(max_size=60) | st.text(alphabet=":{}[],-?&*!|>'\"%@`#~<= \n\t\0/=.0aé", max_size=60)
times = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)).map(lambda at: at.replace(microsecond=0, tzinfo=UTC))
names = st.from_regex(r"[a-z][a-z0-9-]{0,30}", fullmatch=True)
ids = st.text(string.ascii_lowercase + string.digits, min_size=8, max_size=8)
notes = st.none() | st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=60)
raw_headers = st.lists(
    st.tuples(
        st.sampled_from([b"authorization", b"x-api-key", b"x-session-id", b"host", b"origin", b"x-forwarded-for"]),
        st.binary(max_size=60) | st.sampled_from([b"Bearer x", b"10.0.0.1, 192.0.2.7", b"::1", b"127.0.0.1:8080"]),
    ),
    max_size=6,
)

# -- texts ---------------------------------------------------------------------------------------------------------


@QUICK
@given(st.data())
def test_of_a_token_every_text_but_itself_is_another(data: st.DataObject) -> None:
    """One letter changed, left out, put in or moved: the checksum says so, before any hash."""
    name, text = tokens.mint()
    assert tokens.token_id(text) == name
    at = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.characters())
    changed = data.draw(
        st.sampled_from([
            text[:at] + letter + text[at + 1 :], text[:at] + text[at + 1 :], text[:at] + letter + text[at:],
            text[:at] + text[at : at + 2][::-1] + text[at + 2 :], text[at:] + text[:at], text + letter, letter + text,
        ])
    )  # fmt: skip
    assert tokens.token_id(changed) == (name if changed == text else None)


@QUICK
@given(st.integers(1, 999), st.sampled_from("hdwy"), times)
def test_a_lifetime_is_what_it_says_whenever_it_begins(number: int, unit: str, now: datetime) -> None:
    hours = {"h": 1, "d": 24, "w": 7 * 24, "y": 365 * 24}[unit]
    assert tokens.parse_expiry(f"{number}{unit}", now) == now + timedelta(hours=number * hours)
    at = tokens.parse_expiry(users.rfc3339(now), now - timedelta(seconds=1))
    assert at == now


@QUICK
@given(anything | st.from_regex(r"[0-9]{1,30}(\.[0-9]{1,30})?(ms|s|m|h|d|w|y)?", fullmatch=True))
def test_any_text_is_a_lifetime_in_the_future_or_an_error(text: str) -> None:
    with contextlib.suppress(Error):
        found = tokens.parse_expiry(text, NOW)
        assert found is None or found > NOW
    with contextlib.suppress(ValueError):
        assert 0 <= config_values.duration(text) <= 1000 * 366 * 86400


@QUICK
@given(anything)
def test_any_text_is_a_name_of_a_table_that_reads_back_the_same_or_an_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        found = grants.parse(text)
        assert grants.parse(str(found)) == found


@QUICK
@given(anything | st.from_regex(r"postgres(ql)?://[a-z@:/?=&%.\[\]0-9 -]{0,50}", fullmatch=True))
@example("postgresql://reader:a%40b@[::1]:5432/sales")
@example("host=db hostaddr=10.0.0.1 dbname=a user=b")
@example("host=/tmp dbname=a user=b")
@example("host=a,b dbname=a user=b")
def test_any_text_is_a_connection_to_one_host_or_an_error(text: str) -> None:
    with contextlib.suppress(Error):
        found = own_login.parse(text)
        assert 0 < found.port < 65536
        assert not {"/", ",", "%", " ", "\0"} & set(found.host)


# -- files ---------------------------------------------------------------------------------------------------------


@QUICK
@given(st.dictionaries(ids, st.tuples(times, notes, st.none() | names), max_size=5))
def test_any_tokens_that_are_written_read_back_equal(entries: dict[str, Any]) -> None:
    file = tokens.token_file(Path("tokens.yaml"))
    made = {name: Token(name, user, HASH, at, note=note) for name, (at, note, user) in entries.items()}
    assert file._parse(file.render(made)) == made


schemas = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=15).map(grants.quoted)


@QUICK
@given(
    st.dictionaries(names, st.tuples(times, notes, st.lists(schemas, min_size=1, unique=True, max_size=3)), max_size=5)
)
def test_any_users_and_tenants_that_are_written_read_back_equal(entries: dict[str, Any]) -> None:
    file = users.user_file(Path("users.yaml"))
    made = {
        name: User(name, at, note=note, grants={"shop": Grant("shop", read=tuple(read))})
        for name, (at, note, read) in entries.items()
    }
    assert file._parse(file.render(made)) == made
    places = tenants.tenant_file(Path("tenants.yaml"))
    own = {
        name: Tenant(name=name, database=f"db-{name}"[:30], created_at=at, note=note)
        for name, (at, note, _) in entries.items()
    }
    assert places._parse(places.render(own)) == own


FILES: list[EntryFile[Any]] = [
    tokens.token_file(Path("tokens.yaml")),
    users.user_file(Path("users.yaml")),
    tenants.tenant_file(Path("tenants.yaml")),
]
HEAD = b"version: 1\ntokens:\n  ab12cd34: {user: alice, created_at: 2026-11-20T12:00:00Z}\n"


@QUICK
@given(st.binary(max_size=200) | anything.map(lambda text: HEAD + text.encode("utf-8", "surrogatepass")))
@example(b"\xef\xbb\xbfversion: 1\n")
@example(b"a: &a [x]\nb: *a\n")
@example(b"? [a]\n: b\n")
@example(b"version: 1\ntokens: {" + b"a: {" * 5000)
@example(b"version: 1\ntokens: " + b"[" * 100_000)
@example(b"version: 1e400\ntokens: 2026-02-30\n")
def test_any_bytes_are_entries_or_a_config_error_and_nothing_else(data: bytes) -> None:
    for file in FILES:
        with contextlib.suppress(ConfigError):
            assert isinstance(file._parse(data), dict)
    faults: list[str] = []
    plain_yaml.as_plain(plain_yaml.parse(data, Path("config.yaml"), faults))
    assert all("config.yaml" in fault for fault in faults)


_PIECES = [
    "user", "note", "a", "alice", "shop", "yes", "No", "null", "~", "on", "2026-11-20", "12:00:00Z", "1e3", "0x1", ".5",
    "it's", "'", "''", '"', ": ", ":", ", ", ",", "[", "]", "{", "}", " ", "  ", "\t", "#", " #", "-", "- ", "&a", "*a",
    "!", "|", ">", "%", "@", "`", "?", "? ", "=", "<<", "\\", "/", ".", "_", "é", "ß", "²", "٣", "你", "\u00a0",
    "\u2028", "\x85", "\ufeff", "\r", "\x00", "tools:*", "10.0.0.0/8", "10.1.2.3", "$argon2id$v=19$m=8,t=1,p=1$a+/b",
]  # fmt: skip


def _one_line(random: Random) -> str:
    """A mapping as we write it, of texts that may mean something else; then, perhaps, changed in one or two places."""

    def text() -> str:
        made = "".join(random.choices(random.choice([_PIECES, _PIECES[:8]]), k=random.randint(1, 3)))
        return random.choice([made, f"'{made}'"])

    values = [random.choice([text(), f"[{', '.join(text() for _ in range(random.randint(0, 3)))}]"]) for _ in range(3)]
    made = f"{{{', '.join(f'{key}: {value}' for key, value in zip(('user', 'note', 'null'), values, strict=True))}}}"
    for _ in range(random.choice([0, 0, 1, 2])):
        at = random.randrange(len(made))
        made = made[:at] + random.choice(["", random.choice(_PIECES)]) + made[at + random.randint(0, 2) :]
    return made


def test_a_line_that_is_read_without_the_parser_says_what_it_says_to_the_parser() -> None:
    random, taken = Random(1), 0
    for _ in range(6000):
        text = _one_line(random)
        fields = plain_yaml.one_line(text)
        if fields is not None:
            faults: list[str] = []
            tree = plain_yaml.parse(f"version: 1\ntokens:\n  ab12cd34: {text}\n".encode(), Path("x"), faults)
            assert (text, faults, plain_yaml.as_plain(tree)["tokens"]) == (text, [], {"ab12cd34": fields})
            taken += 1
    assert taken > 1000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("any") / "config.yaml"
    private_file.create(found, b"")
    return found


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | anything,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["host", "a"]), inner, max_size=3),
    max_leaves=8,
)


@QUICK
@given(
    st.dictionaries(st.sampled_from(["server", "auth", "databases", "limits", "audit", "log", "x"]), plain, max_size=4)
)
def test_any_values_are_settings_or_one_config_error(path: Path, values: dict[str, Any]) -> None:
    import yaml

    path.write_bytes(yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass"))
    with contextlib.suppress(ConfigError):
        assert isinstance(config.load(path, {}), Settings)


@QUICK
@given(
    st.dictionaries(
        st.sampled_from(["MCPCTL_LIMITS__RATE", "MCPCTL_SERVER__HOST", "MCPCTL_DATABASE_URL", "MCPCTL_X"]), anything
    )
)
def test_any_environment_is_settings_or_one_config_error(path: Path, environ: dict[str, str]) -> None:
    path.write_bytes(b"")
    with contextlib.suppress(ConfigError):
        assert isinstance(config.load(path, environ), Settings)


# -- headers -------------------------------------------------------------------------------------------------------

PROXIES = tuple(config_values.network(one) for one in ("10.0.0.0/8", "::1", "127.0.0.1"))
AT_THE_DOOR = Gatekeeper(frozenset({"127.0.0.1:8080"}), frozenset({"http://127.0.0.1:8080"}), PROXIES, "x", False)
addresses = st.ip_addresses().map(str) | st.sampled_from(["10.1.2.3", "::ffff:10.1.2.3", "::1", "127.0.0.1"])


@QUICK
@given(raw_headers)
def test_any_headers_are_a_credential_and_an_address_or_an_error(headers: list[tuple[bytes, bytes]]) -> None:
    with contextlib.suppress(Error):
        AT_THE_DOOR.check(headers)
    with contextlib.suppress(Error):
        text = credentials.token(headers)
        assert text is None or sum(key in (b"authorization", b"x-api-key") for key, _ in headers) == 1
    with contextlib.suppress(UsageError):
        ipaddress.ip_address(AT_THE_DOOR.address(headers, "127.0.0.1") or "")


@pytest.mark.parametrize(
    "said, found",
    [
        ("192.0.2.1:5678", "192.0.2.1"),
        ("198.51.100.1, [2001:db8::1]:44", "2001:db8::1"),
        ('"[2001:db8::1]"', "2001:db8::1"),
        ("[::ffff:192.0.2.1]:1", "192.0.2.1"),
        ("2001:0DB8:0:0:0:0:0:1", "2001:db8::1"),
        *(
            (text, None)
            for text in (
                "," * 16_000,
                ",".join(["127.0.0.1"] * 99),
                "",
                "unknown",
                "192.0.2.1:x",
                "[192.0.2.1",
                "192.0.2.1,",
                "2001:db8::1%x",
            )
        ),
    ],
)
def test_an_address_with_a_port_is_one_and_what_is_none_is_not_the_proxys(said: str, found: str | None) -> None:
    headers = [(b"x-forwarded-for", said.encode())]
    if found is not None:
        assert AT_THE_DOOR.address(headers, "127.0.0.1") == found
        return
    with pytest.raises(UsageError, match=r"is no address|more than 32"):
        AT_THE_DOOR.address(headers, "127.0.0.1")


def _trusted(text: str) -> bool:
    address = ipaddress.ip_address(text)
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address.version == one.version and address in one for one in PROXIES)


@QUICK
@given(st.lists(addresses, max_size=5), addresses)
def test_the_clients_address_is_a_proxys_only_where_all_are(hops: list[str], peer: str) -> None:
    headers = [(b"x-forwarded-for", ", ".join(hops).encode())] if hops else []
    if _trusted(peer) and not hops:
        with pytest.raises(UsageError, match="sent no X-Forwarded-For"):
            AT_THE_DOOR.address(headers, peer)
        return
    found = AT_THE_DOOR.address(headers, peer)
    assert found is not None
    assert _trusted(found) == all(map(_trusted, [*hops, peer])) or not _trusted(peer)
    if not _trusted(peer):
        assert ipaddress.ip_address(found) in (ipaddress.ip_address(peer), _mapped(peer))


def _mapped(text: str) -> Any:
    return getattr(ipaddress.ip_address(text), "ipv4_mapped", None)


@QUICK
@given(st.binary(max_size=80), st.sampled_from([b"", b"http://", b"https://", b"HTTP://"]))
def test_any_target_is_a_path_or_an_error(target: bytes, scheme: bytes) -> None:
    scope = {"raw_path": scheme + target, "path": "/", "headers": [(b"host", b"x")]}
    with contextlib.suppress(Error):
        credentials.to_origin_form(scope)
        assert sum(key == b"host" for key, _ in scope["headers"]) == 1
    with contextlib.suppress(Error):
        credentials.refuse_in_url(target)
        assert b"mcp_" not in target


# -- lines of the audit log ------------------------------------------------------------------------------------------

TEXT = st.text(alphabet=st.characters() | st.sampled_from('\0\t\n"\\/\x1f\x7f\x80é\ud800\U0001f600'), max_size=20)


@QUICK
@given(
    statement=TEXT | TEXT.filter(str.isascii) | st.none(),
    relations=st.lists(TEXT, max_size=3).map(tuple) | st.none(),
    rows=st.integers() | st.none(),
    elapsed=st.floats(0, 1e9).map(lambda number: round(number, 3)) | st.none(),
)
def test_a_line_is_what_json_makes_of_its_fields(
    statement: str | None, relations: tuple[str, ...] | None, rows: int | None, elapsed: float | None
) -> None:
    fields = {"elapsed_ms": elapsed, "rows": rows, "relations": relations, "statement": statement, "hash": None}
    ordered = {name: fields[name] for name in audit_log.FIELDS if fields.get(name) is not None}
    made = json.dumps(ordered, separators=(",", ":")).replace("\x7f", "\\u007f")
    assert audit_log._as_json(fields) == made.encode("ascii")


@pytest.mark.parametrize("length", [0, 1, 32, 64, 65, 300])
def test_a_line_s_hash_and_a_statement_s_digest_are_the_hmac_of_rfc_2104_whatever_the_key(length: int) -> None:
    key = bytes(number % 251 for number in range(length))
    log = AuditLog(Path("x"), key, lambda: NOW)
    for _ in range(2):
        line, digest = log._line(1, audit_log.FIRST, {"user": "alice"})
        body = line.rpartition(b',"hash":"')[0]
        assert digest == audit_log.chain_hash(key, audit_log.FIRST, body)
        assert line == body + b',"hash":"' + digest.encode() + b'"}\n'
        assert log.statement_hmac("é") == hmac.new(key, b"statement\0\xc3\xa9", hashlib.sha256).hexdigest()


@pytest.mark.parametrize("seconds", [0.0, 0.8765, 0.876999, 0.877, 1.0, 61.5, 86400.2, -0.001, -86400.0])
def test_a_time_is_told_to_the_millisecond_wherever_the_clock_is_set(seconds: float) -> None:
    begun = NOW.replace(microsecond=123456)
    times = iter([begun, begun + timedelta(seconds=seconds)])
    log = AuditLog(Path("x"), bytes(32), lambda: next(times))
    assert log.time() == "2026-11-20T12:00:00.123Z"
    assert log.time() == audit_log.stamp(begun + timedelta(seconds=seconds))
