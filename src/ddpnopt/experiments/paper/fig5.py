"""Figure 5: to which changes of the image the feedback policy of a trained convolutional network reacts."""

from collections.abc import Iterator, Mapping
from typing import Any

from ddpnopt.experiments.data import source
from ddpnopt.experiments.paper import availability
from ddpnopt.experiments.paper.kinds import task
from ddpnopt.experiments.report.policy_figures import image_rows, share_lines
from ddpnopt.experiments.report.section import Picture, Section, Table
from ddpnopt.experiments.report.tables import number
from ddpnopt.experiments.stats import Interval, mean_interval, paired_difference
from ddpnopt.experiments.study.lab import Lab
from ddpnopt.experiments.study.task import Result

LAYERS: Mapping[str, str] = {"2": "convolution 2", "4": "convolution 3", "6": "convolution 4"}
"""Name of each layer looked at, by its place in the network; the first is left out, for its input never changes."""

PREFERRED = ("mnist", "fashion-mnist", "digits-images")  # the last is bundled, hence always at hand


def run(lab: Lab, quick: bool) -> Section:
    """Train on the first set of pictures at hand, a quick run on the bundled one, look, and report."""
    dataset = PREFERRED[-1] if quick else next(name for name in PREFERRED if availability.missing(name) is None)
    chosen = settings(dataset, quick)
    (result,) = lab.execute([task("policy", chosen)])
    return section(chosen, result)


def settings(dataset: str, quick: bool) -> dict[str, Any]:
    """Settings of the task.

    The curvature is RMSprop's, because the direction does not depend on it and this one trains the network soonest
    within few steps; samples' values are those of their shares of the mean loss.
    """
    return {
        "dataset": dataset,
        "method": "share-rmsprop",
        "params": {"lr": 0.001},
        "batch_size": 128,
        "seed": 0,
        "moments": [0, 5, 30] if quick else [0, 10, 50, 200],
        "layers": [int(place) for place in LAYERS],
        "shown": 4,
        "measured": 100 if quick else 300,
    }


def section(settings: Mapping[str, Any], result: Result) -> Section:
    """Report on the task's result."""
    moments, title = result["moments"], source(settings["dataset"]).title
    area = mean_interval(result["area"])
    last = moments[-1]
    gap = paired_difference(last["foreground"], result["area"]).scaled(100)
    return Section(
        "fig5",
        "Figure 5: what the feedback policy looks at",
        text=[
            "The paper's Figure 5 takes the feedback gain K of layers of a trained convolutional network, its leading "
            "right-singular vector, which is the change of the layer's input that the policy reacts to most, and "
            "maps it back to an image. How it maps back is not known to us.",
            "No decomposition is needed: with the paper's outer products a sample's gain is K = -M^-1 q_u q_x', of "
            "rank one, so its leading right-singular vector is q_x / |q_x|, the normalised gradient of the sample's "
            "loss by the layer's input, whatever the curvature M. A test compares it with the singular vectors of "
            "gains that the dense reference forms.",
            "Mapped back by the transposed Jacobian of the layers before, v becomes the change of the image that the "
            "layer's policy reacts to most. By the chain rule this is the normalised gradient of the loss by the image "
            "for every layer: the policies of all layers look at one and the same picture, and what differs between "
            "them is where on the layer's own grid the direction lies, which is shown beside it.",
            "In the exact batch form, with one outer product a sample, the joint gain K = -R^-1 G C P' acts on the "
            "states through P, whose columns are the samples' own q_x. Each sample's part of any of its right-singular "
            "vectors with a gain is then a multiple of the same q_x: the pictures hold for it too, only the samples' "
            "weights differ.",
            f"Measured on {len(result['area'])} test images of {title}: after {last['step']} steps (accuracy on these "
            f"images {100 * last['accuracy']:.1f} %), {_percent(mean_interval(last['foreground']))} of the energy of "
            f"the policy's image lies on the foreground, {number(gap, 1, sign=True)} points against the foreground's "
            "share of the pixels. The table compares it with random directions mapped back from each layer.",
            "The paper makes no claim here that could be judged, so there is no verdict.",
        ],
        facts=list(_facts(settings, title)),
        tables=[_table(result)],
        pictures=list(_pictures(result, area, title)),
    )


def _percent(interval: Interval) -> str:
    return f"{number(interval.scaled(100), 1)} %"


def _table(result: Result) -> Table:
    header = ["step", "accuracy, %", "policy's image", "all pixels alike"]
    for name in LAYERS.values():
        header += [f"random, {name}", "policy less random"]
    rows = []
    for moment in result["moments"]:
        own = moment["foreground"]
        row = [str(moment["step"]), f"{100 * moment['accuracy']:.1f}", number(mean_interval(own).scaled(100), 1)]
        row.append(number(mean_interval(result["area"]).scaled(100), 1))
        for place in LAYERS:
            other = moment["layers"][place]["random"]
            row.append(number(mean_interval(other).scaled(100), 1))
            row.append(number(paired_difference(own, other).scaled(100), 1, sign=True))
        rows.append(row)
    return Table(
        "Energy on the foreground, in percent",
        header,
        rows,
        note="Energy: sum of squares. Foreground: pixels brighter than the darkest of their image. Mean over images ± "
        "95 % t interval, differences (in points) paired by image. The policy's image is the same for every layer. "
        "Random: a normal random direction at the layer's input, mapped back in the same way.",
    )


def _pictures(result: Result, area: Interval, title: str) -> Iterator[Picture]:
    moments, images = result["moments"], result["images"]
    yield Picture(
        "policy",
        f"Test images of {title} and the change of the image that the policy reacts to most, over training",
        image_rows(images, {f"step {one['step']}": one["policy"] for one in moments}, signed=True),
        note="Orange and purple are the two signs (a singular vector's overall sign means nothing; here purple is "
        "where more brightness raises the loss), white is zero; each picture has its own scale. The same for "
        "every layer.",
    )
    yield Picture(
        "layers",
        f"Where on each layer's grid the leading direction lies, after {moments[-1]['step']} steps",
        image_rows(images, {name: moments[-1]["layers"][place]["energy"] for place, name in LAYERS.items()}, False),
        note="Energy of the leading right-singular vector at each position of the layer's input, summed over channels; "
        "dark is much, each picture with its own scale. The comb at convolutions 2 and 4 is their stride of 2.",
    )
    lines = {"policy": [mean_interval(one["foreground"]) for one in moments]} | {
        f"random, {name}": [mean_interval(one["layers"][place]["random"]) for one in moments]
        for place, name in LAYERS.items()
    }
    yield Picture(
        "foreground",
        "Share of the energy that lies on the foreground, over training",
        share_lines([one["step"] for one in moments], lines, area.mean),
        note="Mean over images, with 95 % t intervals.",
    )


def _facts(settings: Mapping[str, Any], title: str) -> Iterator[tuple[str, str]]:
    yield "data", title
    yield "network", "the paper's: four convolutions (3x3, 32 channels) and two dense layers, ReLU"
    yield (
        "training",
        f"published form around RMSprop, learning rate {settings['params']['lr']:g}, batches of "
        f"{settings['batch_size']}, seed {settings['seed']}",
    )
    yield "images", f"{settings['measured']} of the test part, classes in turn; the first {settings['shown']} are shown"
