"""What measurements return."""

import pickle

import torch

from secorder import CurvatureProbe

from .helpers import data, make, step
from .reference import assert_all_close


def test_by_parameter_names_and_shapes() -> None:
    model = make()
    probe = CurvatureProbe(model)
    step(model, data())
    found = probe.fisher_diagonal()
    assert {k: v.shape for k, v in found.by_parameter().items()} == {k: v.shape for k, v in model.named_parameters()}
    assert torch.equal(found["0"], torch.cat([v.flatten() for v in list(found.by_parameter().values())[:2]]))
    copied = pickle.loads(pickle.dumps(found))
    assert_all_close(copied.by_parameter(), found.by_parameter(), 0.0)
