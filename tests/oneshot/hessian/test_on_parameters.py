"""The loss's gradient in the parameters themselves, all uses of them counted."""

import torch
import torch.nn.functional as F

from secorder.layers.selection import select_layers
from secorder.oneshot.hessian.on_parameters import on_parameters
from secorder.oneshot.measurement import Measurement, measure

from ...helpers import Twice, data


def test_gradients_of_each_layer() -> None:
    model, (x, y) = Twice(), data()

    def work(task: Measurement) -> dict[str, list[torch.Tensor]]:
        assert on_parameters(task, []) == []
        found = on_parameters(task, task.layers)
        return {layer.name: [g.detach().clone() for g in own if g is not None] for layer, own in found}

    found = measure(work, model, select_layers(model, None), F.cross_entropy, x, y, by_sample=False)
    F.cross_entropy(model(x), y).backward()
    for name, own in found.items():
        for mine, p in zip(own, model.get_submodule(name).parameters(), strict=True):
            torch.testing.assert_close(mine, p.grad)
