"""What `mcpctl doctor` looks at. Each check is a function that yields findings, and changes nothing by looking."""
