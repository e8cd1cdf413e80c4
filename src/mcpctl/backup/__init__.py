"""Copies of an installation, encrypted: made while it runs, proved, and brought back without what was taken away."""
