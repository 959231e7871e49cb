"""Random small graphs (layers, activations, residuals, gates, reuse) against brute force."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secorder import CurvatureProbe, CurvatureWarning

from .reference import assert_all_close, fisher_by_sample, hessian_by_element

WIDTH, N = 3, 3
LAYERS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "no_bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "prelu": lambda: nn.PReLU(),
    "gru": lambda: nn.GRUCell(WIDTH, WIDTH),
    "block": lambda: nn.Sequential(nn.Linear(WIDTH, 2), nn.Tanh(), nn.Linear(2, WIDTH)),
}
FUNCTIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "sin": torch.sin,
    "softmax": lambda x: torch.softmax(x, -1),
    "relu_": lambda x: (x * 1).relu_(),
    "detach": lambda x: x.detach(),
}

#: One step of a program: what to do, with which layer or function, on which earlier values.
step = st.one_of(
    st.tuples(st.just("layer"), st.sampled_from(sorted(LAYERS)), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.just("again"), st.just(""), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.just("function"), st.sampled_from(sorted(FUNCTIONS)), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.just("add"), st.just(""), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.just("multiply"), st.just(""), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.just("weight"), st.just(""), st.integers(0, 9), st.integers(0, 9)),
)


class Program(nn.Module):
    """A list of steps, each on values that earlier ones left."""

    def __init__(self, steps: list[tuple[str, str, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(LAYERS[name]() for kind, name, _, _ in steps if kind == "layer")
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        values, used = [x], 0
        for kind, name, i, j in self.steps:
            first, second = values[-1 - i % len(values)], values[-1 - j % len(values)]
            if kind == "layer":
                first, used = self.layers[used](first), used + 1
            elif kind == "again" and used:
                first = self.layers[j % used](first)
            elif kind == "function":
                first = FUNCTIONS[name](first)
            elif kind == "add":
                first = first + second
            elif kind == "multiply":
                first = first * torch.tanh(second)
            elif kind == "weight" and used and isinstance(self.layers[j % used], nn.Linear):
                first = F.linear(first, self.layers[j % used].weight)  # a use outside of the layer's calls
            values.append(first)
        return self.head(values[-1])


ANY_GRAPH = given(steps=st.lists(step, min_size=1, max_size=7), classification=st.booleans())


def check_graph(steps: list[tuple[str, str, int, int]], classification: bool) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model, inputs = Program(steps), torch.randn(N, WIDTH)
    loss_fn: Any = F.cross_entropy if classification else F.mse_loss
    targets = torch.randint(2, (N,)) if classification else torch.randn(N, 2)
    hessian = hessian_by_element(model, loss_fn, inputs, targets)
    fisher = fisher_by_sample(model, loss_fn, inputs, targets, N)
    with warnings.catch_warnings(), CurvatureProbe(model, "all") as probe:
        warnings.simplefilter("ignore", CurvatureWarning)
        assert_all_close(probe.hessian_diagonal(loss_fn, inputs, targets, method="exact").by_parameter(), hessian)
        assert_all_close(probe.fisher_diagonal(loss_fn, inputs, targets).by_parameter(), fisher)
        loss_fn(model(inputs), targets).backward()
        assert_all_close(probe.fisher_diagonal().by_parameter(), fisher)


test_any_graph = settings(max_examples=40, deadline=None)(ANY_GRAPH(check_graph))
test_many_graphs = pytest.mark.slow(
    settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])(ANY_GRAPH(check_graph))
)
