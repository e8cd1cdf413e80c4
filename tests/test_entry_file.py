"""tokens.yaml and users.yaml: what is believed, what closes the door, and what a change costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import argon2
import pytest

from mcpctl import private_file
from mcpctl.config_values import network
from mcpctl.errors import ConfigError, ConflictError, NotFoundError, UsageError
from mcpctl.identity import entry_file, tokens, users
from mcpctl.identity.tokens import CHEAP_ARGON2ID, Token, Wanted

NOW = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
HASH = CHEAP_ARGON2ID.hash("x")

TokenFile = entry_file.EntryFile[Token]


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
        ("version: 2\ntokens: {}\n", ":1: version: is 2"),
        ("version: true\ntokens: {}\n", ":1: version: is True"),
        ("version: 1.0\ntokens: {}\n", ":1: version: is 1.0"),
        ("tokens: {}\n", "version: is None"),
        ("version: 1\n", "tokens: is missing"),
        ("version: 1\ntokens: [a]\n", "tokens: is missing, or has no entries"),
        ("version: 1\ntokens: {}\ncolour: red\n", ":3: colour: there is no such key"),
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
        f"# mine\nversion: 1\n\ntokens:\n  ab12cd34:\n    user: alice\n"
        f"    hash: {HASH}\n    created_at: 2026-01-01T00:00:00Z\n",
        '{"version": 1, "tokens": {"ab12cd34": {"user": "alice", "created_at": "2026-01-01T01:00:00+01:00",'
        f'"hash": "{HASH}"}}}}}}',
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


Change = Callable[[dict[str, Token]], Any]


def name_of(number: int) -> str:
    return f"tok{number:05}"


@pytest.mark.parametrize(
    "change, read",
    [
        (lambda found: found.update(tok00500=replace(found["tok00500"], revoked_at=NOW)), ["tok00500"]),
        (lambda found: found.update(tok00000=replace(found["tok00000"], note="x")), ["tok00000"]),
        (lambda found: found.update(tok00999=replace(found["tok00999"], note="x")), ["tok00999"]),
        (lambda found: found.update(tok01000=replace(found["tok00999"], id="tok01000")), ["tok01000"]),
        (lambda found: found.pop("tok00500"), []),
        (lambda found: found.pop("tok00999"), []),
        (lambda found: found.clear(), []),
        (
            lambda found: found.update({name_of(one): replace(found[name_of(one)], note="x") for one in (4, 6)}),
            ["tok00004", "tok00005", "tok00006"],
        ),
    ],
)
def test_of_a_thousand_lines_only_those_around_a_change_are_read_and_the_others_stay_the_same_objects(
    file: TokenFile, change: Change, read: list[str]
) -> None:
    with file.edit() as found:
        for number in range(1000):
            found[name_of(number)] = Token(name_of(number), "alice", HASH, NOW)
    before, seen = dict(file.current()), list[str]()
    shape = file.shape
    file.shape = replace(shape, read=lambda name, fields: (seen.append(name), shape.read(name, fields))[1])
    with tokens.token_file(file.path).edit() as found:
        change(found)
    after = file.current()
    assert seen == read
    assert list(after.items()) == list(found.items())
    assert all(after[name] is before[name] for name in after if after[name] == before.get(name))
    assert list(tokens.token_file(file.path).current().items()) == list(found.items())


def test_what_we_write_is_read_without_the_parser_of_yaml(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Wanted("alice", NOW, ("shop", "b-2"), ("tools:*",), (network("10.0.0.0/8"),), "Zoë's laptop, no. 2: old")
    made = [tokens.add(file, one, NOW)[0] for one in (wanted, replace(wanted, note="a laptop"), Wanted())]
    calls: list[bytes] = []
    monkeypatch.setattr(entry_file.plain_yaml, "parse", lambda data, *rest: calls.append(data))
    assert list(tokens.token_file(file.path).current().values()) == made
    assert calls == []


@pytest.mark.parametrize(
    "text",
    [
        entries(line(), line("ab12cd35"), line()),
        entries(line(), line("ab12cd35"), line("ab12cd36").rstrip("}")),
        entries(line(), line("ab12cd35", note="x\u2028  ab12cd36: {}")),
        entries(line(), line("ab12cd35", colour="red")),
        entries(line(), "  ab12cd35: {note: 'x", line("ab12cd36")),
        "version: 2\n" + entries(line(), line("ab12cd35")),
    ],
)
def test_a_fault_in_a_changed_line_is_found_whatever_was_read_before(file: TokenFile, text: str) -> None:
    put(file, entries(line(), line("ab12cd35")))
    known = dict(file.current())
    put(file, text)
    assert broken(file) == broken(tokens.token_file(file.path))
    put(file, entries(line("ab12cd36"), line()))
    assert list(file.current()) == ["ab12cd36", "ab12cd34"]
    assert file.current()["ab12cd34"] == known["ab12cd34"]


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
