"""mcpctl: authenticated, isolated, audited MCP access to PostgreSQL."""

__version__ = "0.1.0"
