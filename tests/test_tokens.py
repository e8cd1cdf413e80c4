"""Tokens: minted, told from a typo, kept as a hash, rotated, revoked, removed; and the file that they are in."""

from __future__ import annotations

import string
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import argon2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcpctl import plain_yaml, private_file
from mcpctl.errors import ConfigError, ConflictError, NotFoundError, UsageError
from mcpctl.identity import entry_file, tokens, users
from mcpctl.identity.tokens import CHEAP_ARGON2ID, Token, Wanted

NOW = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
DAY = timedelta(days=1)
HASH = CHEAP_ARGON2ID.hash("x")
_ALPHABET = string.ascii_letters + string.digits + "_-. \n"

TokenFile = entry_file.EntryFile[Token]


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    found = tokens.token_file(tmp_path / "tokens.yaml")
    private_file.create(found.path, found.render({}))
    return found


def put(file: TokenFile, text: str) -> None:
    file.path.write_text(text)


def line(name: str = "ab12cd34", **fields: Any) -> str:
    values = {"user": "alice", "hash": f"'{HASH}'", "created_at": "'2026-01-01T00:00:00Z'", **fields}
    return f"  {name}: {{{', '.join(f'{key}: {value}' for key, value in values.items() if value is not None)}}}"


def entries(*lines: str) -> str:
    return "\n".join(["version: 1", "tokens:", *lines]) + "\n"


def broken(file: TokenFile) -> str:
    """The message of a file that must not be believed."""
    with pytest.raises(ConfigError) as caught:
        file.current()
    assert file.path.name in caught.value.message
    return caught.value.message


# -- the token itself --------------------------------------------------------------------------------------------


def test_a_minted_token_has_the_form_of_the_contract_and_says_its_id() -> None:
    name, text = tokens.mint()
    assert len(text) == 4 + 8 + 1 + 43 + 1 + 6
    assert text.startswith(f"mcp_{name}_")
    assert tokens.token_id(text) == name


def test_a_thousand_tokens_differ_and_an_id_that_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    minted = [tokens.mint() for _ in range(1000)]
    assert len({text for _, text in minted}) == 1000
    given = iter("aaaaaaaa" + "aaaaaaab")
    monkeypatch.setattr(tokens.secrets, "choice", lambda _: next(given))
    assert tokens.mint({"aaaaaaaa"})[0] == "aaaaaaab"


def test_the_checksum_is_the_crc32_of_all_before_it_in_base62() -> None:
    import zlib

    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    text = tokens.mint()[1]
    number = 0
    for digit in text[-6:]:
        number = number * 62 + digits.index(digit)
    assert number == zlib.crc32(text[:-7].encode())


@given(st.integers(0, 62), st.sampled_from(_ALPHABET))
def test_a_change_of_any_one_character_is_seen_without_a_hash(position: int, other: str) -> None:
    text = "mcp_ab12cd34_" + "A" * 20 + "0" * 20 + "zzz"
    text += "_" + tokens._checksum(text)
    changed = text[:position] + other + text[position + 1 :]
    assert tokens.token_id(changed) == (tokens.token_id(text) if changed == text else None)


@given(st.text(max_size=100))
def test_no_other_text_is_a_token(text: str) -> None:
    assert tokens.token_id(text) is None


@given(st.text(alphabet=string.ascii_letters + string.digits, min_size=43, max_size=43))
def test_a_right_checksum_over_another_secret_is_caught_by_the_hash(secret: str) -> None:
    name, text = tokens.mint()
    entry = Token(name, None, CHEAP_ARGON2ID.hash(text), NOW)
    body = f"mcp_{name}_{secret}"
    forged = f"{body}_{tokens._checksum(body)}"
    assert tokens.token_id(forged) == name
    assert tokens.matches(entry, forged) == (forged == text)
    assert tokens.matches(entry, text)


@pytest.mark.parametrize(
    "change",
    [str.upper, str.lower, lambda t: t + "\n", lambda t: " " + t, lambda t: t + t, lambda t: t[:-1], lambda t: t[1:]],
)
def test_a_token_that_is_cut_doubled_or_in_another_case_is_none(change: Callable[[str], str]) -> None:
    text = tokens.mint()[1]
    assert tokens.token_id(change(text)) is None


