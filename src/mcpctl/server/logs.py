"""The server's own messages: to stderr, and never with a token in them."""

import logging
import re
import sys

_TOKEN = re.compile(r"(mcp_[0-9a-z]{8})_[0-9A-Za-z]{20,}(?:_[0-9A-Za-z]+)?")


def redacted(text: str) -> str:
    """The text with every token cut down to its id."""
    return _TOKEN.sub(r"\1_…", text)


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record)).translate(_CONTROL)


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
