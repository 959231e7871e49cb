"""What the definitions of PyTorch's own losses tell: each sample's share in them."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder.oneshot.known_losses import known_loss, loss_of_rows, made_of_samples, share_of_samples

from ..helpers import seeded

N = 5
GENERATOR = seeded()
LABELS, PIXELS = (torch.randint(3, shape, generator=GENERATOR) for shape in ((N,), (N, 2)))
SOME_IGNORED = torch.tensor([0, -100, 2, 1, 0])


def logits(*shape: int) -> Tensor:
    return torch.randn(N, *shape, dtype=torch.float64, generator=GENERATOR)


def probabilities(*shape: int) -> Tensor:
    return torch.rand(N, *shape, dtype=torch.float64, generator=GENERATOR)


TOLD: dict[str, tuple[Any, Tensor, Tensor]] = {
    "cross_entropy": (F.cross_entropy, logits(3), LABELS),
    "of_pixels": (F.cross_entropy, logits(3, 2), PIXELS),
    "of_probabilities": (F.cross_entropy, logits(3), logits(3).softmax(1)),
    "smoothed": (partial(F.cross_entropy, label_smoothing=0.1, reduction="mean"), logits(3), LABELS),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), logits(3), LABELS),
    "ignoring_what_is_not_there": (nn.CrossEntropyLoss(ignore_index=7), logits(3), LABELS),
    "nll": (nn.NLLLoss(), logits(3), LABELS),
    "mse": (F.mse_loss, logits(2, 2), logits(2, 2)),
    "mse_of_numbers": (partial(F.mse_loss, reduction="sum"), logits(), logits()),
    "huber": (nn.HuberLoss(delta=0.3), logits(2), logits(2)),
    "bce": (nn.BCELoss(), probabilities(2), probabilities(2)),
    "kl": (nn.KLDivLoss(reduction="batchmean"), logits(3), probabilities(3)),
    "kl_mean": (nn.KLDivLoss(), logits(3), probabilities(3)),
    "poisson": (nn.PoissonNLLLoss(), logits(2), probabilities(2)),
}

NOT_TOLD: dict[str, tuple[Any, Any, Any]] = {
    "user": (lambda f, t: F.cross_entropy(f, t), logits(3), LABELS),
    "some_ignored": (F.cross_entropy, logits(3), SOME_IGNORED),
    "weights": (nn.CrossEntropyLoss(weight=torch.rand(3)), logits(3), LABELS),
    "weights_of_samples": (nn.BCELoss(weight=torch.rand(N, 1)), probabilities(2), probabilities(2)),
    "broadcast": (F.mse_loss, logits(1), logits()),
    "classes_of_one_sample": (F.cross_entropy, logits(), probabilities()),
    "legacy": (partial(F.mse_loss, size_average=False), logits(2), logits(2)),
    "several": (F.mse_loss, (logits(2), logits(2)), logits(2)),
    "other_size": (F.mse_loss, torch.randn(2 * N, 2), torch.randn(2 * N, 2)),
    "beta_of_samples": (nn.SmoothL1Loss(beta=torch.rand(N, 1)), logits(2), logits(2)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", TOLD)
def test_shares_are_those_of_batches_of_one(name: str) -> None:
    loss_fn, f, t = TOLD[name]
    share = share_of_samples(loss_fn, f, t, N)
    alone = [loss_fn(f[n : n + 1], t[n : n + 1]) for n in range(N)]
    assert share is not None
    assert torch.allclose(share * torch.stack(alone).sum(), loss_fn(f, t), rtol=1e-12)
    assert made_of_samples(loss_fn, f, t)


@pytest.mark.parametrize("name", NOT_TOLD)
def test_other_losses_tell_nothing(name: str) -> None:
    assert share_of_samples(*NOT_TOLD[name], N) is None


def test_what_is_made_of_samples() -> None:
    assert made_of_samples(*NOT_TOLD["some_ignored"])
    assert made_of_samples(nn.CosineEmbeddingLoss(), (logits(2), logits(2)), LABELS)
    assert not any(made_of_samples(*NOT_TOLD[name]) for name in ("user", "weights", "weights_of_samples", "broadcast"))


def test_known_losses_are_pytorchs_own() -> None:
    hooked = nn.MSELoss()
    hooked.register_forward_hook(lambda *_: None)
    assert known_loss(F.mse_loss)
    assert not known_loss(hooked)
    assert not known_loss(partial(F.mse_loss, weight=torch.rand(N, 1)))
    assert loss_of_rows(nn.MSELoss())
    assert not loss_of_rows(nn.CosineEmbeddingLoss())
