"""The log of who did what: chained lines, and what can be read from them."""
