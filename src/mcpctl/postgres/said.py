"""What PostgreSQL said: of a statement that failed, in its own words, each bounded; and the cells of ours."""

from typing import Any

from psycopg import pq

from mcpctl.errors import Error
from mcpctl.postgres.wire import ConnectionLostError

_Status = pq.ExecStatus
_ERROR_BYTES = 2000


class StatementError(Error):
    """What PostgreSQL said of the statement, in its own words, each bounded."""

    status = 200

    def __init__(self, message: str, fields: dict[str, str]) -> None:
        super().__init__(message, fields.get("hint"))
        self.fields = fields


def cells(result: Any) -> list[tuple[bytes, ...]] | StatementError:
    """A result's cells as they came, or what PostgreSQL said instead."""
    if result.status not in (_Status.TUPLES_OK, _Status.COMMAND_OK):
        return error(result)
    return [
        tuple(result.get_value(row, column) or b"" for column in range(result.nfields)) for row in range(result.ntuples)
    ]


def error(result: Any) -> StatementError:
    """What PostgreSQL said, or that what stood before it went wrong (PIPELINE_ABORTED has no words of its own)."""
    if result.status == _Status.PIPELINE_ABORTED:
        return StatementError("the statement was not run", {})
    return _said(result)


def withheld(failed: StatementError) -> StatementError:
    """An error without its words, which may hold a row of what nobody may read: what it has read nobody can say."""
    state = failed.fields.get("sqlstate", "none")
    return StatementError(
        f"it failed (SQLSTATE {state}), and PostgreSQL's words are withheld: they may hold what nobody may read",
        {
            "sqlstate": state,
            "hint": "here are canary tables, and PostgreSQL does not say what a statement that fails has read",
        },
    )


def _said(result: Any) -> StatementError:
    """PostgreSQL's own words: message, SQLSTATE, detail, hint, position. Never where it runs or who we are."""
    wanted = {
        "sqlstate": pq.DiagnosticField.SQLSTATE,
        "detail": pq.DiagnosticField.MESSAGE_DETAIL,
        "hint": pq.DiagnosticField.MESSAGE_HINT,
        "position": pq.DiagnosticField.STATEMENT_POSITION,
        "context": pq.DiagnosticField.CONTEXT,
    }
    fields = {name: _bounded(value) for name, code in wanted.items() if (value := result.error_field(code))}
    primary = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY)
    if primary is None:
        raise ConnectionLostError("the connection to the database was lost")
    return StatementError(_bounded(primary), fields)


def _bounded(value: bytes) -> str:
    text = value[:_ERROR_BYTES].decode("utf-8", "ignore" if len(value) > _ERROR_BYTES else "replace")
    return text + "…" if len(value) > _ERROR_BYTES else text
