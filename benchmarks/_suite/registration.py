"""What is registered: tasks, methods with their search spaces, protocol; read from registration.toml."""

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Budget = Literal["quick", "full"]
Options = Mapping[str, Any]
REGISTRATION = Path(__file__).with_name("registration.toml")


@dataclass(frozen=True)
class Size:
    """How large a task is.

    Attributes:
        train, validation, test: samples of each part; the first ones.
        batch: samples of a step.
        steps: of a run.
        width: of the network's inner layers; for "cnn" and "resnet" the channels of the first.
        seeds: of the confirmation: 0, 1, 2, ...
        ablation: likewise, of the ablation.
    """

    train: int
    validation: int
    test: int
    batch: int
    steps: int
    width: tuple[int, ...]
    seeds: int
    ablation: int


@dataclass(frozen=True)
class Task:
    """A task: its data, its network, and how large it is for each budget."""

    name: str
    title: str
    data: str
    network: str
    sizes: Mapping[str, Size]


@dataclass(frozen=True)
class Method:
    """An optimizer with its search space.

    Attributes:
        lr: learning rate where it is not tuned; None: it is tuned.
        scheduled: whether the learning rate decays linearly to 0.
        tasks: names of those it is run on; empty: all.
        fixed: options that no trial changes.
        knobs: values of the searched ones, each list beginning with the default.
    """

    name: str
    title: str
    package: str
    lr: float | None = None
    scheduled: bool = True
    tasks: tuple[str, ...] = ()
    fixed: Options = field(default_factory=dict)
    knobs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def options(self, **changed: Any) -> dict[str, Any]:
        """All options: the fixed ones, each knob's default, then ``changed``."""
        return {**self.fixed, **{name: values[0] for name, values in self.knobs.items()}, **changed}


@dataclass(frozen=True)
class Registration:
    """What is fixed, and how it came about.

    Attributes:
        digest: SHA-256 of the file.
        first: that of the file before the first scored run.
        amendments: what was changed since, each with when.
    """

    digest: str
    first: str
    amendments: tuple[str, ...]
    protocol: Mapping[str, Any]
    claims: Mapping[str, float]
    tasks: Mapping[str, Task]
    methods: Mapping[str, Method]
    ablation: Mapping[str, Options]

    @property
    def reference(self) -> str:
        """Name of the method whose runs set the targets."""
        return str(self.protocol["reference"])

    @property
    def base(self) -> str:
        """The ablation's variant that the others are compared with, its first."""
        return next(iter(self.ablation))

    def methods_of(self, task: str) -> tuple[Method, ...]:
        """Those that are run on a task."""
        return tuple(m for m in self.methods.values() if not m.tasks or task in m.tasks)


def read(path: Path = REGISTRATION) -> Registration:
    """Read a registration; its digest is the SHA-256 of the file."""
    raw = path.read_bytes()
    content = tomllib.loads(raw.decode())
    return Registration(
        hashlib.sha256(raw).hexdigest(),
        content["history"]["first"],
        tuple(content["history"]["amendments"]),
        content["protocol"],
        content["claims"],
        {name: _task(name, entry) for name, entry in content["tasks"].items()},
        {name: _method(name, entry) for name, entry in content["methods"].items()},
        content["ablation"],
    )


def _task(name: str, entry: Mapping[str, Any]) -> Task:
    sizes = {k: Size(**{**v, "width": tuple(v["width"])}) for k, v in entry.items() if isinstance(v, dict)}
    return Task(name, entry["title"], entry["data"], entry["network"], sizes)


def _method(name: str, entry: Mapping[str, Any]) -> Method:
    knobs = {knob: tuple(values) for knob, values in entry.get("knobs", {}).items()}
    if len(knobs) > 2:
        raise ValueError(f"{name} has {len(knobs)} knobs beside the learning rate; the budget allows two")
    return Method(name, **{**entry, "knobs": knobs, "tasks": tuple(entry.get("tasks", ()))})
