"""Which identities of outside issuers are a user's: said by the command line, kept in users.yaml."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from command_line import Home
from mcpctl.config_keys import Auth
from mcpctl.errors import ConfigError, ConflictError, NotFoundError
from mcpctl.identity import linking, links, users
from mcpctl.identity.links import Link
from mcpctl.policy.access import Access

URL = "https://id.example.org/realms/shop"
OIDC = (
    f"  oidc:\n    keycloak: {{issuer: {URL}, audience: mcpctl}}\n    other: {{issuer: 'https://x.org', audience: m}}\n"
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found = Home(tmp_path / "home")
    text = found.config.read_text()
    assert "\nauth:\n" not in text
    found.config.write_text(f"{text}\nauth:\n{OIDC}")
    found("user", "add", "alice")
    found("user", "add", "bob")
    return found


def events(home: Home) -> list[tuple[str, str, str]]:
    lines = [json.loads(line) for line in (home.folder / "audit.jsonl").read_bytes().splitlines()]
    return [(line["event"], line["user"], line["reason"]) for line in lines if "link" in line["event"]]


def test_an_identity_is_linked_by_its_issuer_s_name_or_url_and_shown(home: Home) -> None:
    done = home("user", "link", "alice", "--issuer", "keycloak", "--subject", "8c1f")
    assert done.good == f"8c1f of {URL} linked to alice\n"
    again = home("user", "link", "alice", "--issuer", URL, "--subject", "8c1f")
    assert again.good == f"8c1f of {URL} was linked already to alice\n"
    shown = home("user", "show", "alice", "--json").good
    assert json.loads(shown)["links"] == [{"issuer": URL, "subject": "8c1f"}]
    assert f"link to {URL}\t8c1f" in home("user", "show", "alice").good
    assert [(event, user) for event, user, _ in events(home)] == [("user.linked", "alice")]
    assert f"8c1f of {URL}" in events(home)[0][2]


def test_an_identity_belongs_to_one_user_until_it_is_taken_from_them(home: Home) -> None:
    home("user", "link", "alice", "--issuer", "keycloak", "--subject", "8c1f")
    before = home.files()
    done = home("user", "link", "bob", "--issuer", "keycloak", "--subject", "8c1f")
    assert (done.code, done.out) == (5, "")
    assert "linked to alice" in done.error
    assert home.files() == before
    gone = home("user", "unlink", "alice", "--issuer", "keycloak", "--subject", "8c1f", "--reason", "moved")
    assert gone.good.startswith(f"8c1f of {URL} unlinked from alice\n")
    assert events(home)[-1][:2] == ("user.unlinked", "alice")
    assert "; moved; by " in events(home)[-1][2]
    assert home("user", "link", "bob", "--issuer", "keycloak", "--subject", "8c1f").code == 0
    assert home("user", "link", "bob", "--issuer", "other", "--subject", "8c1f").code == 0


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["link", "carol", "--issuer", "keycloak", "--subject", "x"], 4, "no user carol"),
        (["link", "alice", "--issuer", "keyclaok", "--subject", "x"], 4, "auth.oidc has no issuer keyclaok"),
        (["link", "alice", "--issuer", URL + "/", "--subject", "x"], 4, "auth.oidc has no issuer"),
        (["link", "alice", "--issuer", "https://", "--subject", "x"], 2, "--issuer: expected a URL"),
        (["link", "alice", "--issuer", "keycloak", "--subject", ""], 2, "--subject: expected a text"),
        (["link", "alice", "--issuer", "keycloak", "--subject", "a\nb"], 2, "--subject: expected a text"),
        (["link", "alice", "--issuer", "keycloak", "--subject", "x" * 256], 2, "--subject: expected a text"),
        (["link", "alice", "--issuer", "keycloak"], 2, "--subject"),
        (["unlink", "alice", "--issuer", "keycloak", "--subject", "x"], 4, "is not linked to alice"),
        (["unlink", "carol", "--issuer", "keycloak", "--subject", "x"], 4, "no user carol"),
    ],
)
def test_what_cannot_be_linked_is_said_and_changes_nothing(home: Home, words: list[str], code: int, told: str) -> None:
    before = home.files()
    done = home("user", *words)
    assert (done.code, done.out) == (code, "")
    assert told in done.err
    assert home.files() == before


def test_an_identity_of_an_issuer_that_is_gone_from_the_config_can_still_be_taken_away(home: Home) -> None:
    home("user", "link", "alice", "--issuer", "other", "--subject", "x")
    home.config.write_text(home.config.read_text().replace("https://x.org", "https://y.org"))
    done = home("user", "unlink", "alice", "--issuer", "https://x.org", "--subject", "x", "--json")
    found = json.loads(done.good)
    assert (found["user"], found["issuer"], found["subject"]) == ("alice", "https://x.org", "x")


def test_linking_a_disabled_user_says_that_it_opens_nothing(home: Home) -> None:
    home("user", "disable", "alice")
    assert "alice is disabled" in home("user", "link", "alice", "--issuer", "keycloak", "--subject", "x").err


def test_nobody_can_be_made_with_a_name_as_people_from_outside_have_it(home: Home) -> None:
    done = home("user", "add", "x-htfofgacvvtqh44dqdka")
    assert done.code == 2
    assert "from outside" in done.error


def test_config_check_looks_at_what_an_issuer_needs_and_does_not_ask_it(home: Home) -> None:
    text = home.config.read_text()
    secret = "introspection: {client_id: c, client_secret_file: secret}"
    more = f"ca_file: ca.pem, just_in_time: {{staff: nobody}}, {secret}"
    home.config.write_text(text.replace("audience: mcpctl}\n    other", f"audience: mcpctl, {more}}}\n    other"))
    assert "auth.oidc.keycloak: " in (told := home("config", "check").error)
    assert "ca.pem: cannot be used as a CA" in told
    home.config.write_text(home.config.read_text().replace("ca_file: ca.pem, ", ""))
    assert "secret" in home("config", "check").error
    (home.folder / "secret").touch(0o600)
    assert "secret is empty" in home("config", "check").error
    (home.folder / "secret").write_text("s3cr3t")
    done = home("config", "check")
    assert done.code == 0, done.err
    assert "auth.oidc.keycloak.just_in_time names nobody, and there is no such user" in done.err
    assert "s3cr3t" not in done.err


# -- the file -------------------------------------------------------------------------------------------------------

WHEN = datetime(2026, 11, 28, tzinfo=UTC)


def people(folder: Path, *lines: str) -> Path:
    file = folder / "users.yaml"
    file.touch(0o600)
    file.write_text("version: 1\nusers:\n" + "".join(f"  {line}\n" for line in lines))
    return file


def entry(name: str, links: str) -> str:
    return f"{name}: {{created_at: '2026-11-20T13:05:10Z', links: {links}}}"


def test_links_are_found_by_issuer_and_subject(tmp_path: Path) -> None:
    alice = entry("alice", "[{issuer: 'https://a.org', subject: s}, {issuer: 'https://b.org', subject: s}]")
    file = users.user_file(people(tmp_path, alice, entry("bob", "[{issuer: 'https://a.org', subject: t}]")))
    found = links.linked(file.current())
    assert found == {
        ("https://a.org", "s"): "alice",
        ("https://b.org", "s"): "alice",
        ("https://a.org", "t"): "bob",
    }


def test_a_file_in_which_two_users_have_one_identity_is_broken(tmp_path: Path) -> None:
    link = "[{issuer: 'https://a.org', subject: s}]"
    with pytest.raises(
        ConfigError, match=r"users\.yaml:4: bob: links: 's' of https://a\.org is linked to alice already"
    ):
        users.user_file(people(tmp_path, entry("alice", link), entry("bob", link))).current()
    with pytest.raises(ConfigError, match="alice already"):
        users.user_file(people(tmp_path, entry("alice", link.replace("]", ", " + link[1:])))).current()


@pytest.mark.parametrize(
    "text",
    ["s", "{issuer: 'https://a.org', subject: s}", "[s]", "[{issuer: 'https://a.org'}]", "[{subject: s}]",
     "[{issuer: a.org, subject: s}]", "[{issuer: 'https://a.org', subject: 1}]",
     "[{issuer: 'https://a.org', subject: ''}]", "[{issuer: 'https://a.org', subject: s, email: e}]"],
)  # fmt: skip
def test_a_link_is_an_issuer_and_a_subject_and_nothing_else(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"users\.yaml:3: alice: links: "):
        users.user_file(people(tmp_path, entry("alice", text))).current()


def test_links_are_written_and_read_back_as_they_are(tmp_path: Path) -> None:
    file = users.user_file(people(tmp_path, entry("alice", "[]"), entry("bob", "[]")))
    odd = Link("https://a.org/x:y", "auth0|a'b\"c{}, #:")
    assert linking.link(file, "alice", odd)[1]
    assert not linking.link(file, "alice", odd)[1]
    assert users.user_file(file.path).current()["alice"].links == (odd,)
    with pytest.raises(ConflictError):
        linking.link(file, "bob", odd)
    assert linking.unlink(file, "alice", odd).links == ()
    with pytest.raises(NotFoundError):
        linking.unlink(file, "alice", odd)


def test_a_users_own_tokens_stay_when_an_identity_is_given_or_taken() -> None:
    one, two = Link("https://a.org", "s"), Link("https://a.org", "t")
    before, after = users.User("alice", WHEN, links=(one, two)), users.User("alice", WHEN, links=(two,))
    fewer = Access(Auth()).fewer
    assert after.narrowed(before, fewer) == before.narrowed(after, fewer) == {}