# -- expiry and status -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, when",
    [
        ("12h", NOW + timedelta(hours=12)),
        ("30d", NOW + 30 * DAY),
        ("2w", NOW + 14 * DAY),
        ("1y", NOW + 365 * DAY),
        ("1.5h", NOW + timedelta(minutes=90)),
        ("2026-12-01", datetime(2026, 12, 1, tzinfo=UTC)),
        ("2026-12-01T12:00:00Z", datetime(2026, 12, 1, 12, tzinfo=UTC)),
        ("2026-12-01T12:00:00+02:00", datetime(2026, 12, 1, 10, tzinfo=UTC)),
        ("9999-12-31", datetime(9999, 12, 31, tzinfo=UTC)),
        ("never", None),
    ],
)
def test_an_expiry_is_a_lifetime_a_date_a_time_or_never(text: str, when: datetime | None) -> None:
    assert tokens.parse_expiry(text, NOW) == when


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "0d", "0000-00-00", "2026-13-01", "2026-02-30", "2026-11-20", "2020-01-01", "-1d", "+1d", "1", "d", "1 d",
        "1D", "90days", "1d12h", "1e9d", "99999999999y", "9" * 5000 + "d", "9" * 400 + "ms", "٣d", "Never", "null",
        "2026-12-01T12:00:00", "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "10000-01-01", "\x00", "\udcff",
    ],
)  # fmt: skip
def test_an_expiry_that_is_none_or_not_in_the_future_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        tokens.parse_expiry(text, NOW)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_the_status_changes_at_the_instant() -> None:
    entry = Token("ab12cd34", None, HASH, NOW - DAY, expires_at=NOW)
    tick = timedelta(microseconds=1)
    assert entry.status(NOW - 14 * DAY - tick) == "active"
    assert entry.status(NOW - 14 * DAY) == "expiring"
    assert entry.status(NOW - tick) == "expiring"
    assert entry.status(NOW) == "expired"
    assert Token("ab12cd34", None, HASH, NOW).status(NOW + 10000 * DAY) == "active"


def test_a_revoked_token_stays_so_when_the_clock_is_set_back() -> None:
    entry = Token("ab12cd34", None, HASH, NOW, revoked_at=NOW)
    assert entry.status(NOW - DAY) == entry.status(NOW) == "revoked"


# -- changes -----------------------------------------------------------------------------------------------------


def test_what_is_added_is_read_back_whole_and_the_secret_is_nowhere_in_the_file(file: TokenFile) -> None:
    from mcpctl.config_keys import network

    wanted = Wanted(
        user="alice",
        expires_at=NOW + DAY,
        databases=("shop",),
        permissions=("tools:*",),
        allow_ips=(network("10.0.0.0/8"), network("2001:db8::/32")),
        note="Alice's: {laptop}, #1 'x' \"y\" é 你 - & * !tag %",
    )
    entry, text = tokens.add(file, wanted, NOW)
    data = file.path.read_text()
    assert dict(tokens.token_file(file.path).current()) == {entry.id: entry}
    assert text not in data
    assert text.split("_")[2] not in data
    assert data.count("\n") == 3


@pytest.mark.parametrize("note", ["a\nb", "a\x1b[31mb", "\udcff", "a\x85b", "a\u2028b", "", " ", "x" * 1001])
def test_a_note_with_control_characters_is_refused_and_nothing_is_written(file: TokenFile, note: str) -> None:
    before = file.path.read_bytes()
    with pytest.raises(UsageError):
        tokens.add(file, Wanted(note=note), NOW)
    assert file.path.read_bytes() == before


@given(note=st.text(max_size=60))
def test_whatever_a_note_holds_an_entry_is_one_line_that_reads_back_the_same(note: str) -> None:
    shaped = tokens.token_file(Path("tokens.yaml"))
    entry = Token("ab12cd34", "alice", HASH, NOW, note=note)
    data = shaped.render({entry.id: entry})
    assert len(data.splitlines()) == 3
    assert shaped._parse(data) == {entry.id: entry}


