"""Models, layers and graphs that users have: each is measured exactly or refused by a named error."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from secorder import AttributionError, CouplingError, DoubleBackwardError, InvalidTypeError

N = 4


@dataclass
class Case:
    """One model with its data.

    Attributes:
        name: what it shows.
        make: builds ``(model, loss_fn, inputs, targets)``.
        refused: measurement → the error it must raise (``"hessian"``, ``"fisher"``, ``"passive"``).
        skip: measurement → why there is nothing to compare with.
        options: arguments of the probe.
        by_slices: per-sample losses are those of slices of the batch's output (random models: same draws).
        count: number of samples.
        ill_conditioned: in float32, brute force itself is off by more than 1e-4.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Any, Any, Any]]
    refused: dict[str, type[Exception]] = field(default_factory=dict)
    skip: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    by_slices: bool = False
    count: int = N
    ill_conditioned: bool = False

    def __str__(self) -> str:
        return self.name


CASES: list[Case] = []


def case(name: str, **options: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Enter the decorated builder under a name."""

    def enter(make: Callable[[], Any]) -> Callable[[], Any]:
        CASES.append(Case(name, make, **options))
        return make

    return enter


def classes(outputs: int = 3, *extra: int) -> Tensor:
    return torch.randint(outputs, (N, *extra))


class Fn(nn.Module):
    """A function as a module, for ``nn.Sequential``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class Net(nn.Module):
    """Named parts and a function of them."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


# ---- one layer of each type, between others


def layer_case(name: str, layer: Callable[[], nn.Module], shape: tuple[int, ...], **options: Any) -> None:
    def make() -> Any:
        module = layer()
        inputs = torch.randn(N, *shape)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn_like(p) * 0.5)
            width = module(inputs)[0].numel()
        model = nn.Sequential(module, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3))
        return model, nn.CrossEntropyLoss(), inputs, classes()

    CASES.append(Case(f"layer/{name}", make, **options))


def settled(norm: nn.Module) -> nn.Module:
    """Running statistics that are not the initial ones, eval mode."""
    for buffer in norm.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return norm.eval()


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


def embedding_case(name: str, layer: Callable[[], nn.Module], shape: tuple[int, ...], **options: Any) -> None:
    def make() -> Any:
        model = nn.Sequential(layer(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
        inputs = torch.randint(6, (N, *shape))
        model(inputs)
        return model, nn.CrossEntropyLoss(), inputs, classes()

    CASES.append(Case(f"layer/{name}", make, **options))


REFUSED = {"hessian": AttributionError, "fisher": AttributionError, "passive": AttributionError}
embedding_case("embedding", lambda: nn.Embedding(6, 3), (2,))
embedding_case("embedding_padding", lambda: nn.Embedding(6, 3, padding_idx=2), (3,))
embedding_case("embedding_repeated", lambda: nn.Embedding(6, 2), (9,))
embedding_case("embedding_one_index", lambda: nn.Embedding(6, 3), ())
embedding_case("embedding_sparse", lambda: nn.Embedding(6, 3, sparse=True), (2,), refused=REFUSED)
embedding_case("embedding_max_norm", lambda: nn.Embedding(6, 3, max_norm=1.0), (2,), refused=REFUSED)


@case("layer/bilinear")
def _() -> Any:
    model = Net(lambda m, x, y: m.head(torch.tanh(m.mix(x, y))), mix=nn.Bilinear(3, 2, 4), head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(N, 3), torch.randn(N, 2)), classes()


@case("layer/bilinear_sequence_no_bias")
def _() -> Any:
    model = Net(lambda m, x, y: torch.tanh(m.mix(x, y)).sum(1), mix=nn.Bilinear(3, 2, 3, bias=False))
    return model, nn.CrossEntropyLoss(), (torch.randn(N, 2, 3), torch.randn(N, 2, 2)), classes()


# ---- modules without a rule


class Raw(nn.Module):
    """Parameters used directly, not linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(4) * 0.3), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.exp(self.scale) + torch.sin(self.shift)


class Lora(nn.Module):
    """A frozen linear layer with a low-rank update."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Overridden(nn.Linear):
    """A subclass that computes something else than its base."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.tanh(self.weight), self.bias)


class Custom(nn.Linear):
    """A subclass that only adds an attribute."""

    note = "same forward"


def wrapped(name: str, layer: Callable[[], nn.Module], **options: Any) -> None:
    def make() -> Any:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), layer(), nn.Tanh(), nn.Linear(4, 3))
        return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()

    CASES.append(Case(f"generic/{name}", make, **options))


