"""What the desktop bundle starts: the bridge to the server that the user has named. Arguments: its URL, a CA file.

A host puts nothing, or leaves `${user_config.…}` standing, where the user has said nothing.
"""

import os
import sys


def said(text: str) -> bool:
    """Whether the user has given a value."""
    return bool(text.strip()) and not text.startswith("${")


def arguments(url: str, ca_file: str = "") -> list[str]:
    """The command line of mcpctl; nothing that the user typed is taken for an option."""
    return ["connect", *([f"--ca-file={ca_file}"] if said(ca_file) else []), "--", url.strip()]


if __name__ == "__main__":
    if not said(os.environ.get("MCPCTL_TOKEN", "")):
        os.environ.pop("MCPCTL_TOKEN", None)  # then it is what was kept, or a sign-in
    from mcpctl.cli.main import run

    run(arguments(*sys.argv[1:3]))
