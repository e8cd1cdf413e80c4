"""Tokens: minted, told from a typo, kept as a hash, rotated, revoked, removed; and the file that they are in."""

from __future__ import annotations

import string
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcpctl import private_file
from mcpctl.errors import ConflictError, NotFoundError, UsageError
from mcpctl.identity import entry_file, tokens
from mcpctl.identity.tokens import CHEAP_ARGON2ID, Token, Wanted

NOW = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
DAY = timedelta(days=1)
HASH = CHEAP_ARGON2ID.hash("x")
_ALPHABET = string.ascii_letters + string.digits + "_-. \n"

TokenFile = entry_file.EntryFile[Token]


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
        "", " ", "0d", "0000-00-00", "2026-13-01", "2026-02-30", "2026-11-20", "2020-01-01", "-1d", "+1d", "1", "d",
        "1 d", "1D", "90days", "1d12h", "1e9d", "99999999999y", "9" * 5000 + "d", "9" * 400 + "ms", "٣d", "Never",
        "null", "2026-12-01T12:00:00", "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "10000-01-01", "\x00",
        "\udcff",
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
    from mcpctl.config_values import network

    wanted = Wanted(
        user="alice",
        expires_at=NOW + DAY,
        databases=("shop",),
        permissions=("tools:*",),
        allow_ips=(network("10.0.0.0/8"), network("2001:db8::/32"), network("fe80::1%eth0", scoped=True)),
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
    monkeypatch.setattr(
        private_file.Edit, "replace", lambda held, data, **_: (writes.append(data), replace(held, data))
    )
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
    from mcpctl.config_values import network

    entry = Token("ab12cd34", None, HASH, NOW, allow_ips=networks and tuple(map(network, networks)))
    if networks == ():
        entry = Token("ab12cd34", None, HASH, NOW, allow_ips=())
    assert tokens.allows_address(entry, address) is allowed
