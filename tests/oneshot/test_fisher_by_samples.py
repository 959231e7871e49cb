"""The Fisher on the parameters themselves, with signs, pairs and layers that are used outside of their calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder.oneshot.fisher_by_samples import by_samples
from secorder.oneshot.measurement import Measurement
from secorder.oneshot.roots import Root, Single, from_hessian

from ..helpers import Twice, data, measured


@pytest.mark.parametrize("kind", ["one", "pairs", "signs"])
def test_of_any_columns(kind: str) -> None:
    """By the whole Jacobian, for a layer that is used twice."""
    model, (x, y) = Twice(), data()
    hessian = torch.randn(6, 3, 3)
    u, sign = torch.randn(6, 3), torch.where(torch.rand(6, 1) < 0.5, -1.0, 1.0)
    columns = {
        "one": Single(u),
        "pairs": from_hessian(hessian),
        "signs": Root(lambda xi: xi * u, 1, u, sign=sign),
    }[kind]
    metric = {
        "one": u[:, :, None] * u[:, None],
        "pairs": hessian,
        "signs": sign[..., None] * u[:, :, None] * u[:, None],
    }

    def work(task: Measurement) -> dict[str, list[Tensor]]:
        return {name: values for name, (values, _) in by_samples(task, task.layers, columns).items()}

    found = measured(work, model, (x, y), F.cross_entropy)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)
    for name, values in found.items():
        for value, local in zip(values, ("weight", "bias"), strict=True):
            j = jacobians[f"{name}.{local}"].flatten(2)
            expected = torch.einsum("nci,ncd,ndi->i", j, metric[kind], j)
            torch.testing.assert_close(value, expected / 6)
