"""One layer of each type, between others."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from secorder import AttributionError

from ..helpers import Net
from .case import N, case, classes, settled


def before_a_head(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> Any:
    module = layer()
    inputs = torch.randn(N, *shape)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
        width = module(inputs)[0].numel()
    model = nn.Sequential(module, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3))
    return model, nn.CrossEntropyLoss(), inputs, classes()


def layer_case(name: str, layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    case(name, layer, shape)(before_a_head)


layer_case("linear", lambda: nn.Linear(4, 3), (4,))
layer_case("linear_no_bias", lambda: nn.Linear(4, 3, bias=False), (4,))
layer_case("linear_sequence", lambda: nn.Linear(4, 2), (3, 4))
layer_case("conv1d", lambda: nn.Conv1d(2, 3, 3, padding=1, stride=2), (2, 6))
layer_case("conv1d_groups_circular", lambda: nn.Conv1d(4, 4, 3, padding=1, groups=2, padding_mode="circular"), (4, 5))
layer_case("conv2d", lambda: nn.Conv2d(2, 3, 3), (2, 5, 5))
layer_case("conv2d_depthwise", lambda: nn.Conv2d(3, 3, 3, groups=3, padding="same"), (3, 4, 4))
layer_case("conv3d", lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 3))
layer_case("conv3d_dilated", lambda: nn.Conv3d(2, 2, (1, 2, 2), dilation=(1, 1, 2), padding=(0, 1, 0)), (2, 2, 2, 3))
layer_case("conv_transpose1d", lambda: nn.ConvTranspose1d(2, 3, 3), (2, 4))
layer_case(
    "conv_transpose1d_stride", lambda: nn.ConvTranspose1d(2, 2, 3, stride=2, padding=1, output_padding=1), (2, 3)
)
layer_case("conv_transpose1d_dilated", lambda: nn.ConvTranspose1d(2, 2, 2, dilation=3, output_padding=2), (2, 3))
layer_case("conv_transpose2d", lambda: nn.ConvTranspose2d(2, 3, 2), (2, 3, 3))
layer_case("conv_transpose2d_groups", lambda: nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2), (4, 2, 2))
layer_case("conv_transpose2d_no_bias", lambda: nn.ConvTranspose2d(2, 2, (2, 3), padding=(0, 1), bias=False), (2, 2, 3))
layer_case("conv_transpose3d", lambda: nn.ConvTranspose3d(1, 2, 2, stride=(1, 2, 1)), (1, 2, 2, 2))
layer_case("layer_norm", lambda: nn.LayerNorm(5), (5,))
layer_case("layer_norm_sequence", lambda: nn.LayerNorm(4), (3, 4))
layer_case("layer_norm_two_dims", lambda: nn.LayerNorm((3, 4)), (3, 4))
layer_case("layer_norm_no_bias", lambda: nn.LayerNorm(4, bias=False), (3, 4))
layer_case("rms_norm", lambda: nn.RMSNorm(4), (3, 4))
layer_case("rms_norm_eps", lambda: nn.RMSNorm((2, 4), eps=1e-3), (2, 4))
layer_case("group_norm", lambda: nn.GroupNorm(2, 4), (4, 3))
layer_case("group_norm_images", lambda: nn.GroupNorm(1, 4), (4, 2, 2))
layer_case("instance_norm1d", lambda: nn.InstanceNorm1d(3, affine=True), (3, 4))
layer_case("instance_norm2d", lambda: nn.InstanceNorm2d(3, affine=True), (3, 3, 2))
layer_case("instance_norm3d", lambda: nn.InstanceNorm3d(2, affine=True), (2, 2, 2, 2))
layer_case(
    "instance_norm_running", lambda: settled(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)), (3, 3, 2)
)
layer_case("batch_norm1d_eval", lambda: settled(nn.BatchNorm1d(4)), (4,))
layer_case("batch_norm1d_sequence_eval", lambda: settled(nn.BatchNorm1d(3)), (3, 4))
layer_case("batch_norm2d_eval", lambda: settled(nn.BatchNorm2d(3)), (3, 3, 3))
layer_case("batch_norm3d_eval", lambda: settled(nn.BatchNorm3d(2)), (2, 2, 2, 2))
layer_case("prelu", lambda: nn.PReLU(), (5,))
layer_case("prelu_channels", lambda: nn.PReLU(3), (3, 4))
layer_case("prelu_channels_flat", lambda: nn.PReLU(5), (5,))


def embedding_before_a_head(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> Any:
    model = nn.Sequential(layer(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    inputs = torch.randint(6, (N, *shape))
    model(inputs)
    return model, nn.CrossEntropyLoss(), inputs, classes()


def embedding_case(name: str, layer: Callable[[], nn.Module], shape: tuple[int, ...], **options: Any) -> None:
    case(name, layer, shape, **options)(embedding_before_a_head)


REFUSED = {"hessian": AttributionError, "fisher": AttributionError, "online": AttributionError}
embedding_case("embedding", lambda: nn.Embedding(6, 3), (2,))
embedding_case("embedding_padding", lambda: nn.Embedding(6, 3, padding_idx=2), (3,))
embedding_case("embedding_repeated", lambda: nn.Embedding(6, 2), (9,))
embedding_case("embedding_one_index", lambda: nn.Embedding(6, 3), ())
embedding_case("embedding_sparse", lambda: nn.Embedding(6, 3, sparse=True), (2,))
embedding_case("embedding_max_norm", lambda: nn.Embedding(6, 3, max_norm=1.0), (2,), refused=REFUSED)


@case()
def bilinear() -> Any:
    model = Net(lambda m, x, y: m.head(torch.tanh(m.mix(x, y))), mix=nn.Bilinear(3, 2, 4), head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(N, 3), torch.randn(N, 2)), classes()


@case()
def bilinear_sequence_no_bias() -> Any:
    model = Net(lambda m, x, y: torch.tanh(m.mix(x, y)).sum(1), mix=nn.Bilinear(3, 2, 3, bias=False))
    return model, nn.CrossEntropyLoss(), (torch.randn(N, 2, 3), torch.randn(N, 2, 2)), classes()
