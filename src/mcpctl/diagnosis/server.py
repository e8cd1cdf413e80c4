"""The server that runs on these files: what it says of itself, and whether a client could come in where it listens."""

import http.client
import json
import ssl
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import mcpctl
from mcpctl import certificates, control
from mcpctl.diagnosis.patient import Check, Finding, Patient, short, some

_SECONDS = 5.0
_ENOUGH = 1 << 20
Answer = Mapping[str, Any]


def server(patient: Patient) -> Iterator[Finding]:
    """Each of its processes, by the control sockets, and then the door, as who has no token."""
    check = Check("server")
    told = control.ask_each(folder_of(patient), {"do": "status"})
    if silent := [str(pid) for pid, one in told if "error" in one]:
        what = f"processes of the server do not answer: {some(silent)}"
        yield check.fail("server.silent", what, f"`ps -p {silent[0]}` shows it; where it hangs: kill -9 {silent[0]}")
    answers = [one for _, one in told if "error" not in one]
    if not told:
        yield check.skip("no server runs on these files", "mcpctl serve, or: systemctl start mcpctl")
    if not answers:
        return
    yield from _itself(check, patient, answers)
    for url in urls(answers):
        yield from _door(check, patient, url)


def urls(answers: Sequence[Answer]) -> list[SplitResult]:
    """Where clients reach what has answered so."""
    return [urlsplit(url) for url in sorted({str(one["url"]) for one in answers if one.get("url")})]


def folder_of(patient: Patient) -> Path:
    """Where its control sockets are."""
    return control.folder_of(patient.settings.server.runtime_dir, patient.settings.auth.token_file)


def _itself(check: Check, patient: Patient, answers: Sequence[Answer]) -> Iterator[Finding]:
    older = sorted({str(one.get("version")) for one in answers} - {mcpctl.__version__})
    again = "systemctl restart mcpctl, or start it again by hand"
    if older:
        what = f"the server that runs is mcpctl {some(older)}, and {mcpctl.__version__} is installed"
        yield check.warn("server.older", what, again)
    if any(one.get("config_changed") for one in answers):
        what = "the config has changed since the server read it"
        yield check.warn("server.config-changed", what, "mcpctl config check, then: mcpctl config reload")
    if fault := next((one["audit"] for one in answers if one.get("audit")), None):
        hint = "see what `mcpctl status` says; what the server could not write waits in its memory"
        yield check.fail("server.audit", f"the server cannot write the audit log: {fault}", hint)
    if kept := sorted({name for one in answers for name in one.get("kept_out") or ()}):
        what = f"kept out only until the server restarts, though the file lets them in: {some(kept)}"
        yield check.fail("server.kept-out", what, f"mcpctl token revoke {kept[0]}")
    ends = {float(one["tls_not_after"]) for one in answers if one.get("tls_not_after") is not None}
    if ends and patient.settings.server.tls.cert is not None and not older:
        own = certificates.read(patient.settings.server.tls).own.not_valid_after_utc.timestamp()
        if any(abs(one - own) > 1 for one in ends):
            what = "the server still shows an earlier certificate than the file's"
            yield check.warn("server.certificate", what, "its log says why it did not take it; mcpctl config reload")


def _door(check: Check, patient: Patient, url: SplitResult) -> Iterator[Finding]:
    """/health and /ready at the URL that clients use, with its certificate and name checked as they do."""
    told, tls = f"{url.scheme}://{url.netloc}", patient.settings.server.tls
    if tls.client_ca is not None and tls.client_certificate != "optional":
        yield check.skip(f"{told} wants a certificate of who asks, and the doctor has none")
        return
    try:
        status, _ = asked(patient, url, "/health")
        ready, body = asked(patient, url, "/ready")
    except ssl.SSLCertVerificationError as problem:
        what = f"a client refuses {told}: {problem.verify_message}"
        hint = "see `openssl s_client`; where the CA is your own, into this machine's CAs (or SSL_CERT_FILE)"
        yield check.warn("server.tls", what, hint)
        return
    except (OSError, http.client.HTTPException, ValueError) as problem:
        what = f"{told} does not answer: {short(problem) or type(problem).__name__}"
        yield check.fail("server.unreachable", what, "is the proxy before it up, and the name and the firewall right?")
        return
    if status != http.client.OK:
        what = f"{told}/health answers {status}, and not 200"
        yield check.fail("server.health", what, "is it mcpctl that answers there? See the proxy's and the server's log")
    elif ready != http.client.OK:
        what = f"{told}/ready answers {ready}: {_said(body)}"
        yield check.fail("server.not-ready", what, "mcpctl status says which database takes no connections, and more")
    else:
        yield check.ok(f"{told} is up and ready, by mcpctl {mcpctl.__version__}")


def asked(
    patient: Patient,
    url: SplitResult,
    path: str,
    body: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """Status and beginning of an answer, to a POST where there is a body; its certificate and name are checked. Raises
    OSError, HTTPException or ValueError where there is none in some seconds."""
    if url.scheme == "https":
        context = ssl.create_default_context()
        if more := patient.environ.get("SSL_CERT_FILE"):
            context.load_verify_locations(more)
        made: http.client.HTTPConnection = http.client.HTTPSConnection(
            url.hostname or "", url.port, timeout=_SECONDS, context=context
        )
    else:
        made = http.client.HTTPConnection(url.hostname or "", url.port, timeout=_SECONDS)
    try:
        made.request("POST" if body else "GET", path, body, {"Accept": "application/json", **(headers or {})})
        answer = made.getresponse()
        return answer.status, answer.read(_ENOUGH)
    finally:
        made.close()


def _said(body: bytes) -> str:
    try:
        return short(json.dumps(json.loads(body)))
    except ValueError:
        return short(body.decode("utf-8", "replace"))