def test_an_unknown_id_changes_nothing_whichever_way_it_is_named(file: TokenFile) -> None:
    first = tokens.add(file, Wanted(), NOW)[0]
    before = (file.path.read_bytes(), file.path.stat().st_ino)
    for work in (
        lambda: tokens.revoke(file, [first.id, "zzzzzzzz"], NOW),
        lambda: tokens.remove(file, "zzzzzzzz"),
        lambda: tokens.rotate(file, "zzzzzzzz", None, None, NOW),
        lambda: tokens.show(file, "zzzzzzzz"),
        lambda: tokens.revoke(file, [""], NOW),
    ):
        with pytest.raises(NotFoundError) as caught:
            work()
        assert caught.value.exit_code == 4
    assert (file.path.read_bytes(), file.path.stat().st_ino) == before


def test_a_whole_token_in_the_place_of_an_id_is_not_repeated_in_the_error(file: TokenFile) -> None:
    entry, text = tokens.add(file, Wanted(), NOW)
    with pytest.raises(NotFoundError) as caught:
        tokens.show(file, text)
    assert text not in f"{caught.value.message}{caught.value.hint}"
    assert entry.id in str(caught.value.hint)


def test_revoke_keeps_the_record_and_twice_is_fine(file: TokenFile) -> None:
    entry = tokens.add(file, Wanted(), NOW)[0]
    assert [alive for _, alive in tokens.revoke(file, [entry.id, entry.id], NOW)] == [True]
    inode = file.path.stat().st_ino
    [(again, alive)] = tokens.revoke(file, [entry.id], NOW + DAY)
    assert not alive
    assert again.revoked_at == NOW
    assert file.path.stat().st_ino == inode
    assert file.current()[entry.id].status(NOW) == "revoked"


def test_revoke_all_ends_every_one_and_none_is_fine(file: TokenFile) -> None:
    assert tokens.revoke(file, None, NOW) == []
    for _ in range(3):
        tokens.add(file, Wanted(), NOW)
    assert len(tokens.revoke(file, None, NOW)) == 3
    assert {entry.status(NOW) for entry in file.current().values()} == {"revoked"}


def test_remove_and_prune_take_out_what_they_should(file: TokenFile) -> None:
    living, ended, expired, gone = (
        tokens.add(file, Wanted(expires_at=when), NOW)[0] for when in (None, None, NOW + DAY, None)
    )
    tokens.remove(file, gone.id)
    tokens.revoke(file, [ended.id], NOW)
    assert {entry.id for entry in tokens.prune(file, NOW + DAY)} == {ended.id, expired.id}
    assert list(file.current()) == [living.id]


