"""stdio on one side, a remote MCP server over HTTPS on the other: what `mcpctl connect` is."""
