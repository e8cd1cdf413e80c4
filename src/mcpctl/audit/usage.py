"""How tokens are used, by the log: when, how often, and from how many addresses."""

import ipaddress
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path

import msgspec

from mcpctl.audit import files
from mcpctl.audit.reading import Reading, Tally, stamp
from mcpctl.errors import NotFoundError

DAYS = timedelta(days=30)
"""How far back `token list --usage` looks."""
A_DAY = timedelta(days=1)
MANY_ADDRESSES = 8
"""Addresses in a day from which on a token is taken for one that is shared."""
BACK = 50_000
"""Lines from the log's end that are looked at for that."""
_MOST = 1000


@dataclass
class Usage(Tally):
    """The same, and from where; an IPv6 network of the size that one customer has counts as one."""

    addresses: set[str] = field(default_factory=set)


class _Line(msgspec.Struct):
    """What is wanted of a line: far quicker than all of it."""

    event: str
    token: str
    time: str
    reason: str | None = None
    client_ip: str | None = None
    rows: int | None = None


def by_token(reading: Reading) -> dict[str, Usage]:
    """The calls of each token, refused ones too."""
    found: dict[str, Usage] = {}
    marks = b'"event":"tool.', b',"token":"'
    decoder = msgspec.json.Decoder(_Line)
    for line in reading.lines(lambda line: marks[0] in line and marks[1] in line, decoder.decode):
        one = found.setdefault(line.token, Usage())
        one.add({"event": line.event, "time": line.time, "rows": line.rows, "reason": line.reason})
        if line.client_ip is not None and len(one.addresses) < _MOST:
            one.addresses.add(source(line.client_ip))
    return found


def shared(path: Path, now: datetime) -> dict[str, int]:
    """The tokens that came from many addresses within a day, with how many; of the log only the end is looked at."""
    since, found = stamp(now - A_DAY), defaultdict[str, set[str]](set)
    try:
        for line in islice(files.read_back(path), BACK):
            if str(line.get("time", "~")) < since:
                break
            if line.get("event") == "auth.ok" and "token" in line and "client_ip" in line:
                found[str(line["token"])].add(source(str(line["client_ip"])))
    except NotFoundError:  # nothing was written yet
        return {}
    return {token: len(places) for token, places in found.items() if len(places) >= MANY_ADDRESSES}


def unused(made: Mapping[str, datetime], path: Path, now: datetime) -> list[str]:
    """Of these tokens, with when each was made, those that are older than DAYS and have not come in since. None where
    the end of the log, which alone is looked at, does not reach back so far."""
    since, left = now - DAYS, {token for token, when in made.items() if when <= now - DAYS}
    reached, count = "~", 0
    try:
        for line in files.read_back(path) if left else ():
            reached, count = str(line.get("time", reached)), count + 1
            if reached < stamp(since) or count > BACK or not left:
                break
            if line.get("event") in ("auth.ok", "tool.called", "tool.refused"):
                left.discard(str(line.get("token")))
    except NotFoundError:  # nothing was written yet
        return []
    return sorted(left) if count <= BACK else []


def source(address: str) -> str:
    """An address, or of IPv6 the network of the size that one customer has."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((int(found) >> 64 << 64, 64))) if found.version == 6 else address
