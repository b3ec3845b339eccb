"""Passes over captured graphs, one per file."""
