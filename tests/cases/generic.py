"""Modules without a rule: raw parameters, parametrizations, recurrent networks, attention."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from secorder import DoubleBackwardError

from ..helpers import Net
from .case import N, case, classes


class Raw(nn.Module):
    """Parameters used directly, not linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(4) * 0.3), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.exp(self.scale) + torch.sin(self.shift)


class Temperature(nn.Module):
    """Parameters without a dimension: a temperature, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.gate = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.2))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.exp(self.temperature) + torch.sigmoid(self.gate) * x.square()


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


def between_linear_layers(layer: Callable[[], nn.Module]) -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), layer(), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


def wrapped(name: str, layer: Callable[[], nn.Module], **options: Any) -> None:
    case(name, layer, **options)(between_linear_layers)


def pruned() -> nn.Module:
    return prune.random_unstructured(nn.Linear(4, 4), "weight", amount=0.5)


wrapped("raw_parameters", Raw)
wrapped("scalar_parameters", Temperature)
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


def last_step_of(layer: Callable[[], nn.Module], width: int) -> Any:
    model = Net(lambda m, x: m.head(m.core(x)[0][:, -1]), core=layer(), head=nn.Linear(width, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 2), classes()


def recurrent(name: str, layer: Callable[[], nn.Module], width: int) -> None:
    case(name, layer, width)(last_step_of)


recurrent("rnn", lambda: nn.RNN(2, 3, batch_first=True), 3)
recurrent("lstm", lambda: nn.LSTM(2, 2, batch_first=True), 2)
recurrent("gru_two_layers", lambda: nn.GRU(2, 2, num_layers=2, batch_first=True), 2)
recurrent("lstm_bidirectional", lambda: nn.LSTM(2, 2, bidirectional=True, batch_first=True), 4)
recurrent("lstm_projection", lambda: nn.LSTM(2, 3, proj_size=2, batch_first=True), 2)


@case()
def lstm_final_state() -> Any:
    model = Net(lambda m, x: m.head(m.core(x)[1][0][-1]), core=nn.LSTM(2, 2, batch_first=True), head=nn.Linear(2, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 2), classes()


@case()
def gru_cell_loop() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            hidden = m.cell(x[:, t], hidden)
        return m.head(hidden)

    model = Net(forward, cell=nn.GRUCell(2, 3), head=nn.Linear(3, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 2), classes()


@case()
def attention() -> Any:
    model = Net(
        lambda m, x: m.head(m.mha(x, x, x, need_weights=False)[0].mean(1)),
        mha=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 4), classes()


@case(options={"layer_types": None})
def attention_default_layers() -> Any:
    model = Net(
        lambda m, x: m.head(m.mha(x, x, x)[0].mean(1)),
        mha=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 4), classes()


@case()
def attention_scaled_dot_product() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        return m.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)).mean(1)

    model = Net(forward, qkv=nn.Linear(3, 9), out=nn.Linear(3, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 3), classes()


def encoder(train: bool, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0, batch_first=True, **options)
    return Net(lambda m, x: m.head(m.block(x).mean(1)), block=layer, head=nn.Linear(4, 3)).train(train)


@case("transformer_eval", False)
@case("transformer_train", True)
def transformer(train: bool) -> Any:
    return encoder(train), nn.CrossEntropyLoss(), torch.randn(N, 3, 4), classes()


@case(options={"layer_types": None})
def transformer_gelu_norm_first_default_layers() -> Any:
    model = encoder(True, activation="gelu", norm_first=True)
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 4), classes()


@case()
def old_weight_norm() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case()
def mixture_of_experts() -> Any:
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


def attention_called(call: Callable[[Any, Tensor], Tensor], settings: dict[str, Any]) -> Any:
    mha = nn.MultiheadAttention(4, 2, batch_first=True, **settings)
    model = Net(lambda m, x: m.head(call(m.mha, x).mean(1)), mha=mha, head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 4), classes()


def attention_case(name: str, call: Callable[[Any, Tensor], Tensor], **settings: Any) -> None:
    case(f"attention_{name}", call, settings)(attention_called)


attention_case("weights_needed", lambda m, x: m(x, x, x)[0])
attention_case("no_bias", lambda m, x: m(x, x, x)[0], bias=False)
attention_case("bias_kv_zero_attn", lambda m, x: m(x, x, x)[0], add_bias_kv=True, add_zero_attn=True)
attention_case("key_and_value_of_other_width", lambda m, x: m(x, x[..., :3], x[..., :2])[0], kdim=3, vdim=2)
attention_case("causal", lambda m, x: m(x, x, x, attn_mask=torch.triu(torch.full((3, 3), -torch.inf), 1))[0])


@case()
def attention_padding_mask() -> Any:
    model = Net(
        lambda m, x, mask: m.head(m.mha(x, x, x, key_padding_mask=mask)[0].mean(1)),
        mha=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
    )
    mask = torch.tensor([[False, False, True]] * N)
    return model, nn.CrossEntropyLoss(), (torch.randn(N, 3, 4), mask), classes()


@case()
def encoder_stack_eval_frozen() -> Any:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, batch_first=True)
    model = Net(lambda m, x: m.head(m.block(x).mean(1)), block=nn.TransformerEncoder(layer, 2), head=nn.Linear(4, 3))
    model.block.requires_grad_(False)
    return model.eval(), nn.CrossEntropyLoss(), torch.randn(N, 3, 4), classes()


@case()
def decoder_layer() -> Any:
    layer = nn.TransformerDecoderLayer(4, 2, dim_feedforward=5, dropout=0.0, batch_first=True)
    model = Net(lambda m, x, y: m.head(m.block(x, y).mean(1)), block=layer, head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(N, 3, 4), torch.randn(N, 2, 4)), classes()


@case(options={"sample_dim": 1})
def transformer_time_major() -> Any:
    core = nn.Transformer(4, 2, 1, 1, dim_feedforward=5, dropout=0.0)
    model = Net(lambda m, x, y: m.head(m.core(x, y).mean(0)), core=core, head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(3, N, 4), torch.randn(2, N, 4)), classes()


@case()
def packed_sequence() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        lengths = (x[:, :, 0] > -9).sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return m.head(m.core(packed)[1][-1])

    model = Net(forward, core=nn.GRU(2, 3, batch_first=True), head=nn.Linear(3, 3))
    inputs = torch.randn(N, 3, 2)
    for n, length in enumerate((1, 3, 2, 2)):
        inputs[n, length:] = -10.0
    return model, nn.CrossEntropyLoss(), inputs, classes()


@case(refused={"hessian": DoubleBackwardError})
def embedding_bag() -> Any:
    model = nn.Sequential(nn.EmbeddingBag(6, 3, mode="mean"), nn.Tanh(), nn.Linear(3, 3))
    return model, nn.CrossEntropyLoss(), torch.randint(6, (N, 3)), classes()


@case(options={"layers": ["0", "0.0", "2"]})
def nested_selection() -> Any:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 4), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case()
def parameter_list() -> Any:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ws = nn.ParameterList([torch.randn(4, 3), torch.randn(3, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.ws[0].T) @ self.ws[1].T

    return nn.Sequential(Listed()), nn.CrossEntropyLoss(), torch.randn(N, 3), classes()
