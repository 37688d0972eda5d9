"""A unit of work: what is to be computed, under a name that holds all that decides its numbers."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Result = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A sort of task.

    Attributes:
        run: carries one out: settings in, figures out; both hold what strict JSON can (no NaN). Nothing else
            decides the figures but the code.
        modules: names of the modules, beside the library's own, whose source decides the figures.
        alone: whether nothing else should run on the machine meanwhile, because time is measured.
    """

    run: Callable[[Mapping[str, Any]], Result]
    modules: tuple[str, ...]
    alone: bool = False


@dataclass(frozen=True)
class Task:
    """One unit of work.

    Attributes:
        kind: name of its :class:`Kind`.
        settings: what strict JSON can hold.
        code: fingerprint of the source that decides its figures, and torch's version.
    """

    kind: str
    settings: Mapping[str, Any]
    code: str

    @cached_property
    def key(self) -> str:
        """Name (64 hexadecimal digits) under which its result is kept; other settings or code, another name."""
        text = json.dumps([self.kind, dict(self.settings), self.code], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()
