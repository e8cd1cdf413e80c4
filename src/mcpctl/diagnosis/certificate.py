"""The server's certificate: its dates, its key, its chain, and the names in it, as a client would see them."""

import ssl
from collections.abc import Iterator, Mapping
from datetime import timedelta
from urllib.parse import urlsplit

from cryptography import x509

from mcpctl import certificates
from mcpctl.certificates import Pair
from mcpctl.config_keys import Server
from mcpctl.diagnosis.patient import Check, Finding, Patient, some

_SOON = timedelta(days=30)
"""This long before its end a certificate ought to have been renewed; one that lives less than 90 days, as ACME's short
ones, when a third of its life is left."""
_NO_ISSUER, _SELF_SIGNED, _SELF_SIGNED_ROOT, _FIRST = 20, 18, 19, 21
"""X509_V_ERR_… of openssl-verify(1): what is missing is somebody to believe."""


def certificate(patient: Patient) -> Iterator[Finding]:
    """Whether the certificate, its key and its chain fit together, and for how long they count."""
    server, check = patient.settings.server, Check("certificate")
    if server.tls.cert is None:
        return
    pair = certificates.read(server.tls)
    pair.context()
    end, path = pair.own.not_valid_after_utc, server.tls.cert
    if wrong := pair.out_of_date(patient.now):
        hint = "renew it; a server that runs takes the new files by itself"
        yield check.fail("certificate.dates", wrong, hint)
    elif end - patient.now < min(_SOON, (end - pair.own.not_valid_before_utc) / 3):
        hint = "renew it, and see why nothing has"
        yield check.warn("certificate.ends", f"{path} ends on {end.date()}", hint)
    else:
        yield check.ok(f"{path} and its key fit together, and count until {end.date()}")
    names = _names(pair.own)
    if missing := [host for host in _called(server) if not any(_fits(host, name) for name in names)]:
        what = f"{path} is for {some(names) or 'no name'}, and clients call the server {some(missing)}: they refuse it"
        yield check.fail("certificate.names", what, f"take one that has {missing[0]} among its names")
    if unknown := _not_followed(pair, patient.environ):
        what = f"no CA of this machine is at the end of its chain ({unknown}), and so clients may refuse {path}"
        hint = "put its intermediate certificates behind it, or into server.tls.chain; where the CA is your own, into "
        hint += "this machine's CAs, too (update-ca-certificates, or SSL_CERT_FILE)"
        yield check.warn("certificate.chain", what, hint)


def _names(own: x509.Certificate) -> list[str]:
    """What it is for (RFC 9525, section 6.3: the subject's common name counts for nothing)."""
    try:
        found = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [str(one) for one in found.get_values_for_type(x509.IPAddress)]
    return [*(name.lower() for name in found.get_values_for_type(x509.DNSName)), *addresses]


def _called(server: Server) -> list[str]:
    """What clients call the server, where that is known."""
    host = urlsplit(server.public_url).hostname if server.public_url is not None else None
    return [host] if host and not server.trusted_proxies else []  # a proxy may show another one


def _fits(host: str, name: str) -> bool:
    """RFC 9525, section 6.3: a * stands for the whole of the first label, and for no more."""
    return host == name or (name.startswith("*.") and host.partition(".")[2] == name[2:])


def _not_followed(pair: Pair, environ: Mapping[str, str]) -> str | None:
    """Why a client with this machine's CAs cannot follow the chain up; None where it can. Both speak in memory."""
    theirs, ours = pair.context(), ssl.create_default_context()
    theirs.verify_mode, ours.check_hostname = ssl.CERT_NONE, False
    if more := environ.get("SSL_CERT_FILE"):
        try:
            ours.load_verify_locations(more)
        except OSError as problem:
            return f"SSL_CERT_FILE: {problem.strerror or problem}"
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, server = ours.wrap_bio(down, up), theirs.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as problem:
                known = problem.verify_code in (_NO_ISSUER, _SELF_SIGNED, _SELF_SIGNED_ROOT, _FIRST)
                return problem.verify_message if known else None  # its dates are said by the time that was handed in
            except ssl.SSLError as problem:
                return str(problem.reason or problem)
    return None
