"""A backward is entered with its first gradient and left with its last; on parameters nothing stays."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from secorder import AttributionError, CurvatureProbe
from secorder.online.audit.freivalds import Audit

from ..helpers import data, mlp, step


def test_hooks_are_on_parameters_only_while_a_backward_runs() -> None:
    model, batch = mlp(), data()
    seen: list[int] = []
    with CurvatureProbe(model) as probe:
        output = model(batch[0])
        model[0].register_full_backward_hook(lambda *_: seen.append(len(probe._fisher.backwards)))
        F.cross_entropy(output, batch[1]).backward()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        assert seen == [1]
        assert not probe._fisher.backwards
        assert not any(p._backward_hooks for p in model.parameters())


def test_a_backward_that_another_thread_begins_is_noticed_while_gradients_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, running = mlp(), []
    see_all = Audit.see_all

    def seeing(audit: Audit, grads: Any) -> None:
        running.append(len(probe._fisher.backwards))
        see_all(audit, grads)

    monkeypatch.setattr(Audit, "see_all", seeing)
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, data())
        assert running == [1]
        assert not probe._fisher.backwards


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_penalty_at_any_one_step_is_seen(at: int) -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        for index in range(5):
            loss = F.cross_entropy(model(batch[0]), batch[1])
            (loss + 1e-3 * model[2].weight.square().sum() if index == at else loss).backward()
        with pytest.raises(AttributionError, match="'2'"):
            probe.fisher_diagonal()
        assert probe.fisher_diagonal(missing="skip").keys() == {"0", "4"}
        probe.reset()
        step(model, batch)
        assert torch.isfinite(probe.fisher_diagonal()["2"]).all()
