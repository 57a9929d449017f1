"""Runs with a ``sweep`` section: several adapters trained at once on one base."""
