"""`mcpctl doctor --fix`: what can be mended without giving anybody a right, or losing anything."""

from collections.abc import Iterable
from dataclasses import dataclass

from mcpctl.diagnosis.patient import Finding
from mcpctl.errors import Error


@dataclass(frozen=True)
class Mended:
    """What was done about a finding; `problem` says why it could not be."""

    name: str
    words: str
    problem: str | None = None


def mend(found: Iterable[Finding]) -> list[Mended]:
    """Do what each of them has."""
    done = []
    for one in found:
        if one.mend is None:
            continue
        try:
            one.mend.work()
            done.append(Mended(one.name, one.mend.words))
        except Error as problem:
            done.append(Mended(one.name, one.mend.words, f"{problem.message} ({problem.hint})"))
    return done
