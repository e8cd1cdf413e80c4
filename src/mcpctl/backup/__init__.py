"""Copies of an installation, encrypted: made while it runs, checked, and brought back without what was taken away since."""
