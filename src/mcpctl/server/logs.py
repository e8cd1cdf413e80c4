"""The server's own messages: as text or JSON, on stderr, in a file or to the journal, and never with a token in them.

Who logs something of one request says whose it is: `log.warning(…, extra={"about": {"request_id": …}})`. Text has it in
the message where it must be there, JSON and the journal have it in fields of its own.
"""

import json
import logging
import logging.handlers
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mcpctl.config_keys import Log, Settings
from mcpctl.errors import ConfigError, masked
from mcpctl.server import journal

_FIELDS = (
    "request_id",
    "trace_id",
    "token",
    "user",
    "tenant",
    "client_ip",
    "tool",
    "database",
    "outcome",
    "elapsed_ms",
)
"""What a line may say of the request that it belongs to, in this order."""
_OTHERS = 0o027
"""Of a log's mode: its group may read it, as is the custom with adm."""
_CONTROL = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if code != 9}
_TURNING = [0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
"""What ends a line, or turns the direction in which the rest of it is shown (Unicode Standard Annex 9)."""
_CONTROL |= {code: f"\\u{code:04x}" for code in _TURNING}
_IN_TRACES = {code: text for code, text in _CONTROL.items() if code != 10}


def about(record: logging.LogRecord) -> dict[str, Any]:
    """What is known of the request that a line belongs to."""
    known: Mapping[str, Any] = getattr(record, "about", {})
    return {name: known[name] for name in _FIELDS if known.get(name) is not None}


class _Text(logging.Formatter):
    """A line of text; only a traceback has more than one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return masked(super().formatMessage(record)).translate(_CONTROL)

    def formatException(self, ei: Any) -> str:
        return masked(super().formatException(ei)).translate(_IN_TRACES)


class _Json(logging.Formatter):
    """A JSON object a line. What is not plain ASCII is escaped, and so no control character is in it."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        said: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
            **about(record),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return masked(json.dumps(said)).replace("…", "\\u2026")


class _Journal(logging.Handler):
    """To the journal, with fields; to stderr where the journal does not take it."""

    def __init__(self, socket: journal.Journal) -> None:
        super().__init__()
        self._socket = socket
        self._otherwise = _on_stderr(_Text())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = masked(record.getMessage()).translate(_CONTROL)
            if record.exc_info:
                message += "\n" + _Text().formatException(record.exc_info)
            fields = {f"MCPCTL_{name.upper()}": masked(str(value)) for name, value in about(record).items()}
            self._socket.send(
                {
                    "MESSAGE": message,
                    "PRIORITY": journal.priority(record.levelno),
                    "SYSLOG_IDENTIFIER": "mcpctl",
                    "MCPCTL_LOGGER": record.name,
                    **fields,
                }
            )
        except OSError:
            self._otherwise.emit(record)

    def close(self) -> None:
        self._socket.close()
        super().close()


class _File(logging.handlers.WatchedFileHandler):
    """Into a file of ours, 0600. One that was moved away is made anew with the next line, as logrotate wants it."""

    def __init__(self, path: Path, formatter: logging.Formatter) -> None:
        self._otherwise = _on_stderr(formatter)
        super().__init__(path)
        self.setFormatter(formatter)

    def _open(self) -> TextIO:  # type: ignore[override]
        return open(self.baseFilename, "a", encoding="utf-8", errors="backslashreplace", opener=_private)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # it cannot be made anew: its folder is gone, or closed
            self._otherwise.emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """The disk is full: rather there than nowhere."""
        self._otherwise.emit(record)


def _private(path: str, flags: int) -> int:
    """A pipe that nobody reads is an error, and is not waited for."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o600)


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler


class _Stderr(_StreamHandler):
    """To stderr."""


def _on_stderr(formatter: logging.Formatter) -> _Stderr:
    handler = _Stderr(sys.stderr)
    handler.setFormatter(formatter)
    return handler


def check(settings: Settings) -> None:
    """Refuse a place for the log that it cannot be written to. Raises ConfigError."""
    chosen = settings.log
    if chosen.file is not None:
        if chosen.format == "journald":
            raise ConfigError("log.file goes with text or json, not with journald", "leave one of them out")
        if chosen.file in _others(settings):
            raise ConfigError(f"log.file is {chosen.file}, which is another file of mcpctl's", "give it one of its own")
    _handler(chosen).close()
    if chosen.file is not None:
        mode = chosen.file.stat().st_mode
        if stat.S_ISREG(mode) and mode & _OTHERS:
            hint = f"look at what is in it; then chmod 0640 {chosen.file}"
            raise ConfigError(f"{chosen.file} has mode {stat.S_IMODE(mode):04o}, which lets others in", hint)


def _others(settings: Settings) -> Iterator[Path | None]:
    """Files that a line of the log would break."""
    auth, audit, tls = settings.auth, settings.audit, settings.server.tls
    yield from (audit.file, audit.key_file, audit.anchor_file, settings.keyring.file, settings.source)
    yield from (auth.token_file, auth.user_file, auth.tenant_file, settings.server.state_file, tls.key, tls.cert)
    for one in settings.databases.values():
        yield from (one.password_file, one.service_password_file)


def _handler(chosen: Log) -> logging.Handler:
    formatter = _Json() if chosen.format == "json" else _Text()
    if chosen.file is not None:
        try:
            return _File(chosen.file, formatter)
        except OSError as problem:
            raise ConfigError(
                f"log.file: {chosen.file} cannot be written: {problem.strerror}",
                "name a file in a folder of the server's",
            ) from None
    if chosen.format == "journald" or (chosen.format == "auto" and journal.is_stderr()):
        try:
            return _Journal(journal.Journal())
        except OSError as problem:
            if chosen.format == "journald":
                raise ConfigError(
                    f"log.format: journald, and no journal listens at {journal.SOCKET}: {problem.strerror}", "say text"
                ) from None
    return _on_stderr(formatter)


def set_up(chosen: Log) -> None:
    """Send all messages of this process where the config says. uvicorn's and the SDK's only from warnings on. Raises
    ConfigError where it cannot be."""
    root = logging.getLogger()
    handler = _handler(chosen)
    before, root.handlers[:] = list(root.handlers), [handler]
    for one in before:
        if isinstance(one, _Journal | _File):
            one.close()
    root.setLevel(logging.WARNING)
    _levels(chosen)
    # A stranger's bad requests are told to him and counted, not listed; an answer that ends short is one that was cut.
    for name in ("psycopg", "mcp", "uvicorn", "opentelemetry.trace"):  # the last: of callers' broken trace headers
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("uvicorn.error").addFilter(_is_no_short_answer)


def change(chosen: Log) -> None:
    """The same for a process that runs, where its messages are ours to lead."""
    if any(isinstance(one, _Stderr | _Journal | _File) for one in logging.getLogger().handlers):
        try:
            set_up(chosen)
        except ConfigError as problem:  # the file was there when the config was read; what was is in force
            logging.getLogger("mcpctl").error("the log stays where it is: %s", problem.message)
    _levels(chosen)


def _levels(chosen: Log) -> None:
    logging.getLogger("mcpctl").setLevel(chosen.level.upper())
    logging.getLogger("mcpctl.sql").setLevel(logging.DEBUG if chosen.sql_debug else logging.ERROR)


def _is_no_short_answer(record: logging.LogRecord) -> bool:
    return "without completing" not in record.getMessage()