def test_rotate_without_overlap_ends_the_old_one_in_the_same_write(
    file: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, text = tokens.add(file, Wanted("alice", NOW + DAY, ("shop",), ("tools:*",), None, "n"), NOW)
    writes: list[bytes] = []
    replace = private_file.Edit.replace
    monkeypatch.setattr(private_file.Edit, "replace", lambda held, data: (writes.append(data), replace(held, data)))
    ended, new, fresh = tokens.rotate(file, old.id, None, None, NOW)
    assert len(writes) == 1
    found = file.current()
    assert found[old.id].status(NOW) == "revoked" == ended.status(NOW)
    assert (new.user, new.databases, new.permissions, new.note) == ("alice", ("shop",), ("tools:*",), "n")
    assert new.expires_at == old.expires_at
    assert tokens.matches(found[new.id], fresh)
    assert not tokens.matches(found[new.id], text)
    with pytest.raises(ConflictError, match="revoked already"):
        tokens.rotate(file, old.id, None, None, NOW)


@pytest.mark.parametrize(
    "old_end, overlap, asked, old_ends, new_ends",
    [
        (None, 1, None, 1, None),
        (None, 1, 5, 1, 5),
        (10, 1, None, 1, 10),
        (10, 20, None, 10, 10),
        (10, 1, 5, 1, 5),
        (10, 1, 50, 1, 10),
        (10, 7, 5, 7, 5),
    ],
)
def test_a_rotation_gives_at_most_the_old_end_and_the_overlap_never_prolongs(
    file: TokenFile, old_end: int | None, overlap: int, asked: int | None, old_ends: int, new_ends: int | None
) -> None:
    def day(number: int | None) -> datetime | None:
        return None if number is None else NOW + number * DAY

    old = tokens.add(file, Wanted(expires_at=day(old_end)), NOW)[0]
    after, new, _ = tokens.rotate(file, old.id, overlap * DAY, day(asked), NOW)
    assert (after.expires_at, new.expires_at) == (day(old_ends), day(new_ends))
    assert after.status(NOW) in ("active", "expiring")


def test_an_overlap_beyond_all_dates_is_a_usage_error_and_changes_nothing(file: TokenFile) -> None:
    old = tokens.add(file, Wanted(), NOW)[0]
    before = file.path.read_bytes()
    with pytest.raises(UsageError):
        tokens.rotate(file, old.id, timedelta.max, None, NOW)
    assert file.path.read_bytes() == before


@pytest.mark.parametrize(
    "networks, address, allowed",
    [
        (None, "203.0.113.9", True),
        (("10.0.0.0/8",), "10.1.2.3", True),
        (("10.0.0.0/8",), "11.1.2.3", False),
        (("10.0.0.0/8",), "::ffff:10.1.2.3", True),
        (("10.0.0.0/8",), "::1", False),
        (("2001:db8::/32",), "2001:db8::1", True),
        (("2001:db8::/32",), "10.1.2.3", False),
        (("127.0.0.1",), None, True),
        (("10.0.0.0/8",), None, False),
        (("10.0.0.0/8",), "not an address", False),
        ((), "10.0.0.1", False),
    ],
)
def test_a_token_is_good_from_its_networks_alone(
    networks: tuple[str, ...] | None, address: str | None, allowed: bool
) -> None:
    from mcpctl.config_keys import network

    entry = Token("ab12cd34", None, HASH, NOW, allow_ips=networks and tuple(map(network, networks)))
    if networks == ():
        entry = Token("ab12cd34", None, HASH, NOW, allow_ips=())
    assert tokens.allows_address(entry, address) is allowed


# -- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hasher",
    [
        argon2.PasswordHasher(time_cost=2, memory_cost=8, parallelism=1),
        argon2.PasswordHasher(time_cost=1, memory_cost=1024, parallelism=1),
        argon2.PasswordHasher(time_cost=1, memory_cost=16, parallelism=2),
        argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1, hash_len=4096),
        argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1, salt_len=64),
        argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1, type=argon2.Type.I),
    ],
)
def test_a_hash_of_another_profile_is_refused_since_a_stranger_could_make_us_pay(
    file: TokenFile, hasher: argon2.PasswordHasher
) -> None:
    put(file, entries(line(hash=f"'{hasher.hash('x')}'")))
    assert f"{file.path}:3: ab12cd34: hash:" in broken(file)


GOOD = entries(line())


