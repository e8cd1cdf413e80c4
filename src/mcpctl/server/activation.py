"""The listening socket that systemd has bound and hands over (sd_listen_fds(3)).

It stays open while the server is restarted: who comes meanwhile waits, and is not refused. It may be on a port below
1024, for which the server has no right.
"""

import os
import socket
import stat
from collections.abc import Mapping

from mcpctl.errors import ConfigError
from mcpctl.server.door import Door

_FIRST = 3
"""The number of the first one (SD_LISTEN_FDS_START)."""
_HINT = "mcpctl.socket takes one ListenStream=ADDRESS:PORT, and Accept=no"


def handed(environ: Mapping[str, str], pid: int) -> Door | None:
    """The socket that was handed to this process; None where none was. ConfigError (exit 3) for one to which nobody can
    connect over TCP, and for several."""
    text = environ.get("LISTEN_FDS")
    if text is None or environ.get("LISTEN_PID") != str(pid):
        return None
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"LISTEN_FDS is no number: {text!a}", "systemd sets it; leave it out elsewhere")
    if int(text) != 1:
        raise ConfigError(f"systemd has handed over {int(text)} sockets, and the server takes one", _HINT)
    return _door(_FIRST)


def _door(fd: int) -> Door:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConfigError(f"what systemd has handed over as descriptor {fd} is no socket", _HINT)
    except OSError:
        raise ConfigError(f"LISTEN_FDS names descriptor {fd}, and nothing is open there", _HINT) from None
    made = Door(fileno=fd)
    listens = made.type == socket.SOCK_STREAM and made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not listens or made.family not in (socket.AF_INET, socket.AF_INET6):
        made.detach()
        raise ConfigError(f"what systemd has handed over as descriptor {fd} is no listening TCP socket", _HINT)
    made.set_inheritable(False)
    return made
