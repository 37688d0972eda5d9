"""Runs as rows of one database: planned, claimed by workers, finished once."""
