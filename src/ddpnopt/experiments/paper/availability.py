"""Whether a dataset's files are at hand; an experiment leaves out what is not, and says so."""

from functools import lru_cache

from ddpnopt.experiments import data


@lru_cache
def missing(dataset: str) -> str | None:
    """Return why a dataset cannot be loaded, or None where it can."""
    try:
        data.load(dataset)
    except ValueError:  # its words hold this machine's paths, and a report goes elsewhere
        return f"not at hand; 'ddpnopt data verify {dataset}' says what is missing"
    return None
