"""The MCP tools, one file per family: arguments and a connection in, a result out."""
