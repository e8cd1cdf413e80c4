"""`python -m mcpctl` is the same as `mcpctl`."""

from mcpctl.cli.main import run

run()
