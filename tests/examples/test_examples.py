"""Every example runs as a reader would run it, with both optimizers at toy size, and its training loss falls."""

import math
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from examples.scripts import EXAMPLES, run

pytestmark = pytest.mark.xdist_group("integrations")  # their libraries, slow to import, in one worker
ONE_EPOCH = ["--epochs", "1"]
# beside what the example is told: the library it needs, if it is no part of the extra `experiments`
EXAMPLE_OF: dict[str, tuple[list[str], str | None]] = {
    "accelerate_loop.py": (["--accumulate", "2", *ONE_EPOCH], "accelerate"),
    "binary.py": (ONE_EPOCH, None),
    "char_transformer.py": (["--steps", "8", "--every", "8", "--context", "16"], None),
    "ddp.py": (["--epochs", "1"], None),
    "differential_equation.py": (["--epochs", "2"], None),
    "drop_in.py": (["--epochs", "2"], None),
    "fsdp.py": (["--batch", "240", *ONE_EPOCH], None),
    "lightning_automatic.py": (["--accumulate", "2", *ONE_EPOCH], "lightning"),
    "lightning_manual.py": (ONE_EPOCH, "lightning"),
    "mixed_precision.py": (["--dtype", "float16", *ONE_EPOCH], None),
    "multilabel.py": (ONE_EPOCH, None),
    "plain_loop.py": (["--schedule", "warm-restarts", *ONE_EPOCH], None),
    "regression.py": (["--epochs", "3"], None),
    "resnet.py": (["--data", "digits-images", "--samples", "640", *ONE_EPOCH], None),
    "skorch_estimator.py": (["--epochs", "2"], "skorch"),
    "transformers_trainer.py": (ONE_EPOCH, "transformers"),
}
VERSE = "Tyger Tyger, burning bright, in the forests of the night; what immortal hand or eye. "


def losses(printed: str) -> list[float]:
    return [float(found) for found in re.findall(r"train loss (\S+),", printed)]


@pytest.mark.parametrize("optimizer", ["ddpnopt", "adamw"])
@pytest.mark.parametrize("name", EXAMPLE_OF)
def test_the_training_loss_falls(name: str, optimizer: str, tmp_path: Path) -> None:
    words, library = EXAMPLE_OF[name]
    if library is not None and find_spec(library) is None:
        pytest.skip(f"needs {library}: pip install 'ddpnopt[integrations]'")
    (tmp_path / "text.txt").write_text(20 * VERSE)
    text = ["--text", str(tmp_path / "text.txt")] if name == "char_transformer.py" else []
    first, *later = losses(run(name, "--optimizer", optimizer, *words, *text, folder=tmp_path))
    assert later
    assert math.isfinite(later[-1])
    assert later[-1] < first


def test_the_cheapest_form_reaches_a_tiny_error(tmp_path: Path) -> None:
    found = [float(loss) for loss in re.findall(r"loss (\S+),", run("closure.py", folder=tmp_path))]
    assert found[-1] < 2e-3 < found[0]


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.glob("[!_]*.py")} == {*EXAMPLE_OF, "closure.py"}
