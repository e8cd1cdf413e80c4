"""Forms are read to the letter, and only from our own pages, the browser that was shown them, and for what they are."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcpctl.errors import Error, ForbiddenError, UsageError
from mcpctl.server import forms
from mcpctl.server.forms import BODY, Cookie, FormTokens, check_sender, new_id, read

ORIGIN = "https://db.example.com"
KEY = bytes(range(32))
FORM = [(b"content-type", b"application/x-www-form-urlencoded")]
FIELDS = ("user", "password", "form_token")


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.time = datetime(2026, 11, 28, 9, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(clock: Clock) -> FormTokens:
    return FormTokens(KEY, clock)


# -- fields ---------------------------------------------------------------------------------------------------------


def test_what_a_browser_sends_is_read() -> None:
    body = b"user=anna&password=p%C3%A4%26%3D%25+x&form_token="
    assert read(FORM, body, required=FIELDS) == {"user": "anna", "password": "pä&=% x", "form_token": ""}
    assert read(FORM, b"user=anna", required=["user"], optional=["password"]) == {"user": "anna"}
    assert read(FORM, b"", required=(), optional=["user"]) == {}


@given(st.dictionaries(st.sampled_from(FIELDS), st.text(st.characters(exclude_characters="\0", codec="utf-8"))))
def test_every_text_comes_through_as_it_was_typed(fields: dict[str, str]) -> None:
    assert read(FORM, urlencode(fields).encode(), required=(), optional=FIELDS) == fields


@given(st.binary(max_size=200))
def test_any_bytes_are_fields_or_a_clear_error(body: bytes) -> None:
    try:
        found = read(FORM, body, required=(), optional=["a", "b"])
    except UsageError as problem:
        found = {"a": problem.message}
    assert set(found) <= {"a", "b"}


@pytest.mark.parametrize(
    "body, said",
    [
        (b"user=a&user=b&password=x&form_token=t", "the field user stands there twice"),
        (b"user=a&password=x", "lacks the field form_token"),
        (b"", "lacks the field user"),
        (b"user=a&password=x&form_token=t&admin=1", "not known here"),
        (b"user=a&password=x&form_token=t&", "not"),
        (b"&user=a&password=x&form_token=t", "not known here"),
        (b"user&password=x&form_token=t", "without a value"),
        (b"user=a&password=x;form_token=t", "the field password is not encoded"),
        (b"user=%ff&password=x&form_token=t", "the field user is not UTF-8"),
        (b"user=%ED%A0%80&password=x&form_token=t", "the field user is not UTF-8"),
        (b"user=%C0%AE&password=x&form_token=t", "the field user is not UTF-8"),
        (b"user=%00&password=x&form_token=t", "the field user has a NUL"),
        (b"user=%4&password=x&form_token=t", "the field user is not encoded"),
        (b"user=%zz&password=x&form_token=t", "the field user is not encoded"),
        (b"user=\xc3\xa4&password=x&form_token=t", "the field user is not encoded"),
        (b"user=a=b&password=x&form_token=t", "the field user is not encoded"),
        (b"us%65r=a&user=b&password=x&form_token=t", "the field user stands there twice"),
        (b"user=a\n&password=x&form_token=t", "the field user is not encoded"),
        (b"%F0=a&password=x&form_token=t", "the name of a field is not UTF-8"),
        (b"user=a&password=x&form_token=t" + b"&x=1" * 10_000, "not"),
    ],
)
def test_a_form_that_no_page_of_ours_sends_is_refused_without_telling_a_value(body: bytes, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(FORM, body, required=FIELDS)
    assert caught.value.status == 400
    assert said in caught.value.message
    assert len(caught.value.message) < 100
    assert caught.value.hint


def test_a_form_of_64_KiB_is_read_and_one_byte_more_is_413() -> None:
    body = b"user=" + b"a" * (BODY - 5)
    assert len(read(FORM, body, required=["user"])["user"]) == BODY - 5
    with pytest.raises(Error) as caught:
        read(FORM, body + b"a", required=["user"])
    assert caught.value.status == 413


@pytest.mark.parametrize(
    "kind",
    [
        None,
        b"",
        b"application/json",
        b"multipart/form-data; boundary=x",
        b"text/plain",
        b"application/x-www-form-urlencoded; charset=utf-16",
        b"application/x-www-form-urlencoded; charset=utf-8; charset=utf-16",
        b"application/x-www-form-urlencoded, text/plain",
    ],
)
def test_another_kind_of_body_is_415(kind: bytes | None) -> None:
    with pytest.raises(Error) as caught:
        read([] if kind is None else [(b"content-type", kind)], b"user=a", required=["user"])
    assert caught.value.status == 415


@pytest.mark.parametrize("kind", [b"Application/X-WWW-form-urlencoded", FORM[0][1] + b'; charset="UTF-8"'])
def test_the_kind_of_a_form_may_be_written_in_other_ways(kind: bytes) -> None:
    assert read([(b"content-type", kind)], b"user=a", required=["user"]) == {"user": "a"}


# -- who has sent it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        [(b"origin", ORIGIN.encode())],
        [(b"origin", ORIGIN.encode()), (b"sec-fetch-site", b"same-origin")],
        [(b"sec-fetch-site", b"same-origin")],
    ],
)
def test_a_form_of_our_own_pages_is_taken(headers: forms.Headers) -> None:
    check_sender(headers, ORIGIN)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"origin", b"null")],
        [(b"origin", b"")],
        [(b"origin", b"null"), (b"sec-fetch-site", b"same-origin")],
        [(b"origin", b"https://db.example.com.evil.example")],
        [(b"origin", b"http://db.example.com")],
        [(b"origin", b"https://db.example.com:8443")],
        [(b"origin", b"https://db.example.com/")],
        [(b"origin", ORIGIN.encode()), (b"sec-fetch-site", b"same-site")],
        [(b"origin", ORIGIN.encode()), (b"sec-fetch-site", b"cross-site")],
        [(b"origin", ORIGIN.encode()), (b"sec-fetch-site", b"none")],
        [(b"sec-fetch-site", b"none")],
        [(b"sec-fetch-site", b"Same-Origin")],
    ],
)
def test_a_form_of_anybody_else_or_of_nobody_is_refused(headers: forms.Headers) -> None:
    with pytest.raises(ForbiddenError) as caught:
        check_sender(headers, ORIGIN)
    assert caught.value.status == 403
    assert caught.value.hint


@pytest.mark.parametrize("name", [b"origin", b"sec-fetch-site"])
def test_who_says_twice_who_he_is_is_refused(name: bytes) -> None:
    right = ORIGIN.encode() if name == b"origin" else b"same-origin"
    with pytest.raises(UsageError):
        check_sender([(name, right), (name, right)], ORIGIN)


# -- tokens of forms ------------------------------------------------------------------------------------------------


def test_a_token_is_good_for_its_browser_and_purpose_until_its_end(tokens: FormTokens, clock: Clock) -> None:
    token = tokens.issue("browser", "sign-in")
    clock.time += forms.LIFE - timedelta(seconds=1)
    tokens.check(token, "browser", "sign-in")
    clock.time += timedelta(seconds=1)
    with pytest.raises(ForbiddenError, match="too long"):
        tokens.check(token, "browser", "sign-in")


def test_all_workers_and_a_server_after_a_reload_take_each_others_tokens(clock: Clock) -> None:
    FormTokens(bytes(KEY), clock).check(FormTokens(KEY, clock).issue("b", "p"), "b", "p")


@pytest.mark.parametrize(
    "browser, purpose", [("other", "sign-in"), ("browser", "sign-out"), ("", "sign-in"), (None, "sign-in")]
)
def test_a_token_is_good_for_no_other_browser_or_purpose(tokens: FormTokens, browser: str | None, purpose: str) -> None:
    with pytest.raises(ForbiddenError, match="not this browser's"):
        tokens.check(tokens.issue("browser", "sign-in"), browser, purpose)


def test_a_browser_without_a_cookie_has_no_good_token(tokens: FormTokens) -> None:
    with pytest.raises(ForbiddenError):
        tokens.check(tokens.issue("", "sign-in"), None, "sign-in")


def test_browser_and_purpose_cannot_flow_into_each_other(tokens: FormTokens) -> None:
    with pytest.raises(ForbiddenError):
        tokens.check(tokens.issue("ab", "c"), "a", "bc")


def test_a_token_of_another_key_is_refused(tokens: FormTokens, clock: Clock) -> None:
    with pytest.raises(ForbiddenError, match="not this browser's"):
        tokens.check(FormTokens(KEY[::-1], clock).issue("b", "p"), "b", "p")


def test_no_character_of_a_token_can_be_changed(tokens: FormTokens) -> None:
    token = tokens.issue("b", "p")
    for at, old in enumerate(token):
        changed = token[:at] + ("1" if old != "1" else "2") + token[at + 1 :]
        with pytest.raises(ForbiddenError):
            tokens.check(changed, "b", "p")


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "1.",
        "x" * 1_000_000,
        "1." + "A" * 43,
        "0." + "A" * 43,
        "٣." + "A" * 43,
        "9" * 30 + "." + "A" * 43,
        "1." + "ä" * 43,
    ],
)
def test_what_is_no_token_is_refused_as_one_that_is_not_this_browsers(tokens: FormTokens, token: str) -> None:
    with pytest.raises(ForbiddenError, match="not this browser's"):
        tokens.check(token, "b", "p")


def test_a_key_that_could_be_guessed_is_not_taken(clock: Clock) -> None:
    with pytest.raises(ValueError, match="31 bytes"):
        FormTokens(KEY[:31], clock)


# -- cookies --------------------------------------------------------------------------------------------------------


def test_over_https_a_cookie_is_bound_to_this_host_and_hidden_from_scripts() -> None:
    name, value = Cookie("mcpctl", https=True).set("a" * 43, timedelta(hours=8))
    assert name == b"set-cookie"
    marks = value.decode().split("; ")
    assert marks[0] == "__Host-mcpctl=" + "a" * 43
    assert set(marks[1:]) == {"Path=/", "HttpOnly", "SameSite=Lax", "Secure", "Max-Age=28800"}


def test_over_http_a_cookie_has_the_marks_that_browsers_take_there() -> None:
    marks = Cookie("mcpctl", https=False).set("a" * 43)[1].decode().split("; ")
    assert marks == ["mcpctl=" + "a" * 43, "Path=/", "HttpOnly", "SameSite=Lax"]


def test_a_cookie_that_is_dropped_has_the_marks_of_the_one_that_was_set() -> None:
    cookie = Cookie("mcpctl", https=True)
    assert cookie.drop()[1] == b"__Host-mcpctl=; Path=/; HttpOnly; SameSite=Lax; Secure; Max-Age=0"


def test_what_was_set_is_read_from_among_others() -> None:
    cookie, value = Cookie("mcpctl", https=True), new_id()
    sent = f"a=b; __Host-mcpctl={value}; mcpctl=x; __host-mcpctl=y".encode()
    assert cookie.read([(b"cookie", sent)]) == value
    assert cookie.read([(b"cookie", b"a=b"), (b"cookie", f"__Host-mcpctl={value}".encode())]) == value


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b";;;",
        b"__Host-mcpctl",
        b"__Host-mcpctl=",
        b"__Host-mcpctl=short",
        b"__Host-mcpctl=" + b"a" * 44,
        b"__Host-mcpctl=" + b"\xff" * 43,
        b'__Host-mcpctl="' + b"a" * 41 + b'"',
        b"mcpctl=" + b"a" * 43,
    ],
)
def test_a_value_that_is_none_of_ours_is_as_none(sent: bytes) -> None:
    cookie = Cookie("mcpctl", https=True)
    assert cookie.read([(b"cookie", sent)]) is None
    assert cookie.read([]) is None


def test_a_cookie_that_comes_twice_is_refused_since_one_is_somebody_elses() -> None:
    sent = b"mcpctl=" + b"a" * 43 + b"; mcpctl=" + b"b" * 43
    with pytest.raises(UsageError, match="twice"):
        Cookie("mcpctl", https=False).read([(b"cookie", sent)])


@pytest.mark.parametrize("value", ["", "a" * 42, "a" * 42 + ";", "a" * 42 + "\n", "a" * 43 + "; Domain=example.com"])
def test_nothing_but_an_id_is_set(value: str) -> None:
    with pytest.raises(ValueError, match="new_id"):
        Cookie("mcpctl", https=True).set(value)


def test_ids_are_long_and_all_different() -> None:
    assert len({new_id() for _ in range(1000)}) == 1000
    assert len(new_id()) == 43
