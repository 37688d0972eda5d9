"""Experiments and the command line; needs the extra ``experiments`` and imports public names only."""
