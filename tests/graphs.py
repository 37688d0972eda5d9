"""Networks that are no chains, each with its own steps from state to state for the dense reference.

A step is a function of one sample: the layer that moves there, called as the module would be, and the tensors of the
state, to those of the next state. What a state holds is what the network's modules have taken or returned by then.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[..., tuple[Tensor, ...]]
"""``(layer, *state) -> state``; the layer takes and returns one sample."""


@dataclass(frozen=True)
class GraphCase:
    """A model, its batch, and by layer in the order they run the steps between states; the last gives the outputs."""

    model: nn.Module
    x: Tensor
    steps: dict[str, Step]


class Net(nn.Module):
    """Layers by name, and a forward that is handed in."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: nn.Module):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def residual() -> GraphCase:
    """Two blocks with identity skips; the sum is rectified in place."""

    def block(net: Any, x: Tensor) -> Tensor:
        h: Tensor = net.b(torch.tanh(net.a(x)))
        h += x
        return h.relu_()

    def run(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.head(net.two(net.one(torch.tanh(net.stem(x)))))
        return out

    model = Net(
        run,
        stem=nn.Linear(4, 5),
        one=Net(block, a=nn.Linear(5, 5), b=nn.Linear(5, 5)),
        two=Net(block, a=nn.Linear(5, 5), b=nn.Linear(5, 5)),
        head=nn.Linear(5, 3),
    )
    steps: dict[str, Step] = {
        "stem": lambda f, x: (torch.tanh(f(x)),),
        "one.a": lambda f, x: (x, torch.tanh(f(x))),
        "one.b": lambda f, x, h: (torch.relu(f(h) + x),),
        "two.a": lambda f, x: (x, torch.tanh(f(x))),
        "two.b": lambda f, x, h: (torch.relu(f(h) + x),),
        "head": lambda f, x: (f(x),),
    }
    return GraphCase(model, torch.randn(4, 4), steps)


def conv_residual() -> GraphCase:
    """A convolution block whose projection skip runs last, ``out += skip``, normalisation, a shared in-place module."""

    def block(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.b(net.act(net.norm(net.a(x))))
        out += net.skip(x)
        rectified: Tensor = net.act(out)
        return rectified

    def run(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.head(net.block(net.stem(x)).mean((2, 3)))
        return out

    inner = Net(
        block,
        a=nn.Conv2d(2, 4, 3, padding=1, stride=2),
        norm=nn.LayerNorm((4, 2, 2)),
        act=nn.ReLU(inplace=True),
        b=nn.Conv2d(4, 4, 3, padding=1),
        skip=nn.Conv2d(2, 4, 1, stride=2),
    )
    model = Net(run, stem=nn.Conv2d(1, 2, 3), block=inner, head=nn.Linear(4, 3))
    steps: dict[str, Step] = {
        "stem": lambda f, x: (f(x),),
        "block.a": lambda f, x: (x, f(x)),
        "block.norm": lambda f, x, h: (x, F.relu(f(h))),
        "block.b": lambda f, x, h: (x, f(h)),
        "block.skip": lambda f, x, h: (F.relu(h + f(x)).mean((1, 2)),),
        "head": lambda f, h: (f(h),),
    }
    return GraphCase(model, torch.randn(3, 1, 6, 6), steps)


def dense_net() -> GraphCase:
    """Concatenations of what no module has seen: the state goes back to the layers' outputs."""

    def run(net: Any, x: Tensor) -> Tensor:
        features = [torch.tanh(net.a(x))]
        features.append(torch.tanh(net.b(torch.cat(features, 1))))
        features.append(torch.tanh(net.c(torch.cat(features, 1))))
        out: Tensor = net.head(torch.cat(features, 1))
        return out

    def join(*outs: Tensor) -> Tensor:
        return torch.tanh(torch.cat(outs))

    def b(f: Any, seen: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        b = f(seen)
        return join(a, b), a, b

    model = Net(run, a=nn.Linear(3, 3), b=nn.Linear(3, 2), c=nn.Linear(5, 2), head=nn.Linear(7, 3))
    steps: dict[str, Step] = {
        "a": lambda f, x: (join(f(x)), f(x)),
        "b": b,
        "c": lambda f, seen, a, b: (join(a, b, f(seen)),),
        "head": lambda f, x: (f(x),),
    }
    return GraphCase(model, torch.randn(4, 3), steps)


def branches() -> GraphCase:
    """Two branches of unequal length from one state."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.act(net.stem(x))
        left = net.a(h)
        right = net.c(torch.tanh(net.b(h)))
        out: Tensor = net.head(left * right)
        return out

    model = Net(
        run,
        stem=nn.Linear(3, 4),
        act=nn.Tanh(),
        a=nn.Linear(4, 3),
        b=nn.Linear(4, 4),
        c=nn.Linear(4, 3),
        head=nn.Linear(3, 3),
    )
    steps: dict[str, Step] = {
        "stem": lambda f, x: (torch.tanh(f(x)),),
        "a": lambda f, h: (h, f(h)),
        "b": lambda f, h, left: (left, torch.tanh(f(h))),
        "c": lambda f, left, g: (left * f(g),),
        "head": lambda f, x: (f(x),),
    }
    return GraphCase(model, torch.randn(4, 3), steps)


def gate() -> GraphCase:
    """A gate and a skip past it, both of tensors that no module has seen, through a product that saves them."""

    def run(net: Any, x: Tensor) -> Tensor:
        z = act(net.stem(x))  # used before the cuts of b and c, and after
        y: Tensor = net.c(torch.sigmoid(net.b(z * z)) * z)
        out: Tensor = net.head(y + z)
        return out

    def act(h: Tensor) -> Tensor:
        return torch.sigmoid(h) * (h + h.mean(-1, keepdim=True))

    model = Net(run, stem=nn.Linear(3, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4), head=nn.Linear(4, 3))
    steps: dict[str, Step] = {
        "stem": lambda f, x: (f(x), act(f(x)).square()),
        "b": lambda f, h, seen: (h, torch.sigmoid(f(seen)) * act(h)),
        "c": lambda f, h, seen: (act(h) + f(seen),),
        "head": lambda f, x: (f(x),),
    }
    return GraphCase(model, torch.randn(4, 3), steps)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed: Tensor = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
    return mixed


def _transformer(block: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.head(net.block(net.embed(x)).mean(1))
        return out

    layers = {name: nn.Linear(4, 4) for name in "qkvo"}
    norms = {"first": nn.LayerNorm(4), "second": nn.LayerNorm(4)}
    inner = Net(block, **norms, **layers, up=nn.Linear(4, 5), down=nn.Linear(5, 4))
    return Net(run, embed=nn.Linear(3, 4), block=inner, head=nn.Linear(4, 3))


def pre_norm() -> GraphCase:
    """A pre-norm attention block."""

    def block(net: Any, x: Tensor) -> Tensor:
        n = net.first(x)
        x = x + net.o(_attend(net.q(n), net.k(n), net.v(n)))
        out: Tensor = x + net.down(torch.tanh(net.up(net.second(x))))
        return out

    steps: dict[str, Step] = {
        "embed": lambda f, x: (f(x),),
        "block.first": lambda f, x: (x, f(x)),
        "block.q": lambda f, x, n: (x, n, f(n)),
        "block.k": lambda f, x, n, q: (x, n, q, f(n)),
        "block.v": lambda f, x, n, q, k: (x, _attend(q, k, f(n))),
        "block.o": lambda f, x, h: (x + f(h),),
        "block.second": lambda f, x: (x, f(x)),
        "block.up": lambda f, x, n: (x, torch.tanh(f(n))),
        "block.down": lambda f, x, h: ((x + f(h)).mean(0),),
        "head": lambda f, x: (f(x),),
    }
    return GraphCase(_transformer(block), torch.randn(2, 3, 3), steps)


def post_norm() -> GraphCase:
    """A post-norm attention block."""

    def block(net: Any, x: Tensor) -> Tensor:
        x = net.first(x + net.o(_attend(net.q(x), net.k(x), net.v(x))))
        out: Tensor = net.second(x + net.down(torch.tanh(net.up(x))))
        return out

    steps: dict[str, Step] = {
        "embed": lambda f, x: (f(x),),
        "block.q": lambda f, x: (x, f(x)),
        "block.k": lambda f, x, q: (x, q, f(x)),
        "block.v": lambda f, x, q, k: (x, _attend(q, k, f(x))),
        "block.o": lambda f, x, h: (x + f(h),),
        "block.first": lambda f, s: (f(s),),
        "block.up": lambda f, x: (x, torch.tanh(f(x))),
        "block.down": lambda f, x, h: (x + f(h),),
        "block.second": lambda f, s: (f(s).mean(0),),
        "head": lambda f, x: (f(x),),
    }
    return GraphCase(_transformer(block), torch.randn(2, 3, 3), steps)


def free_stream() -> GraphCase:
    """Two pre-norm blocks in one forward, norms without modules: the residual stream is seen by none."""

    def norm(x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt()

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.embed(x)
        h = h + net.a(norm(h))
        h = h + net.c(torch.tanh(net.b(norm(h))))
        out: Tensor = net.head(norm(h))
        return out

    model = Net(
        run,
        embed=nn.Linear(3, 4),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 5),
        c=nn.Linear(5, 4),
        head=nn.Linear(4, 3),
    )
    steps: dict[str, Step] = {
        "embed": lambda f, x: (f(x), norm(f(x))),
        "a": lambda f, h, n: (h, f(n), norm(h + f(n))),
        "b": lambda f, h, a, n: (h + a, torch.tanh(f(n))),
        "c": lambda f, h, g: (norm(h + f(g)),),
        "head": lambda f, x: (f(x),),
    }
    return GraphCase(model, torch.randn(4, 3), steps)


def _affine(u: Tensor, x: Tensor) -> Tensor:
    """A linear layer on one sample, from its flat matrix, bias last."""
    matrix = u.view(-1, x.shape[0] + 1)
    return matrix[:, :-1] @ x + matrix[:, -1]


def shared() -> GraphCase:
    """A layer called three times: once it has moved, its change is part of the state, as long as it runs again."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = torch.tanh(net.cell(torch.tanh(net.stem(x))))
        g = torch.tanh(net.cell(net.mid(h)))
        out: Tensor = net.head(net.cell(torch.tanh(net.other(g))) + h)
        return out

    model = Net(
        run,
        stem=nn.Linear(3, 4),
        cell=nn.Linear(4, 4),
        mid=nn.Linear(4, 4),
        other=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )
    steps: dict[str, Step] = {
        "stem": lambda f, x: (torch.tanh(f(x)),),
        "cell": lambda f, x: (torch.tanh(f(x)), f.args[1]),
        "mid": lambda f, h, u: (torch.tanh(_affine(u, f(h))), h, u),
        "other": lambda f, g, h, u: (_affine(u, torch.tanh(f(g))) + h,),
        "head": lambda f, x: (f(x),),
    }
    return GraphCase(model, torch.randn(4, 3), steps)


def recurrent() -> GraphCase:
    """A recurrent network, unrolled."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4)
        for x_t in x.unbind(1):
            h = torch.tanh(net.enter(x_t) + net.again(h))
        out: Tensor = net.head(h)
        return out

    def again(f: Any, first: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        h = torch.tanh(first + f(torch.zeros(4)))
        for x_t in x[1:]:
            h = torch.tanh(_affine(u, x_t) + f(h))
        return (h,)

    model = Net(run, enter=nn.Linear(3, 4), again=nn.Linear(4, 4), head=nn.Linear(4, 3))
    steps: dict[str, Step] = {
        "enter": lambda f, x: (f(x[0]), f.args[1], x),
        "again": again,
        "head": lambda f, h: (f(h),),
    }
    return GraphCase(model, torch.randn(4, 3, 3), steps)


def tied() -> GraphCase:
    """Two layers with one weight, each with a bias of its own; the weight moves with the first."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = torch.tanh(net.mid(torch.tanh(net.a(torch.tanh(net.stem(x))))))
        out: Tensor = net.head(torch.tanh(net.b(h)) + h)
        return out

    def a(f: Any, x: Tensor) -> tuple[Tensor, ...]:
        return torch.tanh(f(x)), f.args[1][4:]  # of the flat control: the layer's own bias, then what it shares

    def b(f: Any, h: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return (torch.tanh(u.view(4, 4) @ h + f.args[1]) + h,)

    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    model = Net(run, stem=nn.Linear(3, 4), a=one, mid=nn.Linear(4, 4), b=other, head=nn.Linear(4, 3))
    steps: dict[str, Step] = {
        "stem": lambda f, x: (torch.tanh(f(x)),),
        "a": a,
        "mid": lambda f, h, u: (torch.tanh(f(h)), u),
        "b": b,
        "head": lambda f, x: (f(x),),
    }
    return GraphCase(model, torch.randn(4, 3), steps)


def late() -> GraphCase:
    """A tensor that a module takes only after the cut where it first lives."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = torch.sin(net.stem(x))
        y = net.a(h * h)
        out: Tensor = net.head(y + net.b(h))
        return out

    model = Net(run, stem=nn.Linear(3, 4), a=nn.Linear(4, 4), b=nn.Linear(4, 4), head=nn.Linear(4, 3))
    steps: dict[str, Step] = {
        "stem": lambda f, x: (f(x), torch.sin(f(x)).square()),
        "a": lambda f, s, n: (f(n), torch.sin(s)),
        "b": lambda f, y, h: (y + f(h),),
        "head": lambda f, x: (f(x),),
    }
    return GraphCase(model, torch.randn(4, 3), steps)


class Scaled(nn.Module):
    """A residual block with a scale of its own, used after the layers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 4)
        self.gamma = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.gamma * self.b(torch.tanh(self.a(x)))
        return out


def scaled() -> GraphCase:
    """A block with a parameter of its own, which moves before the layers inside and is used after them."""

    def run(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.head(net.block(net.stem(x)))
        return out

    steps: dict[str, Step] = {
        "stem": lambda f, x: (f(x),),
        "block": lambda f, x: (x, f.args[1]),
        "block.a": lambda f, x, u: (x, torch.tanh(f(x)), u),
        "block.b": lambda f, x, h, u: (x + u * f(h),),
        "head": lambda f, x: (f(x),),
    }
    return GraphCase(Net(run, stem=nn.Linear(3, 4), block=Scaled(), head=nn.Linear(4, 3)), torch.randn(4, 3), steps)


class Outputs(NamedTuple):
    """Two outputs; the loss looks at both."""

    logits: Tensor
    features: Tensor


@dataclass
class Record:
    """Two outputs in a dataclass."""

    logits: Tensor
    features: Tensor


def _two_outputs(pack: Callable[..., Any]) -> GraphCase:
    """Features are an output and go on; another output leaves in the middle."""

    def run(net: Any, x: Tensor) -> Any:
        features = net.act(net.stem(x))
        h = net.b(torch.tanh(net.a(features)))
        return pack(logits=net.head(features + h), features=features)

    model = Net(
        run, stem=nn.Linear(3, 4), act=nn.Tanh(), a=nn.Linear(4, 4), b=nn.Linear(4, 4), head=nn.Linear(4, 3)
    )  # fmt: skip
    steps: dict[str, Step] = {
        "stem": lambda f, x: (torch.tanh(f(x)),),
        "a": lambda f, x: (x, torch.tanh(f(x))),
        "b": lambda f, x, h: (x + f(h), x),
        "head": lambda f, s, x: (f(s), x),
    }
    return GraphCase(model, torch.randn(4, 3), steps)


GRAPHS: dict[str, Callable[[], GraphCase]] = {
    "residual": residual,
    "conv residual": conv_residual,
    "dense net": dense_net,
    "branches": branches,
    "gate": gate,
    "pre-norm": pre_norm,
    "post-norm": post_norm,
    "free stream": free_stream,
    "shared": shared,
    "recurrent": recurrent,
    "late": late,
}

OTHERS: dict[str, Callable[[], GraphCase]] = {
    "scaled": scaled,
    "tied": tied,
    "tuple": lambda: _two_outputs(Outputs),
    "dictionary": lambda: _two_outputs(dict),
    "dataclass": lambda: _two_outputs(Record),
}