def pruned() -> nn.Module:
    return prune.random_unstructured(nn.Linear(4, 4), "weight", amount=0.5)


wrapped("raw_parameters", Raw)
wrapped("lora", Lora)
wrapped("overridden_forward", lambda: Overridden(4, 4))
wrapped("subclass", lambda: Custom(4, 4))
wrapped("weight_norm", lambda: parametrizations.weight_norm(nn.Linear(4, 4)))
wrapped("spectral_norm_eval", lambda: parametrizations.spectral_norm(nn.Linear(4, 4)).eval())
wrapped("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(4, 4)))
wrapped("pruned", pruned)
wrapped("block", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)))
wrapped(
    "block_as_one",
    lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)),
    options={"layers": ["2", "4"]},
)


def recurrent(name: str, layer: Callable[[], nn.Module], width: int) -> None:
    def make() -> Any:
        model = Net(lambda m, x: m.head(m.core(x)[0][:, -1]), core=layer(), head=nn.Linear(width, 3))
        return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 2), classes()

    CASES.append(Case(f"generic/{name}", make))


recurrent("rnn", lambda: nn.RNN(2, 3, batch_first=True), 3)
recurrent("lstm", lambda: nn.LSTM(2, 2, batch_first=True), 2)
recurrent("gru_two_layers", lambda: nn.GRU(2, 2, num_layers=2, batch_first=True), 2)
recurrent("lstm_bidirectional", lambda: nn.LSTM(2, 2, bidirectional=True, batch_first=True), 4)
recurrent("lstm_projection", lambda: nn.LSTM(2, 3, proj_size=2, batch_first=True), 2)


@case("generic/lstm_final_state")
def _() -> Any:
    model = Net(lambda m, x: m.head(m.core(x)[1][0][-1]), core=nn.LSTM(2, 2, batch_first=True), head=nn.Linear(2, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 2), classes()


@case("generic/gru_cell_loop")
def _() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            hidden = m.cell(x[:, t], hidden)
        return m.head(hidden)

    model = Net(forward, cell=nn.GRUCell(2, 3), head=nn.Linear(3, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 2), classes()


@case("generic/attention")
def _() -> Any:
    model = Net(
        lambda m, x: m.head(m.mha(x, x, x, need_weights=False)[0].mean(1)),
        mha=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 4), classes()


@case("generic/attention_default_layers", options={"layer_types": None})
def _() -> Any:
    model = Net(
        lambda m, x: m.head(m.mha(x, x, x)[0].mean(1)),
        mha=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 4), classes()


@case("generic/attention_scaled_dot_product")
def _() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        return m.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)).mean(1)

    model = Net(forward, qkv=nn.Linear(3, 9), out=nn.Linear(3, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 3), classes()


def encoder(train: bool, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0, batch_first=True, **options)
    return Net(lambda m, x: m.head(m.block(x).mean(1)), block=layer, head=nn.Linear(4, 3)).train(train)


for _train in (True, False):

    @case(f"generic/transformer_{'train' if _train else 'eval'}")
    def _(train: bool = _train) -> Any:
        return encoder(train), nn.CrossEntropyLoss(), torch.randn(N, 3, 4), classes()


@case("generic/transformer_gelu_norm_first_default_layers", options={"layer_types": None})
def _() -> Any:
    model = encoder(True, activation="gelu", norm_first=True)
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 4), classes()


@case("generic/old_weight_norm")
def _() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


# ---- shapes of graphs

PASSIVE_REFUSES = {"passive": AttributionError}


