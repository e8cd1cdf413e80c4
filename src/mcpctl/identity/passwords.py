"""A user's password: what may be one, and the hash of it that users.yaml keeps.

Hashed is the NFC form in UTF-8, so that the same password fits from a keyboard that composes é and from one that does
not. PHC strings of one profile alone are taken: dearer ones would let whoever writes the file make each sign-in pay,
cheaper ones would be guessed sooner, and either would tell by its time which user there is.
"""

import re
import unicodedata
from typing import Any

import argon2
from argon2.exceptions import InvalidHashError

from mcpctl.errors import UsageError, masked

# RFC 9106, section 4: the second recommended option (t=3, 64 MiB, 4 lanes, 128-bit salt, 256-bit tag). The first one
# takes 2 GiB a check.
RFC_9106_SECOND = argon2.PasswordHasher(time_cost=3, memory_cost=65536, parallelism=4, hash_len=32, salt_len=16)
LEAST = 15
"""Characters (NIST SP 800-63B-4, section 3.1.1.2: where the password is all that is asked for)."""
MOST = 1024
"""Bytes in UTF-8. NIST asks for 64 characters at least."""
_DIFFERENT = 5
"""Different characters beside the user's name: NIST wants what is expected or repetitive refused, and no more rules."""
_FORM = re.compile(r"\$argon2id\$v=19\$m=65536,t=3,p=4\$[A-Za-z0-9+/]{22}\$[A-Za-z0-9+/]{43}")
_NO_TEXT = {"Cc": "a control character", "Cn": "a character that Unicode does not have", "Cs": "half a character"}
"""Kinds of what no keyboard types. NFC of what Unicode does not have yet could change (UAX 15, stabilized strings)."""


def normal(text: str) -> bytes | None:
    """What is hashed of a text; None of one that is nobody's password: too long, or no Unicode.

    A megabyte costs nothing: no character is made of twice as many others as it has bytes.
    """
    if len(text) > 2 * MOST:
        return None
    try:
        found = unicodedata.normalize("NFC", text).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON can spell one
        return None
    return found if len(found) <= MOST else None


def check_new(text: str, user: str) -> None:
    """Raises UsageError (exit 2, HTTP 400) for what may not become the user's password. The text is not repeated."""
    told = "take another one: several words, or what a password manager makes"
    found = normal(text)
    if not text:
        raise UsageError("the password is empty", f"at least {LEAST} characters")
    if kinds := [_NO_TEXT[kind] for kind in map(unicodedata.category, text[: 2 * MOST]) if kind in _NO_TEXT]:
        raise UsageError(f"the password holds {kinds[0]}", "one line of text, and nothing else")
    if found is None:
        raise UsageError(f"the password is longer than {MOST} bytes", "take a shorter one")
    if (length := len(found.decode())) < LEAST:
        raise UsageError(f"the password has {length} characters, and needs {LEAST}", told)
    if masked(text) != text:
        raise UsageError("the password holds a token", "tokens are ended and rotated; a password is none of them")
    rest = text.casefold().replace(user, "") if len(user) > 2 else text.casefold()
    if len(set(rest)) < _DIFFERENT:
        raise UsageError("the password is the user's name or a few characters, again and again", told)


def hashed(text: str, hasher: argon2.PasswordHasher = RFC_9106_SECOND) -> str:
    """The PHC string to keep of a password that was checked. Takes 64 MiB, and some 0.1 s."""
    found = normal(text)
    if found is None:
        raise UsageError(f"the password is longer than {MOST} bytes, or no text", "take another one")
    return hasher.hash(found)


def read(value: Any) -> str:
    """The PHC string of an entry. ValueError where it is none of exactly our profile."""
    if isinstance(value, str) and _FORM.fullmatch(value):
        return value
    instead = "; take it out of its line, and set it anew with `mcpctl user passwd`"
    try:
        cost = argon2.extract_parameters(value)
    except (InvalidHashError, AttributeError, TypeError, ValueError):
        raise ValueError(f"password: is not an Argon2id hash as `mcpctl user passwd` makes it{instead}") from None
    if cost.type is not argon2.Type.ID:
        raise ValueError(f"password: is not of the type Argon2id{instead}")
    raise ValueError(
        f"password: t={cost.time_cost}, m={cost.memory_cost}, p={cost.parallelism}, {cost.salt_len}+{cost.hash_len} "
        f"bytes; only t=3, m=65536, p=4, 16+32 bytes is taken here{instead}"
    )
