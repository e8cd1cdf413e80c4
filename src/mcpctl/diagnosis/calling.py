"""`mcpctl doctor --token-file`: real calls with a token of somebody's, through the server, down to each database."""

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult

from mcpctl import control
from mcpctl.diagnosis.patient import Check, Finding, Patient, short, some
from mcpctl.diagnosis.server import asked, folder_of, urls
from mcpctl.errors import masked

_QUESTION = "SELECT 1 AS one"


def calls(patient: Patient, token: str) -> Iterator[Finding]:
    """What its user would be answered: which databases there are, and one row of each. They are in the audit log as
    any other."""
    check = Check("calls")
    answers = [one for one in control.ask_all(folder_of(patient), {"do": "status"}) if "error" not in one]
    if not (there := urls(answers)):
        hint = "mcpctl serve, or: systemctl start mcpctl"
        yield check.fail("calls.no-server", "no server runs on these files that could be called", hint)
    for url in there:
        told = f"{url.scheme}://{url.netloc}"
        try:
            databases = [one["name"] for one in _called(patient, url, token, "list_databases")["databases"]]
            for name in databases:
                _called(patient, url, token, "query_database", query=_QUESTION, database=name)
        except _RefusedError as problem:
            hint = "mcpctl audit tail -n 5 has the reason; mcpctl can says why somebody may not do something"
            yield check.fail("calls.refused", f"{told}: {problem}", hint)
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as problem:
            what = f"{told} gave no answer that a client could take: {short(problem) or type(problem).__name__}"
            yield check.fail("calls.failed", what, "see what is said of the server, and its log")
        else:
            yield check.ok(f"{told} answers calls: {some(databases) or 'no database is open to that token'}")


class _RefusedError(Exception):
    """What the server says why not."""


def _called(patient: Patient, url: SplitResult, token: str, tool: str, **arguments: str) -> dict[str, Any]:
    """The structured answer of a tool."""
    params = {"name": tool, "arguments": arguments}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    status, text = asked(patient, url, url.path, body, headers)
    if status != http.client.OK:
        raise _RefusedError(f"{tool}: {status} {masked(short(text.decode('utf-8', 'replace')))}")
    result = json.loads(text)["result"]
    if result.get("isError"):
        where = f" in {arguments['database']}" if "database" in arguments else ""
        raise _RefusedError(f"{tool}{where}: {masked(short(result['content'][0]['text']))}")
    found: dict[str, Any] = result["structuredContent"]
    return found