@pytest.mark.parametrize(
    "text, told",
    [
        (entries(line(colour="red")), ":3: ab12cd34: colour: there is no such key"),
        (entries(line(), line()), ":4: ab12cd34: stands there twice"),
        (entries(line(hash="'$argon2id$v=19$m=8,t=1,p=1$short$short'")), "hash:"),
        (entries(line(hash="plain")), "hash:"),
        (entries(line(hash=None)), "hash:"),
        (entries(line(hash="[1]")), "hash:"),
        (entries(line(user="Alice")), "user:"),
        (entries(line(user="5")), "user:"),
        (entries(line(created_at=None)), "created_at: is missing"),
        (entries(line(created_at="'2026-01-01T00:00:00'")), "created_at: has no time zone"),
        (entries(line(created_at="2026-01-01")), "created_at:"),
        (entries(line(expires_at="tomorrow")), "expires_at:"),
        (entries(line(expires_at="'9999-12-31T23:59:59-23:59'")), "expires_at:"),
        (entries(line(expires_at="2026-99-99")), ""),
        (entries(line(databases="shop")), "databases: expected a list of texts"),
        (entries(line(databases="[1]")), "databases:"),
        (entries(line(databases="[{a: b}]")), "databases:"),
        (entries(line(permissions="['tools query']")), "is no permission"),
        (entries(line(allow_ips="['10.0.0.1/8']")), "an address or network"),
        (entries(line(note="{a: b}")), "note:"),
        (entries(line("AB12CD34")), "'AB12CD34' cannot be a name here"),
        (entries(line("ab12cd3")), "cannot be a name here"),
        (entries("  ab12cd34: text"), "expected {key: value"),
        (entries("  ab12cd34: [1]"), "expected {key: value"),
        (entries(line(note="!!python/object/apply:os.system ['id']")), "is not plain data"),
        (entries(line(note="!!python/name:os.system x")), "is not plain data"),
        (entries(line(note="!x y")), "is not plain data"),
        (entries("  ab12cd34: !!python/object:mcpctl.Token {user: x}"), "is not plain data"),
        (entries(line(note="&a text"), line("ab12cd35", note="*a")), "anchors and aliases"),
        (entries("  ab12cd34: &x {user: alice}", "  <<: *x"), "anchors and aliases"),
        (entries(line("? [a]")), ""),
        ("version: 2\ntokens: {}\n", "version: is 2"),
        ("tokens: {}\n", "version: is None"),
        ("version: 1\n", "tokens: is missing"),
        ("version: 1\ntokens: [a]\n", "tokens: is missing, or has no entries"),
        ("version: 1\ntokens: {}\ncolour: red\n", "colour: there is no such key"),
        ("version: 1\nversion: 1\ntokens: {}\n", ":2: version: stands there twice"),
        ("", "version: is None"),
        ("text", "expected keys and values"),
        (GOOD + "---\n" + GOOD, ""),
        (GOOD + "  \t- {", ":4: not YAML"),
        (GOOD + "\x00", "not YAML"),
        (GOOD[:-20], "not YAML"),
        ("[" * 100_000, "nested deeper"),
        ("{a: " * 100_000, "nested deeper"),
        ("a: &a [x]\n" + "".join(f"b{i}: &b{i} [*a,*a]\n" for i in range(50)), "anchors and aliases"),
    ],
)
def test_a_file_with_a_fault_closes_the_door_and_says_where(file: TokenFile, text: str, told: str) -> None:
    put(file, text)
    assert told in broken(file)
    assert told in broken(file)  # also when it is asked again without having changed


def test_every_fault_of_a_file_is_told_at_once(file: TokenFile) -> None:
    put(file, entries(line(colour="red"), line("ab12cd35", user="Bob"), line("ab12cd36", hash="x")))
    message = broken(file)
    for number, word in ((3, "colour"), (4, "Bob"), (5, "hash")):
        assert any(found.startswith(f"  {file.path}:{number}:") and word in found for found in message.splitlines())


def test_bytes_that_are_no_utf8_are_refused_with_their_line(file: TokenFile) -> None:
    file.path.write_bytes(GOOD.encode() + b"\n\xff")
    assert ":5: not UTF-8" in broken(file)


@pytest.mark.parametrize(
    "text",
    [
        f"# mine\nversion: 1\n\ntokens:\n  ab12cd34:\n    user: alice\n    hash: {HASH}\n    created_at: 2026-01-01T00:00:00Z\n",
        f'{{"version": 1, "tokens": {{"ab12cd34": {{"user": "alice", "hash": "{HASH}", "created_at": "2026-01-01T01:00:00+01:00"}}}}}}',
        GOOD.replace("\n", "\r\n"),
        GOOD + "\n  # a comment\n",
        GOOD.rstrip("\n"),
        "\ufeff" + GOOD,
        "version: 1\ntokens:\n\n" + line(note="'a\n\n    b'") + "\n",
    ],
)
def test_a_file_that_a_person_laid_out_otherwise_is_read_and_can_be_changed(file: TokenFile, text: str) -> None:
    file.path.write_bytes(text.encode())
    entry = file.current()["ab12cd34"]
    assert (entry.user, entry.hash, entry.created_at) == ("alice", HASH, datetime(2026, 1, 1, tzinfo=UTC))
    tokens.revoke(tokens.token_file(file.path), ["ab12cd34"], NOW)
    assert file.current()["ab12cd34"].status(NOW) == "revoked"


