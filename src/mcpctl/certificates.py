"""The server's certificate: its files are read once, and what was read is what is checked and used."""

import contextlib
import os
import ssl
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes

from mcpctl.config_keys import Settings, Tls
from mcpctl.errors import ConfigError

PARTS = ("cert", "key", "chain", "client_ca")
"""The keys of server.tls that name a file."""


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, with its chain and the CA of clients' certificates, as they were read together."""

    tls: Tls
    contents: dict[str, bytes] = field(repr=False)

    @property
    def own(self) -> x509.Certificate:
        """The server's own certificate."""
        return self._certificates("cert")[0]

    @property
    def digest(self) -> str:
        """What tells this certificate from another one: the beginning of its SHA-256."""
        return self.own.fingerprint(hashes.SHA256()).hex()[:16]

    def told(self, part: str) -> str:
        """The end of the first certificate of that file, and what tells it from another one."""
        first = self._certificates(part)[0]
        return (
            f"counts until {first.not_valid_after_utc.date()}, SHA-256 {first.fingerprint(hashes.SHA256()).hex()[:16]}…"
        )

    def out_of_date(self, now: datetime) -> str | None:
        """What is to be said of its dates where clients refuse it for them."""
        begin, end = self.own.not_valid_before_utc, self.own.not_valid_after_utc
        if begin <= now <= end:
            return None
        return f"the certificate {self.tls.cert} counts from {begin.date()} to {end.date()}: clients refuse it"

    def context(self) -> ssl.SSLContext:
        """TLS 1.2 at least, with all of it. Raises ConfigError where it does not fit together."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        last = self._certificates("cert")[-1]
        if "chain" in self.contents:
            self._check_chain(last)
        whole = self.contents["cert"].rstrip() + b"\n" + self.contents.get("chain", b"")
        try:
            with _as_file(whole) as cert, _as_file(self.contents["key"]) as key:
                made.load_cert_chain(cert, key, password=lambda: "")
        except (OSError, ssl.SSLError) as problem:
            raise _cannot(self.tls, getattr(problem, "reason", None) or problem.strerror or str(problem)) from None
        if "client_ca" in self.contents:
            if leaf := next((one for one in self._certificates("client_ca") if not _can_issue(one)), None):
                reason = f"{leaf.subject.rfc4514_string()} is no CA, so nobody could come in by it"
                raise _unusable("client_ca", self.tls.client_ca, reason)
            made.load_verify_locations(cadata=self.contents["client_ca"].decode("ascii", "replace"))
            made.verify_mode = ssl.CERT_OPTIONAL if self.tls.client_certificate == "optional" else ssl.CERT_REQUIRED
        return made

    def _certificates(self, part: str) -> list[x509.Certificate]:
        try:
            return x509.load_pem_x509_certificates(self.contents[part])
        except ValueError:
            reason = "there is no certificate in PEM in it, or a broken one"
        raise _unusable(part, getattr(self.tls, part), reason) from None

    def _check_chain(self, last: x509.Certificate) -> None:
        """Refuse a chain that does not go on from the certificate: clients would get to no root that they know."""
        for issuer in self._certificates("chain"):
            with contextlib.suppress(ValueError, TypeError, InvalidSignature):
                last.verify_directly_issued_by(issuer)
                return
        raise ConfigError(
            f"the chain {self.tls.chain} does not hold {last.issuer.rfc4514_string()}, who issued the certificate",
            "take the chain that came with the certificate",
        )


def read(tls: Tls) -> Pair:
    """Read the files. Raises ConfigError where one cannot be, or the key can be read by anybody."""
    if tls.cert is None or tls.key is None:
        raise ConfigError("TLS needs a certificate and its key", "give --tls-cert and --tls-key")
    contents = {}
    for part in PARTS:
        path = getattr(tls, part)
        if path is None:
            continue
        try:
            with open(path, "rb", opener=_at_once) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise OSError("it is no regular file")
                if part == "key" and os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o007:
                    raise ConfigError(f"the private key {path} can be read by anybody", f"chmod o= {path}")
                contents[part] = file.read()
        except OSError as problem:
            reason = problem.strerror or str(problem)
            raise (_cannot(tls, reason) if part == "key" else _unusable(part, path, reason)) from None
    return Pair(tls, contents)


def _at_once(path: str, flags: int) -> int:
    """A pipe has nobody at its other end, perhaps for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def context(settings: Settings) -> ssl.SSLContext:
    """What the config's files make, read now. Raises ConfigError as `read` and `Pair.context` do."""
    return read(settings.server.tls).context()


def stamps(tls: Tls) -> tuple[object, ...]:
    """What differs when one of the files has changed: inode, size, time and mode of each."""
    return tuple(_stamp(getattr(tls, part)) for part in PARTS)


def expires(settings: Settings) -> datetime | None:
    """When the certificate of the config's file ends, in UTC; None where there is none, or none that can be read."""
    if settings.server.tls.cert is None:
        return None
    try:
        return read(settings.server.tls).own.not_valid_after_utc
    except ConfigError:
        return None


def out_of_date(settings: Settings, now: datetime) -> str | None:
    """What is to be said of a certificate that clients refuse for its dates; None where there is nothing."""
    return None if settings.server.tls.cert is None else read(settings.server.tls).out_of_date(now)


def _stamp(path: Path | None) -> object:
    if path is None:
        return None
    try:
        found = path.stat()
    except OSError as problem:
        return problem.errno
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode


def _can_issue(one: x509.Certificate) -> bool:
    """Whether others can be issued by it; a root of the first version does not say so."""
    try:
        return one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return one.issuer == one.subject


def _unusable(part: str, path: Path | None, reason: str) -> ConfigError:
    what = {"cert": "certificate", "chain": "chain", "client_ca": "client CA"}[part]
    return ConfigError(f"the {what} {path} cannot be used: {reason}", "certificates in PEM, and nothing else")


def _cannot(tls: Tls, reason: str) -> ConfigError:
    return ConfigError(
        f"the certificate {tls.cert} and key {tls.key} cannot be used: {reason}",
        "both in PEM, the key without a passphrase and belonging to the certificate",
    )


@contextlib.contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A name by which OpenSSL, which takes files alone, reads it: in memory where the system can, else in a folder that
    nobody else may enter and that is gone afterwards."""
    if hasattr(os, "memfd_create") and os.path.exists("/proc/self/fd"):
        with os.fdopen(os.memfd_create("mcpctl"), "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pem")
        path.touch(0o600)
        path.write_bytes(content)
        yield str(path)
