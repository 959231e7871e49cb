"""What small layers' sums are copied and added as is no matter of what is told."""

import pytest
import torch
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.online import window_sums

from ..reference import assert_all_close


class Many(nn.Module):
    """Twenty small layers, and a large one between them."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(3 + i % 2, 3 + (i + 1) % 2, bias=i % 3 > 0) for i in range(20)]
        self.layers = nn.ModuleList([*layers[:7], nn.Linear(4, 2**13), nn.Linear(2**13, 4), *layers[7:]]).double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).sigmoid()
        return x


def looks(decay: float | None, resumed: bool) -> list[dict[str, Tensor]]:
    """What three windows and their total tell, read when all of it has been taken out."""
    torch.manual_seed(0)
    model = Many()
    probe = CurvatureProbe(model, reduction="mean", decay=decay)
    windows = []
    for n in (4, 2, 3):
        for size in (n, 5):
            model(torch.randn(size, 3, dtype=torch.double)).square().sum(1).mean().backward()
        windows.append(probe.window())
        if resumed:
            state = probe.state_dict()
            probe.detach()
            probe = CurvatureProbe(model, reduction="mean", decay=decay)
            probe.load_state_dict(state)
    model(torch.randn(6, 3, dtype=torch.double)).square().sum(1).mean().backward()
    probe.detach()
    found = [dict(window.fisher_diagonal()) for window in (*windows, windows[0])] + [dict(probe.fisher_diagonal())]
    traces = {name: torch.tensor(trace.value) for name, trace in windows[1].fisher_trace().items()}
    return [*found, traces, {name: torch.tensor(probe.num_samples) for name in traces}]


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_vector_of_small_layers_tells_what_each_layer_tells(
    decay: float | None, resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = looks(decay, resumed)
    monkeypatch.setattr(window_sums, "MANY", 10**6)
    for one, other in zip(found, looks(decay, resumed), strict=True):
        assert_all_close(one, other)


def test_small_layers_are_taken_out_together() -> None:
    """Of a thousand layers a look makes, adds and copies a few tensors, not of each layer its own."""
    model = Many()
    probe = CurvatureProbe(model, reduction="mean")
    sums = {name: own.sums for name, own in probe._fisher.sums.items()}
    model(torch.randn(4, 3, dtype=torch.double)).square().sum(1).mean().backward()
    probe.window()
    kept = [name for name, own in probe._fisher.sums.items() if own.sums[0] is sums[name][0]]
    assert len(kept) == 20  # all but the two large ones
    assert probe._fisher.earlier is not None
    assert probe._fisher.earlier.small is not None
    probe.detach()
