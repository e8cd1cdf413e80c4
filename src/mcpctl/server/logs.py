"""The server's own messages: to stderr, and never with a token in them."""

import logging
import sys

from mcpctl.errors import masked


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record)).translate(_CONTROL)


_CONTROL = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if code not in (9, 10)}


def set_up(level: str) -> None:
    """Send all messages of this process to stderr. uvicorn's and the SDK's only from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacting("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("mcpctl").setLevel(level.upper())
    # A stranger's bad requests are told to him and counted, not listed; an answer that ends short is one that was cut.
    for name in ("psycopg", "mcp", "uvicorn"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("uvicorn.error").addFilter(lambda record: "without completing" not in record.getMessage())
