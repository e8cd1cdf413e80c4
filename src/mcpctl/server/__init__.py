"""The only package that knows MCP and HTTP."""