@case("graph/module_twice_in_a_row")
def _() -> Any:
    model = Net(lambda m, x: m.head(torch.tanh(m.a(torch.tanh(m.a(x))))), a=nn.Linear(4, 4), head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case("graph/module_three_times_relu")
def _() -> Any:
    model = Net(lambda m, x: m.head(m.a(torch.relu(m.a(torch.relu(m.a(x)))))), a=nn.Linear(4, 4), head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case("graph/siamese")
def _() -> Any:
    model = Net(lambda m, x, y: m.head((m.a(x).tanh() - m.a(y).tanh()).abs()), a=nn.Linear(4, 3), head=nn.Linear(3, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(N, 4), torch.randn(N, 4)), classes()


@case("graph/siamese_convolution")
def _() -> Any:
    model = Net(lambda m, x, y: (torch.tanh(m.a(x)) * m.a(y)).flatten(1) @ torch.ones(8, 3), a=nn.Conv2d(1, 2, 2))
    return model, nn.MSELoss(), (torch.randn(N, 1, 3, 3), torch.randn(N, 1, 3, 3)), torch.randn(N, 3)


def tie(model: Any) -> Any:
    model.b.weight = model.a.weight
    return model


@case("graph/tied_linear")
def _() -> Any:
    model = tie(Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(3, 3), b=nn.Linear(3, 3)))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("graph/tied_embedding_and_head")
def _() -> Any:
    model = tie(Net(lambda m, i: m.b(torch.tanh(m.a(i))).mean(1), a=nn.Embedding(5, 3), b=nn.Linear(3, 5)))
    return model, nn.CrossEntropyLoss(), torch.randint(5, (N, 2)), classes(5)


@case("graph/tied_to_a_layer_not_selected", options={"layers": ["a"]})
def _() -> Any:
    model = tie(Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(3, 3), b=nn.Linear(3, 3)))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("graph/parameter_used_outside")
def _() -> Any:
    model = Net(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight), a=nn.Linear(3, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("graph/parameter_used_only_outside")
def _() -> Any:
    model = Net(lambda m, x: F.linear(torch.tanh(m.b(x)), m.a.weight), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("graph/weight_penalty_in_the_loss", refused=PASSIVE_REFUSES)
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def loss_fn(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t) + 0.1 * model[0].weight.pow(4).sum()

    return model, loss_fn, torch.randn(N, 3), classes()


@case("graph/residual")
def _() -> Any:
    model = Net(lambda m, x: m.head(x + torch.tanh(m.a(x))), a=nn.Linear(4, 4), head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case("graph/inplace_residual")
def _() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.a(x))
        out = m.b(hidden)
        out += hidden
        return m.head(torch.tanh(out))

    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


for _name, _activation in {"relu": nn.ReLU, "leaky": nn.LeakyReLU, "elu": nn.ELU, "silu": nn.SiLU}.items():

    @case(f"graph/inplace_{_name}")
    def _(activation: Any = _activation) -> Any:
        model = nn.Sequential(nn.Linear(3, 4), activation(inplace=True), nn.Linear(4, 4), activation(inplace=True))
        return model, nn.MSELoss(), torch.randn(N, 3), torch.randn(N, 4)


@case("graph/inplace_convolutions")
def _() -> Any:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 2), nn.ReLU(True), nn.Flatten(), nn.Linear(8, 3)
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 1, 4, 4), classes()


@case("graph/gated")
def _() -> Any:
    model = Net(
        lambda m, x: m.head(torch.sigmoid(m.gate(x)) * m.value(x)),
        gate=nn.Linear(4, 4),
        value=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case("graph/product_of_linear_layers")
def _() -> Any:
    model = Net(lambda m, x: m.a(x) * m.b(x), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case("graph/square_of_a_layer")
def _() -> Any:
    model = Net(lambda m, x: m.a(x) ** 2, a=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case("graph/concatenated_branches")
def _() -> Any:
    model = Net(
        lambda m, x: m.head(torch.cat([torch.relu(m.a(x)), torch.tanh(m.b(x)), x], 1)),
        a=nn.Linear(4, 2),
        b=nn.Linear(4, 2),
        head=nn.Linear(8, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case("graph/resnet_block_eval")
def _() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.b2(m.c2(torch.relu(m.b1(m.c1(x)))))
        hidden += x
        return m.head(F.relu(hidden, inplace=True).mean((2, 3)))

    model = Net(
        forward,
        c1=nn.Conv2d(2, 2, 3, padding=1, bias=False),
        b1=nn.BatchNorm2d(2),
        c2=nn.Conv2d(2, 2, 3, padding=1, bias=False),
        b2=nn.BatchNorm2d(2),
        head=nn.Linear(2, 3),
    )
    for norm in (model.b1, model.b2):
        settled(norm)
    return model.eval(), nn.CrossEntropyLoss(), torch.randn(N, 2, 4, 4), classes()


@case("graph/layer_never_called")
def _() -> Any:
    model = Net(lambda m, x: m.a(x).tanh(), a=nn.Linear(4, 3), unused=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case("graph/output_detached")
def _() -> Any:
    model = Net(lambda m, x: m.a(x) + m.b(x).detach(), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case("graph/called_without_gradient")
def _() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = m.b(x)
        return m.a(x).tanh() + teacher

    model = Net(forward, a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case("graph/frozen_layer")
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("graph/frozen_backbone")
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("graph/fully_frozen", skip={"passive": "there is no backward"})
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).requires_grad_(False)
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("graph/dropout", by_slices=True)
def _() -> Any:
    model = nn.Sequential(
        nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 4), nn.Dropout(0.2), nn.Linear(4, 3)
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("graph/dropout_in_lstm", by_slices=True)
def _() -> Any:
    core = nn.LSTM(2, 2, num_layers=2, dropout=0.5, batch_first=True)
    model = Net(lambda m, x: m.head(m.core(x)[0][:, -1]), core=core, head=nn.Linear(2, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 2), classes()


for _reentrant in (True, False):

    @case(
        f"graph/checkpoint_{'reentrant' if _reentrant else 'non_reentrant'}",
        refused={"hessian": DoubleBackwardError} if _reentrant else {},
    )
    def _(reentrant: bool = _reentrant) -> Any:
        model = Net(
            lambda m, x: m.head(checkpoint(m.block, m.first(x), use_reentrant=reentrant)),
            first=nn.Linear(3, 4),
            block=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
            head=nn.Linear(4, 3),
        )
        return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("graph/checkpoint_every_layer_non_reentrant")
def _() -> Any:
    model = Net(
        lambda m, x: checkpoint(m.b, torch.tanh(checkpoint(m.a, x, use_reentrant=False)), use_reentrant=False),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("graph/data_parallel", refused=dict.fromkeys(("hessian", "fisher", "passive"), InvalidTypeError))
def _() -> Any:
    return nn.DataParallel(nn.Linear(3, 3)), nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


# ---- inputs and outputs


@dataclass
class Output:
    """As Hugging Face models return them."""

    logits: Tensor
    hidden: Tensor
    note: str = "text"


Pair = namedtuple("Pair", ["logits", "hidden"])


def two_headed(pack: Callable[[Tensor, Tensor], Any]) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        hidden = torch.tanh(m.a(x))
        return pack(m.b(hidden), hidden)

    return Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 3))


_STRUCTURES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor], Callable[[Any], Tensor]]] = {
    "dict": (lambda f, h: {"logits": f, "hidden": h}, lambda o: o["logits"], lambda o: o["hidden"]),
    "tuple": (lambda f, h: (f, h), lambda o: o[0], lambda o: o[1]),
    "dataclass": (Output, lambda o: o.logits, lambda o: o.hidden),
    "namedtuple": (Pair, lambda o: o.logits, lambda o: o.hidden),
    "nested": (lambda f, h: {"out": [f, {"h": h}]}, lambda o: o["out"][0], lambda o: o["out"][1]["h"]),
}
for _name, (_pack, _logits, _hidden) in _STRUCTURES.items():

    @case(f"data/output_{_name}")
    def _(pack: Any = _pack, logits: Any = _logits) -> Any:
        return two_headed(pack), lambda o, t: F.cross_entropy(logits(o), t), torch.randn(N, 3), classes()

    @case(f"data/output_{_name}_both_used")
    def _(pack: Any = _pack, logits: Any = _logits, hidden: Any = _hidden) -> Any:
        def loss_fn(o: Any, t: Tensor) -> Tensor:
            return F.cross_entropy(logits(o), t) + (hidden(o) ** 4).sum(1).mean()

        return two_headed(pack), loss_fn, torch.randn(N, 3), classes()


@case("data/inputs_tuple")
def _() -> Any:
    model = Net(lambda m, x, y: m.a(x).tanh() * m.b(y), a=nn.Linear(3, 3), b=nn.Linear(2, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(N, 3), torch.randn(N, 2)), classes()


@case("data/inputs_dict")
def _() -> Any:
    model = Net(lambda m, x, scale: m.b(torch.tanh(m.a(x) * scale)), a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), {"x": torch.randn(N, 3), "scale": torch.tensor(0.7)}, classes()


@case("data/loss_inside")
def _() -> Any:
    def forward(m: Any, x: Tensor, labels: Tensor) -> Any:
        logits = m.b(torch.tanh(m.a(x)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, lambda o, _: o["loss"], {"x": torch.randn(N, 3), "labels": classes()}, None


@case("data/loss_alone_inside")
def _() -> Any:
    model = Net(
        lambda m, x, labels: F.cross_entropy(m.b(torch.tanh(m.a(x))), labels), a=nn.Linear(3, 4), b=nn.Linear(4, 3)
    )
    return model, lambda loss, _: loss, {"x": torch.randn(N, 3), "labels": classes()}, None


@case("data/targets_dict")
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    targets = {"labels": classes(), "weight": torch.rand(N)}

    def loss_fn(f: Tensor, t: Any) -> Tensor:
        return (F.cross_entropy(f, t["labels"], reduction="none") * t["weight"]).mean()

    return model, loss_fn, torch.randn(N, 3), targets


@case("data/dense_outputs")
def _() -> Any:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 1, 3, 3), classes(3, 3, 3)


# ---- where samples are


@case("samples/time_major_model", options={"sample_dim": 1})
def _() -> Any:
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x))).sum(0), a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(5, N, 3), classes()


@case("samples/time_major_lstm", options={"sample_dim": 1})
def _() -> Any:
    model = Net(lambda m, x: m.head(m.core(x)[0][-1]), core=nn.LSTM(3, 2), head=nn.Linear(2, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(5, N, 3), classes()


@case("samples/time_major_outputs", options={"sample_dim": 1})
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, nn.MSELoss(), torch.randn(5, N, 3), torch.randn(5, N, 2)


for _steps in (3, N):

    @case(f"samples/transposed_inside_{'as_many_steps_as_samples' if _steps == N else 'other_steps'}")
    def _(steps: int = _steps) -> Any:
        model = Net(
            lambda m, x: torch.tanh(m.b(torch.tanh(m.a(x.transpose(0, 1))))).sum(0),
            a=nn.Linear(3, 4),
            b=nn.Linear(4, 3),
        )
        return model, nn.CrossEntropyLoss(), torch.randn(N, steps, 3), classes()

    @case(f"samples/attention_over_time_major_{_steps}")
    def _(steps: int = _steps) -> Any:
        def forward(m: Any, x: Tensor) -> Tensor:
            x = m.a(x.transpose(0, 1))
            return m.head(m.mha(x, x, x, need_weights=False)[0].sum(0))

        model = Net(forward, a=nn.Linear(3, 4), mha=nn.MultiheadAttention(4, 2), head=nn.Linear(4, 3))
        return model, nn.CrossEntropyLoss(), torch.randn(N, steps, 3), classes()


@case("samples/flattened_tokens")
def _() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        tokens = torch.tanh(m.a(x.flatten(0, 1)))
        return m.b(tokens).unflatten(0, (N, -1)).tanh().prod(1) if len(x) == N else m.b(tokens)[None].tanh().prod(1)

    model = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 3), classes()


@case("samples/flattened_tokens_time_major")
def _() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        steps = x.shape[1]
        tokens = torch.tanh(m.a(x.transpose(0, 1).flatten(0, 1)))
        return m.b(tokens).unflatten(0, (steps, -1)).tanh().prod(0)

    model = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 3), classes()


@case("samples/flattened_patches_convolution")
def _() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        patches = x.flatten(0, 1)[:, None]
        return m.head(torch.tanh(m.conv(patches)).flatten(1).unflatten(0, (len(x), -1)).tanh().prod(1))

    model = Net(forward, conv=nn.Conv2d(1, 2, 2), head=nn.Linear(8, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 2, 3, 3), classes()


@case("samples/row_shared_by_all")
def _() -> Any:
    model = Net(
        lambda m, x: m.b(torch.tanh(m.a(x)) * m.shift(torch.ones(1, 2))),
        a=nn.Linear(3, 4),
        shift=nn.Linear(2, 4),
        b=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


class ClassToken(nn.Module):
    """A learned token in front of the sequence, and learned positions."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(steps + 1, 4))
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.positions
        return self.head(torch.tanh(x).prod(1))


for _steps in (2, N - 1):

    @case(f"samples/class_token_{_steps}_steps")
    def _(steps: int = _steps) -> Any:
        return ClassToken(steps), nn.CrossEntropyLoss(), torch.randn(N, steps, 3), classes()


@case("samples/position_embedding_table")
def _() -> Any:
    model = Net(
        lambda m, x: m.head(torch.tanh(m.a(x) + m.positions(torch.arange(x.shape[1]))).prod(1)),
        a=nn.Linear(3, 4),
        positions=nn.Embedding(N, 4),
        head=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, N, 3), classes()


# ---- samples that are coupled

COUPLED = {"fisher": CouplingError, "passive": CouplingError}
STRICT = {"strict": True}


@case("coupled/batch_norm_train", ill_conditioned=True, refused=COUPLED, options=STRICT)
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("coupled/batch_norm_train_layer_after_it_only", refused=COUPLED, options={**STRICT, "layers": ["3"]})
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("coupled/batch_norm2d_train_relu", ill_conditioned=True, refused=COUPLED, options=STRICT)
def _() -> Any:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 1, 3, 3), classes()


@case("coupled/batch_mean", refused=COUPLED, options=STRICT)
def _() -> Any:
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x) - m.a(x).mean(0))), a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


def mix_two(x: Tensor) -> Tensor:
    """Only the last of the samples sees the first."""
    return torch.cat([x[:-1], x[-1:] + 0.5 * x[:1] ** 2]) if len(x) > 1 else x


@case("coupled/two_of_the_samples", refused=COUPLED, options=STRICT)
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Fn(mix_two), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("coupled/two_of_the_inputs", refused=COUPLED, options=STRICT)
def _() -> Any:
    model = nn.Sequential(Fn(mix_two), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("coupled/two_of_the_samples_lstm", refused=COUPLED, options=STRICT)
def _() -> Any:
    model = Net(
        lambda m, x: m.head(mix_two(m.core(x)[0][:, -1])), core=nn.LSTM(2, 2, batch_first=True), head=nn.Linear(2, 3)
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 2), classes()


NOT_SEEN = {"passive": "hooks on the model do not see the loss"}


@case("coupled/contrastive_loss", refused={"fisher": CouplingError}, skip=NOT_SEEN)
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, lambda f, t: F.cross_entropy(f @ f.T, torch.arange(len(f))), torch.randn(N, 3), classes()


@case("coupled/loss_of_the_mean_output", refused={"fisher": CouplingError}, skip=NOT_SEEN)
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    return model, lambda f, t: (f.mean(0) ** 2).sum(), torch.randn(N, 3), classes()


@case("coupled/loss_inside_of_the_mean_output", refused={"fisher": CouplingError}, skip=NOT_SEEN)
def _() -> Any:
    model = Net(lambda m, x: (m.a(x).mean(0) ** 2).sum(), a=nn.Linear(3, 3))
    return model, lambda loss, _: loss, torch.randn(N, 3), None


# ---- piecewise linear, or nearly so


def smooth_for_one(x: Tensor) -> Tensor:
    return torch.cat([torch.relu(x[:-1]), torch.tanh(x[-1:])]) if len(x) > 1 else torch.tanh(x)


@case("linear/one_sample_of_many_smooth", skip={"fisher": "samples are told apart by place", "passive": "the same"})
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), Fn(smooth_for_one), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("linear/tanh_in_its_nearly_linear_range")
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3) * 1e-4, classes()


@case("linear/tanh_then_relu")
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("linear/relu_loss_not_convex")
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return model, lambda f, t: torch.sin(3 * f).sum(1).mean(), torch.randn(N, 3), classes()


@case("linear/l1_loss")
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return model, nn.L1Loss(), torch.randn(N, 3), torch.randn(N, 2)


@case("linear/maxpool_relu")
def _() -> Any:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 1, 5, 5), classes()


# ---- more of what users write


@case("graph/penalty_by_a_list_of_parameters", refused=PASSIVE_REFUSES)
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    kept = list(model.parameters())

    def loss_fn(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t) + 0.1 * sum(p.pow(4).sum() for p in kept)

    return model, loss_fn, torch.randn(N, 3), classes()


@case("graph/parameters_kept_in_a_list")
def _() -> Any:
    model = Net(lambda m, x: F.linear(torch.tanh(m.a(x)), m.kept[0]), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    model.kept = [model.b.weight]
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("graph/frozen_parameters_kept_in_a_list")
def _() -> Any:
    model = Net(lambda m, x: F.linear(torch.tanh(m.a(x)), m.kept[0]), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    model.b.requires_grad_(False)
    model.kept = [model.b.weight]
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("graph/model_overwrites_its_input")
def _() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        x *= 1.5
        return m.b(torch.tanh(m.a(x)))

    class Copied(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clone())

    model = Copied(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("graph/input_of_a_layer_overwritten", skip={"passive": "autograd itself refuses this backward"})
def _() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = torch.sin(x)
        with torch.no_grad():
            z = m.frozen(hidden)
        hidden.add_(1.0)
        return m.b(torch.tanh(m.a(hidden)) + z)

    model = Net(forward, a=nn.Linear(3, 4), frozen=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


def slope(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        energy = torch.tanh(m.b(torch.tanh(m.a(x)))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


@case("graph/model_returns_its_own_derivative")
def _() -> Any:
    model = Net(slope, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    return model, nn.MSELoss(), torch.randn(N, 3), torch.randn(N, 3)


@case("graph/energy_and_forces")
def _() -> Any:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = m.b(torch.tanh(m.a(x))).squeeze(1)
            return energy, torch.autograd.grad(energy.sum(), x, create_graph=True)[0]

    model = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 1))
    targets = (torch.randn(N), torch.randn(N, 3))
    return model, lambda o, t: F.mse_loss(o[0], t[0]) + F.mse_loss(o[1], t[1]), torch.randn(N, 3), targets


@case("graph/derivative_by_torch_func")
def _() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda row: torch.tanh(m.a(row)).sum()))(x)

    return Net(forward, a=nn.Linear(3, 4)), nn.MSELoss(), torch.randn(N, 3), torch.randn(N, 3)


@case("graph/loss_differentiates_the_model", skip={"passive": "the loss is not a sum over samples seen by hooks"})
def _() -> Any:
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(N, 2, requires_grad=True)

    def loss_fn(f: Tensor, t: Tensor) -> Tensor:
        (d,) = torch.autograd.grad(f.sum(), x, create_graph=True)
        return (d.pow(2).sum() + F.mse_loss(f, t, reduction="sum")) / 1.0

    return model, loss_fn, x, torch.randn(N, 1)


class OnceOnly(torch.autograd.Function):
    """A custom function without a double backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


@case("graph/operator_without_double_backward", refused={"hessian": DoubleBackwardError})
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), Fn(OnceOnly.apply), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("generic/mixture_of_experts")
def _() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        choice = x[:, 0] > 0
        out = x.new_zeros(len(x), 4)
        out[choice] = torch.tanh(m.a(x[choice])).to(out.dtype)
        out[~choice] = torch.tanh(m.b(x[~choice])).to(out.dtype)
        return m.head(out)

    model = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(3, 4), head=nn.Linear(4, 3))
    inputs = torch.randn(N, 3)
    inputs[:, 0] = torch.tensor([1.0, -1.0, 1.0, 1.0])
    return model, nn.CrossEntropyLoss(), inputs, classes()


def attention(name: str, call: Callable[[Any, Tensor], Tensor], **options: Any) -> None:
    def make() -> Any:
        mha = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        model = Net(lambda m, x: m.head(call(m.mha, x).mean(1)), mha=mha, head=nn.Linear(4, 3))
        return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 4), classes()

    CASES.append(Case(f"generic/attention_{name}", make))


attention("weights_needed", lambda m, x: m(x, x, x)[0])
attention("no_bias", lambda m, x: m(x, x, x)[0], bias=False)
attention("bias_kv_zero_attn", lambda m, x: m(x, x, x)[0], add_bias_kv=True, add_zero_attn=True)
attention("key_and_value_of_other_width", lambda m, x: m(x, x[..., :3], x[..., :2])[0], kdim=3, vdim=2)
attention("causal", lambda m, x: m(x, x, x, attn_mask=torch.triu(torch.full((3, 3), -torch.inf), 1))[0])


@case("generic/attention_padding_mask")
def _() -> Any:
    model = Net(
        lambda m, x, mask: m.head(m.mha(x, x, x, key_padding_mask=mask)[0].mean(1)),
        mha=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
    )
    mask = torch.tensor([[False, False, True]] * N)
    return model, nn.CrossEntropyLoss(), (torch.randn(N, 3, 4), mask), classes()


@case("generic/encoder_stack_eval_frozen")
def _() -> Any:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, batch_first=True)
    model = Net(lambda m, x: m.head(m.block(x).mean(1)), block=nn.TransformerEncoder(layer, 2), head=nn.Linear(4, 3))
    model.block.requires_grad_(False)
    return model.eval(), nn.CrossEntropyLoss(), torch.randn(N, 3, 4), classes()


@case("generic/decoder_layer")
def _() -> Any:
    layer = nn.TransformerDecoderLayer(4, 2, dim_feedforward=5, dropout=0.0, batch_first=True)
    model = Net(lambda m, x, y: m.head(m.block(x, y).mean(1)), block=layer, head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(N, 3, 4), torch.randn(N, 2, 4)), classes()


@case("generic/transformer_time_major", options={"sample_dim": 1})
def _() -> Any:
    core = nn.Transformer(4, 2, 1, 1, dim_feedforward=5, dropout=0.0)
    model = Net(lambda m, x, y: m.head(m.core(x, y).mean(0)), core=core, head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(3, N, 4), torch.randn(2, N, 4)), classes()


@case("generic/packed_sequence")
def _() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        lengths = (x[:, :, 0] > -9).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return m.head(m.core(packed)[1][-1])

    model = Net(forward, core=nn.GRU(2, 3, batch_first=True), head=nn.Linear(3, 3))
    inputs = torch.randn(N, 3, 2)
    for n, length in enumerate((1, 3, 2, 2)):
        inputs[n, length:] = -10.0
    return model, nn.CrossEntropyLoss(), inputs, classes()


@case("generic/embedding_bag", refused={"hessian": DoubleBackwardError})
def _() -> Any:
    model = nn.Sequential(nn.EmbeddingBag(6, 3, mode="mean"), nn.Tanh(), nn.Linear(3, 3))
    return model, nn.CrossEntropyLoss(), torch.randint(6, (N, 3)), classes()


@case("generic/nested_selection", options={"layers": ["0", "0.0", "2"]})
def _() -> Any:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 4), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case("generic/parameter_list")
def _() -> Any:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ws = nn.ParameterList([torch.randn(4, 3), torch.randn(3, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.ws[0].T) @ self.ws[1].T

    return nn.Sequential(Listed()), nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


for _name, _options in {"": {}, "_not_selected": {"layers": ["a", "b"]}}.items():

    @case(f"data/conditioning_row_first{_name}", options=_options)
    def _() -> Any:
        model = Net(
            lambda m, c, x: m.b(torch.tanh(m.a(x)) * m.shift(c)),
            a=nn.Linear(3, 4),
            shift=nn.Linear(2, 4),
            b=nn.Linear(4, 3),
        )
        return model, nn.CrossEntropyLoss(), (torch.randn(1, 2), torch.randn(N, 3)), classes()


@case("data/positions_first")
def _() -> Any:
    model = Net(
        lambda m, p, x: m.b(torch.tanh(m.a(x) + p[:, None]).prod(1)),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), (torch.randn(5), torch.randn(N, 5, 3)), classes()


@case("data/flattened_outputs_and_targets", skip={"passive": ""})
def _() -> Any:
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x))).flatten(0, 1), a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 2, 3), torch.randint(3, (2 * N,))


