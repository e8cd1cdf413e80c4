"""A JWT's text: taken apart strictly, and its signature checked (RFC 7515, RFC 7519, RFC 8725)."""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from mcpctl.errors import UnauthorizedError
from mcpctl.identity import strict_json
from mcpctl.identity.jwks import Key

LONGEST = 16 << 10
"""Characters of a whole token."""
_FORM = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]*)")
_REFUSED = ("crit", "jku", "jwk", "x5u", "x5c", "b64", "zip", "enc")
"""Header parameters that would let a token choose its own key, or be read in another way."""
_TYPES = ("jwt", "at+jwt", "application/at+jwt")
_LONGEST_KEY_ID = 255
_CHECKS = {
    "RS256": RSAAlgorithm(RSAAlgorithm.SHA256),
    "ES256": ECAlgorithm(ECAlgorithm.SHA256),
    "EdDSA": OKPAlgorithm(),
}
"""PyJWT's own checks, without its reading of a token, which walks over each character: a stranger sends long ones."""


@dataclass(frozen=True, slots=True)
class Signed:
    """A token taken apart. Nothing of it is true before `check`. `access`: its header says that it is an access token,
    and not only that it is a JWT (RFC 9068, section 2.1)."""

    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    access: bool
    algorithm: str
    key_id: str
    claims: Mapping[str, Any] = field(repr=False)


def is_jwt(text: str) -> bool:
    """Whether it has the form of one: three parts in base64url, of which the first begins a JSON object."""
    return text.startswith("eyJ") and _FORM.fullmatch(text[: LONGEST + 1]) is not None


def read(text: str) -> Signed:
    """The token taken apart; UnauthorizedError, which repeats nothing of it, where it is none that could be good."""
    found = _FORM.fullmatch(text) if len(text) <= LONGEST else None
    if found is None:
        raise UnauthorizedError(f"it is no JWT, or longer than {LONGEST} characters")
    if not found[3]:
        raise UnauthorizedError("it is not signed")
    header, claims = _part(found[1], "header"), _part(found[2], "claims")
    signature = _decoded(found[3], "signature")
    if refused := next((name for name in _REFUSED if name in header), None):
        raise UnauthorizedError(f"its header has {refused}, which is never taken")
    algorithm, key_id, kind = header.get("alg"), header.get("kid"), header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise UnauthorizedError("its header says that it is no access token (typ)")
    if not isinstance(algorithm, str) or algorithm.lower() == "none":
        raise UnauthorizedError("it is not signed (alg)")
    if not isinstance(key_id, str) or not 0 < len(key_id) <= _LONGEST_KEY_ID:
        raise UnauthorizedError("its header names no key (kid)")
    return Signed(text.rpartition(".")[0].encode(), signature, kind.lower() != "jwt", algorithm, key_id, claims)


def _part(text: str, name: str) -> dict[str, Any]:
    try:
        return strict_json.read(_decoded(text, name))
    except ValueError as problem:
        raise UnauthorizedError(f"its {name} {problem}") from None


def _decoded(text: str, name: str) -> bytes:
    """The bytes of a part, of which there is one spelling (RFC 7515, section 2)."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        data = b""
    if not data or base64.urlsafe_b64encode(data).rstrip(b"=") != text.encode():
        raise UnauthorizedError(f"its {name} is not in base64url")
    return data


def check(token: Signed, key: Key) -> None:
    """Returns where the key has signed the token; else UnauthorizedError."""
    if token.algorithm != key.algorithm or not _CHECKS[key.algorithm].verify(token.signed, key.public, token.signature):
        raise UnauthorizedError("its signature is wrong")
