"""How the values in config.yaml are read: each reader takes a plain YAML value and returns ours, or raises ValueError
with what would have been right.
"""

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mcpctl import dangerous_settings

Reader = Callable[[Any], Any]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
_SIZES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


_LONGEST = 1000 * _UNITS["y"]
_LARGEST = 1 << 40
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def duration(value: Any) -> float:
    """Seconds, from `250ms 30s 5m 12h 90d 2w 1y`; 1000y at most, so that a date can still say it."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d|w|y)", value) if isinstance(value, str) else None
    if not found:
        raise ValueError("a duration such as 30s, 5m, 12h, 90d")
    seconds = float(found[1]) * _UNITS[found[2]]
    if seconds > _LONGEST:
        raise ValueError("a duration of 1000y at most")
    return seconds


def optional(read: Reader) -> Reader:
    """The same, or nothing."""
    return lambda value: None if value is None else read(value)


def positive_duration(value: Any) -> float:
    """A duration of 1 ms or more."""
    seconds = duration(value)
    if seconds < 0.001:  # PostgreSQL counts in ms, and takes 0 for "no limit"
        raise ValueError("a duration of 1ms or more")
    return seconds


def session_lifetime(value: Any) -> float:
    """A duration of 1 s to 24 h."""
    found = duration(value)
    if not 1 <= found <= 86400:
        raise ValueError("a duration of 1s to 24h")
    return found


def scope(value: Any) -> str:
    """The name of a scope of one's own (RFC 6749, section 3.3: no space, quote or backslash)."""
    if not isinstance(value, str) or not re.fullmatch(r"[a-z][a-z0-9:._-]{0,62}", value):
        raise ValueError("a-z, then a-z 0-9 : . _ -, 63 at most")
    return value


def schemes(value: Any) -> tuple[str, ...]:
    """A list of URI schemes of installed programs."""
    found = texts(value)
    if wrong := [one for one in found if not re.fullmatch(r"[a-z][a-z0-9+-]{2,30}", one)]:
        raise ValueError(f"schemes such as cursor ({wrong[0]!r} is none)")
    return found


def sync(value: Any) -> float:
    """`answer`, which is 0, or a duration of 10 s at most."""
    try:
        found = 0.0 if value == "answer" else positive_duration(value)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 10:
        raise ValueError("answer, or a duration of 10s at most")
    return found


def statement_timeout(value: Any) -> float:
    """A duration that PostgreSQL takes as a timeout."""
    found = positive_duration(value)
    if found * 1000 >= 2**31:
        raise ValueError("a duration of 24d at most, which is PostgreSQL's own bound")
    return found


def size(value: Any) -> int:
    """Bytes, from `512B 64KiB 4MiB 1GiB`, or a number."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (found := re.fullmatch(r"([0-9]{1,13}) ?(B|KiB|MiB|GiB|)", value)):
        size = int(found[1]) * _SIZES[found[2]]
    else:
        raise ValueError("a size such as 64KiB or 4MiB")
    if not 0 < size <= _LARGEST:
        raise ValueError("a size from 1B to 1024GiB")
    return size


def number(low: int, high: int) -> Reader:
    """A whole number between these."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return read


def rate(value: Any) -> float:
    """So many a second, fractions too."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.001 <= value <= 1_000_000:
        raise ValueError("a number a second from 0.001 to 1000000")
    return float(value)


def share(value: Any) -> float:
    """A part of a whole."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError("a number from 0 to 1")
    return float(value)


def web_address(value: Any) -> str:
    """An http or https URL, without a name and password in it."""
    from urllib.parse import urlsplit

    wrong = ValueError("a URL such as http://127.0.0.1:4318/v1/traces")
    try:
        parts = urlsplit(text(value))
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise wrong
    except ValueError:
        raise wrong from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL without a name and password: headers are for OTEL_EXPORTER_OTLP_HEADERS")
    return str(value)


def limited(value: Any) -> str:
    """Whose limits they are: a token's id, a user, a tenant, or a network in its one spelling."""
    if re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", value):
        return str(value)
    try:
        return str(network(value))
    except ValueError:
        raise ValueError("the id of a token, a user, a tenant, or an address or network") from None