@case("data/ctc_loss", refused={"hessian": DoubleBackwardError})
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.LogSoftmax(-1))

    def loss_fn(f: Tensor, t: Tensor) -> Tensor:
        lengths = torch.full((len(f),), 5), torch.full((len(f),), 2)
        return F.ctc_loss(f.transpose(0, 1), t, *lengths)

    return model, loss_fn, torch.randn(N, 5, 3), torch.randint(1, 4, (N, 2))


@case("data/adaptive_softmax_inside", refused=PASSIVE_REFUSES)
def _() -> Any:
    model = Net(
        lambda m, x, y: m.out(torch.tanh(m.a(x)), y).loss,
        a=nn.Linear(3, 4),
        out=nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4], div_value=2.0),
    )
    return model, lambda loss, _: loss, (torch.randn(N, 3), torch.tensor([0, 3, 5, 1])), None


@case("data/masked_logits_infinite")
def _() -> Any:
    model = Net(
        lambda m, x: m.b(torch.tanh(m.a(x))).masked_fill(torch.tensor([False, True, False]), -torch.inf),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), torch.tensor([0, 2, 2, 0])


@case("samples/all_alike", refused=COUPLED, options=STRICT)
def _() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(1, 3).repeat(N, 1), classes()


@case("samples/windows_of_an_image")
def _() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        windows = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        return m.b(torch.tanh(m.a(windows)).mean(1)).view(n, -1, 3).tanh().prod(1)

    model = Net(forward, a=nn.Linear(2, 3), b=nn.Linear(3, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 2, 4, 4), classes()


@case("samples/experts_of_tokens")
def _() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        choice = tokens[:, 0] > 0
        out = torch.zeros(len(tokens), 4)
        out[choice] = torch.tanh(m.a(tokens[choice])).to(out.dtype)
        return m.head(out.unflatten(0, (len(x), -1)).sum(1))

    model = Net(forward, a=nn.Linear(3, 4), head=nn.Linear(4, 3))
    inputs = torch.randn(N, 3, 3)
    inputs[..., 0] = torch.tensor([[1.0, 1, -1], [-1, -1, -1], [-1, -1, 1], [1, -1, -1]])
    return model, nn.CrossEntropyLoss(), inputs, classes()
