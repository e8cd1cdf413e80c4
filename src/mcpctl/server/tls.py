"""HTTPS: the certificate, its chain and its key, which have to fit together."""

import contextlib
import os
import ssl
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from mcpctl.config_keys import Settings
from mcpctl.errors import ConfigError


def context(settings: Settings) -> ssl.SSLContext:
    """TLS 1.2 at least, with the certificate, its chain and key. Raises ConfigError where they don't fit together."""
    tls = settings.server.tls
    if tls.cert is None or tls.key is None:
        raise ConfigError("TLS needs a certificate and its key", "give --tls-cert and --tls-key")
    if os.name == "posix" and tls.key.exists() and tls.key.stat().st_mode & 0o007:
        raise ConfigError(f"the private key {tls.key} can be read by anybody", f"chmod o= {tls.key}")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    own = _certificates(tls.cert, "certificate")
    if tls.chain is not None:
        _belongs(own[-1], tls.chain)
    try:
        with _with_chain(tls.cert, tls.chain) as cert:
            made.load_cert_chain(cert, tls.key, password=lambda: "")
    except (OSError, ssl.SSLError) as problem:
        reason = getattr(problem, "reason", None) or problem.strerror or str(problem)
        raise ConfigError(
            f"the certificate {tls.cert} and key {tls.key} cannot be used: {reason}",
            "both in PEM, the key without a passphrase and belonging to the certificate",
        ) from None
    return made


def out_of_date(settings: Settings, now: datetime) -> str | None:
    """What is to be said of a certificate that clients refuse for its dates; None where there is nothing."""
    tls = settings.server.tls
    if tls.cert is None:
        return None
    own = _certificates(tls.cert, "certificate")[0]
    if own.not_valid_before_utc <= now <= own.not_valid_after_utc:
        return None
    begin, end = own.not_valid_before_utc.date(), own.not_valid_after_utc.date()
    return f"the certificate {tls.cert} counts from {begin} to {end}: clients refuse it"


def _certificates(path: Path, what: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as problem:
        reason = problem.strerror
    except ValueError:
        reason = "there is no certificate in PEM in it, or a broken one"
    raise ConfigError(f"the {what} {path} cannot be used: {reason}", "certificates in PEM, and nothing else") from None


def _belongs(last: x509.Certificate, chain: Path) -> None:
    """Refuse a chain that does not go on from the certificate: clients would get to no root that they know."""
    for issuer in _certificates(chain, "chain"):
        with contextlib.suppress(ValueError, TypeError, InvalidSignature):
            last.verify_directly_issued_by(issuer)
            return
    raise ConfigError(
        f"the chain {chain} does not hold {last.issuer.rfc4514_string()}, who issued the certificate",
        "take the chain that came with the certificate",
    )


@contextlib.contextmanager
def _with_chain(cert: Path, chain: Path | None) -> Iterator[Path]:
    """The certificate's file, or one that has its chain behind it, as OpenSSL wants them."""
    if chain is None:
        yield cert
        return
    with tempfile.NamedTemporaryFile(suffix=".pem") as both:
        both.write(cert.read_bytes().rstrip() + b"\n" + chain.read_bytes())
        both.flush()
        yield Path(both.name)
