"""What they may do."""