def test_a_file_without_tokens_is_in_order_whichever_way_it_says_so(file: TokenFile) -> None:
    for text in ("version: 1\ntokens: {}\n", "version: 1\ntokens:\n", "tokens:\nversion: 1\n"):
        put(file, text)
        assert file.current() == {}


def test_one_changed_line_in_a_thousand_parses_one_line_and_the_others_stay_the_same_objects(
    file: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with file.edit() as found:
        for number in range(1000):
            found[f"tok{number:05}"] = Token(f"tok{number:05}", "alice", HASH, NOW)
    before = dict(file.current())
    parsed: list[bytes] = []
    parse = plain_yaml.parse
    monkeypatch.setattr(
        entry_file.plain_yaml, "parse", lambda data, *rest: (parsed.append(data), parse(data, *rest))[1]
    )
    tokens.revoke(tokens.token_file(file.path), ["tok00500"], NOW)
    parsed.clear()
    after = file.current()
    assert sum(data.count(b"\n") for data in parsed) == 3  # version, tokens, and the line
    assert [name for name in after if after[name] is not before[name]] == ["tok00500"]


def test_entries_of_a_hand_made_file_stay_the_same_objects_when_another_one_changes(file: TokenFile) -> None:
    put(file, "# mine\n" + entries(line(), line("ab12cd35")))
    before = dict(file.current())
    put(file, "# mine\n" + entries(line(), line("ab12cd35", note="x")))
    after = file.current()
    assert after["ab12cd34"] is before["ab12cd34"]
    assert after["ab12cd35"] is not before["ab12cd35"]


def test_a_broken_file_is_refused_until_it_is_mended_and_then_read_again(file: TokenFile) -> None:
    put(file, GOOD)
    assert file.current()
    file.path.chmod(0o644)
    assert "0644" in broken(file)
    file.path.chmod(0o600)
    assert file.current()
    put(file, GOOD + "broken")
    broken(file)
    put(file, GOOD)
    assert file.current()
    file.path.parent.chmod(0o777)
    put(file, GOOD + "\n")
    assert "can be written by anybody" in broken(file)
    file.path.parent.chmod(0o700)  # the file itself did not change
    assert file.current()
    file.path.rename(file.path.with_name("away"))
    broken(file)
    file.path.with_name("away").rename(file.path)
    assert file.current()


def test_a_change_to_a_broken_file_is_refused_and_leaves_it(file: TokenFile) -> None:
    put(file, GOOD + "broken")
    for work in (
        lambda: tokens.add(file, Wanted(), NOW),
        lambda: tokens.revoke(file, None, NOW),
        lambda: tokens.prune(file, NOW),
    ):
        with pytest.raises(ConfigError):
            work()
    assert file.path.read_text() == GOOD + "broken"


def test_an_unchanged_file_costs_one_stat_and_no_read(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    put(file, GOOD)
    first, version = file.current(), file.version

    def no(*_: object, **__: object) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr(private_file, "read", no)
    assert file.current() is first
    assert file.version == version


# -- users -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "A", "1a", "a_b", "a b", "ä", "a" * 32, "-a", "a\n", "../a", "a.b"])
def test_a_name_that_cannot_be_a_users_is_refused(tmp_path: Path, name: str) -> None:
    file = users.user_file(tmp_path / "users.yaml")
    private_file.create(file.path, file.render({}))
    with pytest.raises(UsageError):
        users.add(file, name, None, NOW)
    assert file.current() == {}


def test_a_user_is_made_once_and_found(tmp_path: Path) -> None:
    file = users.user_file(tmp_path / "users.yaml")
    private_file.create(file.path, file.render({}))
    made = users.add(file, "a" * 31, "a note", NOW)
    assert users.find(file.current(), "a" * 31) == made
    with pytest.raises(ConflictError):
        users.add(file, "a" * 31, None, NOW)
    with pytest.raises(NotFoundError):
        users.find(file.current(), "bob")
