"""Whether a dataset's files are at hand; an experiment leaves out what is not, and says so."""

from functools import lru_cache

from ddpnopt.experiments import data


@lru_cache
def missing(dataset: str) -> str | None:
    """Return why a dataset cannot be loaded, or None where it can."""
    try:
        data.load(dataset)
    except ValueError as error:
        return str(error)
    return None
