"""Ingest: the user's sources to one memory-mapped catalogue."""
