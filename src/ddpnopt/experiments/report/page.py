"""Render self-contained HTML pages: no scripts, nothing fetched; and numbers fit for strict JSON."""

import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, context: Mapping[str, Any]) -> bytes:
    """Fill a template of this package; text is escaped, a name the context lacks is an error."""
    loader = PackageLoader("ddpnopt.experiments.report", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(context).encode()


def strict(value: Any) -> Any:
    """Replace every NaN and infinity inside lists and mappings by None, which JSON can hold."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