def truth(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")  # noqa: TRY004 - every reader says so in the same way
    return value


def text(value: Any) -> str:
    """A text that is not empty, and that a file system, a terminal and a log can take."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text")
    if CONTROL.search(value):
        raise ValueError("a text without control characters")
    return value


def path(value: Any) -> Path:
    """A path."""
    return Path(text(value))


def choice(*names: str) -> Reader:
    """One of these names."""

    def read(value: Any) -> str:
        if value is False and "off" in names:  # to YAML 1.1 a bare off is false
            return "off"
        if value not in names:
            raise ValueError("one of " + ", ".join(names))
        return str(value)

    return read


def texts(value: Any) -> tuple[str, ...]:
    """A list of texts."""
    if not isinstance(value, list):
        raise ValueError("a list of texts")  # noqa: TRY004
    return tuple(text(item) for item in value)


_RECIPIENT = re.compile(r"age1[02-9ac-hj-np-z]{50,}|ssh-(ed25519|rsa) [A-Za-z0-9+/=]{60,}( [!-~ ]{0,200})?")


def recipients(value: Any) -> tuple[str, ...]:
    """A list of public keys as age takes them. What is none is not repeated: it may be the private one."""
    found = texts(value)
    if not all(map(_RECIPIENT.fullmatch, found)):
        raise ValueError("a list of age1… or ssh-ed25519 …, the public keys of who may open a backup")
    return found


def network(value: Any, *, scoped: bool = False) -> Network:
    """An address or a network in CIDR notation; `scoped`: also with a scope id, which is not looked at."""
    try:
        found = ipaddress.ip_network(text(value))
        if isinstance(found, ipaddress.IPv6Network) and found.network_address.ipv4_mapped:
            raise ValueError(f"IPv4 is written as IPv4: {found.network_address.ipv4_mapped}")
        if "%" in str(found) and not scoped:
            raise ValueError("a scope id, % and what follows, is not looked at: leave it out")
        return found
    except ValueError as problem:
        raise ValueError(f"an address or network such as 10.0.0.0/8 ({problem})") from None


def networks(value: Any) -> tuple[Network, ...]:
    """A list of networks."""
    if not isinstance(value, list):
        raise ValueError("a list of networks")  # noqa: TRY004
    return tuple(network(item) for item in value)


def public_url(value: Any) -> str | None:
    """An origin, as clients write it, or nothing."""
    if value is None:
        return None
    url = text(value).removesuffix("/")  # the well-known places are at a host's root (RFC 9728)
    if not re.match("https?://", url) or not _is_authority(url.partition("://")[2]):
        raise ValueError("a URL such as https://mcp.example.org, without path, user, query or fragment")
    return _as_sent(url)


def _as_sent(origin: str) -> str:
    """An origin as clients write it: in lower case, without the scheme's own port (RFC 6454, section 6.1)."""
    origin = origin.lower()
    return origin.removesuffix({"http": ":80", "https": ":443"}.get(origin.partition("://")[0], "/"))


def _is_authority(value: str) -> bool:
    """Whether it is a host, with a port or without one, as clients send it: in ASCII (RFC 3986, section 3.2)."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?", value)
    if not found or (found[2] and not 0 < int(found[2]) < 65536):
        return False
    try:
        return not value.startswith("[") or ipaddress.ip_address(found[1][1:-1]).version == 6
    except ValueError:
        return False


def hosts(value: Any) -> tuple[str, ...]:
    """A list of hosts, each with a port or without one."""
    found = texts(value)
    if wrong := [item for item in found if not _is_authority(item)]:
        raise ValueError(f"hosts such as mcp.example.org or mcp.example.org:8443 ({wrong[0]!r} is none)")
    return found


def origins(value: Any) -> tuple[str, ...]:
    """A list of origins."""
    found = texts(value)
    for item in found:
        scheme, _, host = item.partition("://")
        if not re.fullmatch("[a-z][a-z0-9+.-]*", scheme) or not _is_authority(host):
            raise ValueError(f"origins such as https://app.example.org, without a path ({item!r} is none)")
    return tuple(map(_as_sent, found))


_PERMISSION = re.compile(r"\*|[a-z*][a-z0-9_*-]*(:[A-Za-z*][A-Za-z0-9_.*-]*){1,3}")


def permission(value: Any) -> str:
    """A permission pattern such as `*`, `tools:*`, `databases:sales:read`."""
    found = text(value)
    if not _PERMISSION.fullmatch(found):
        raise ValueError(
            f"{found!r} is no permission; they look like tools:query_database, databases:sales:read, tools:*"
        )
    return found


PARAMETER = re.compile(r"[a-z_][a-z0-9_.]{0,126}")
"""What has the form of a setting's name, in lower case."""


def one_or_more(value: Any) -> tuple[str, ...]:
    """A text, or a list of texts, each different."""
    return tuple(dict.fromkeys(texts([value] if isinstance(value, str) else value)))


def text_map(value: Any) -> dict[str, str]:
    """Texts by texts."""
    if not isinstance(value, dict):
        raise ValueError("texts by texts")  # noqa: TRY004
    return {text(name): text(one) for name, one in value.items()}


def issuer(value: Any) -> str:
    """The URL of an issuer, to the letter (OpenID Connect Discovery 1.0, section 3; RFC 8414, section 2)."""
    url = text(value)
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    if (
        scheme not in ("https", "http")
        or not _is_authority(host)
        or not re.fullmatch(r"[A-Za-z0-9._~!$&'()*+,;=:@%/-]*", path)
    ):
        raise ValueError("a URL such as https://id.example.org/realms/shop, as its tokens have it in `iss`")
    if ".." in path.split("/"):
        raise ValueError("a URL without .. in it")
    return url


def algorithms(value: Any) -> tuple[str, ...]:
    """Signatures with a public key: whoever can check one of these cannot make one (RFC 8725, section 3.1)."""
    found = one_or_more(value)
    if not found or set(found) - set(ALGORITHMS):
        raise ValueError(f"a list of {', '.join(ALGORITHMS)}")
    return found


ALGORITHMS = ("RS256", "ES256", "EdDSA")


def between(low: float, high: float, words: str) -> Reader:
    """A duration between these seconds, which `words` say."""

    def read(value: Any) -> float:
        seconds = duration(value)
        if not low <= seconds <= high:
            raise ValueError(f"a duration {words}")
        return seconds

    return read


def claim(value: Any) -> str:
    """Where something stands in a token's claims: names with dots between them, `*` for any; what has `://` in it is
    one name."""
    found = text(value)
    if "://" not in found and not all(found.split(".")):
        raise ValueError("a claim's name, or names with dots between them, such as realm_access.roles")
    return found


def claims(value: Any) -> tuple[str, ...]:
    """One or several such places."""
    return tuple(claim(one) for one in one_or_more(value))


def parameters(value: Any) -> tuple[str, ...]:
    """Names of PostgreSQL's settings, in lower case, of which none opens the server to who may change it."""
    found = tuple(dict.fromkeys(texts(value)))
    wrong = [f"{name[:80]!r} is none" for name in found if not PARAMETER.fullmatch(name)]
    faults = [f"names of PostgreSQL's settings in lower case, such as work_mem ({', '.join(wrong)})"] if wrong else []
    for name in found:
        if reason := dangerous_settings.why(name):
            faults.append(f"no setting that {reason}: leave out {name}")
    if faults:
        raise ValueError("; ".join(faults))
    return found


def token_ids(value: Any) -> tuple[str, ...]:
    """A list of tokens' ids. What is none may be a whole token, and is not repeated."""
    found = texts(value)
    if not all(re.fullmatch("[0-9a-z]{8}", item) for item in found):
        raise ValueError("ids of tokens, as `token list` shows them")
    return found


def tables(value: Any) -> tuple[str, ...]:
    """A list of tables, each as database.schema.table."""
    found = texts(value)
    named = re.compile(r"[a-z][a-z0-9_-]{0,62}\..+\..+")
    if wrong := [item for item in found if not named.fullmatch(item) or "*" in item.split(".")]:
        raise ValueError(f"tables such as shop.public.orders, with the database's name here ({wrong[0]!r} is none)")
    return found


def permissions(value: Any) -> tuple[str, ...]:
    """A list of permission patterns."""
    return tuple(permission(one) for one in texts(value))


_HOST_NAME = r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*"


def host_name(value: str) -> str | None:
    """A host's name in its one spelling, without a final dot; None for what is none, addresses included."""
    name = value.lower().removesuffix(".")
    if not re.fullmatch(_HOST_NAME, name) or re.fullmatch(r"[0-9]+|0x[0-9a-f]*", name.rpartition(".")[2]):
        return None  # a last label of digits alone is an address to resolvers, in one of its old spellings
    return name


def named_hosts(value: Any) -> tuple[str, ...]:
    """A list of names, addresses and networks, each in its one spelling."""
    found = []
    for number, item in enumerate(texts(value), 1):
        name = host_name(item)
        try:
            found.append(name if name is not None else str(network(item)))
        except ValueError:
            raise ValueError(
                f"hosts such as db.example.org, 10.1.2.3 or 10.0.0.0/8 (number {number} is none)"
            ) from None
    return tuple(found)


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is this machine's alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def has_password(dsn: str) -> bool:
    """As libpq reads it: in a URL's user part or query, or as a key. Also one that libpq would refuse."""
    if re.match(r"[^:]*://", dsn):
        names = [unquote(name) for name in re.findall(r"[?&]([^=&]*)=", dsn)]
        return bool(re.match(r"[^:]*://[^@/:]*:[^@/]+@", dsn)) or not {"password", "sslpassword"}.isdisjoint(names)
    return bool(re.search(r"password\s*=", dsn))
