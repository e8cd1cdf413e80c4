"""JSON from strangers: one object, in which nothing can be read in two ways.

No key twice, no NaN or Infinity, no number longer than a double has digits for, and no deeper than a person writes
(RFC 8259, sections 4, 6 and 9, leave all of that to the reader).
"""

import json
import math
import re
from typing import Any

DEEPEST = 20
_LONGEST_NUMBER = 30
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_OTHERS = re.compile(rb"[^\[\]{}]+")


def read(data: bytes) -> dict[str, Any]:
    """The object that `data` is; ValueError, which repeats nothing of it, where it is none."""
    _check_depth(data)
    try:
        found = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_once,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_constant,
        )
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("is no JSON") from None
    if not isinstance(found, dict):
        raise ValueError("is no JSON object")  # noqa: TRY004 - every fault here is one of the value
    return found


def _check_depth(data: bytes) -> None:
    """Before it is parsed, which recurses."""
    depth = 0
    for byte in _OTHERS.sub(b"", _STRINGS.sub(b"", data)):
        depth += 1 if byte in b"[{" else -1
        if depth > DEEPEST:
            raise ValueError(f"is nested deeper than {DEEPEST}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("has a key twice")
    return found


def _integer(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError("has a number that is too long")
    return int(text)


def _finite(text: str) -> float:
    found = float(text)
    if len(text) > _LONGEST_NUMBER or not math.isfinite(found):
        raise ValueError("has a number that is too long or too large")
    return found


def _constant(text: str) -> Any:
    raise ValueError(f"has {text}, which is no number of JSON")
