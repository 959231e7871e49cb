"""Where samples are."""

from typing import Any

import torch
from torch import Tensor, nn

from ..helpers import Net
from .case import COUPLED, STRICT, N, case, classes


@case(options={"sample_dim": 1})
def time_major_model() -> Any:
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x))).sum(0), a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(5, N, 3), classes()


@case(options={"sample_dim": 1})
def time_major_lstm() -> Any:
    model = Net(lambda m, x: m.head(m.core(x)[0][-1]), core=nn.LSTM(3, 2), head=nn.Linear(2, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(5, N, 3), classes()


@case(options={"sample_dim": 1})
def time_major_outputs() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, nn.MSELoss(), torch.randn(5, N, 3), torch.randn(5, N, 2)


@case("transposed_inside_as_many_steps_as_samples", N)
@case("transposed_inside_other_steps", 3)
def transposed_inside(steps: int) -> Any:
    model = Net(
        lambda m, x: torch.tanh(m.b(torch.tanh(m.a(x.transpose(0, 1))))).sum(0),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, steps, 3), classes()


@case("attention_over_time_major_4", N)
@case("attention_over_time_major_3", 3)
def attention_over_time_major(steps: int) -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x.transpose(0, 1))
        return m.head(m.mha(x, x, x, need_weights=False)[0].sum(0))

    model = Net(forward, a=nn.Linear(3, 4), mha=nn.MultiheadAttention(4, 2), head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, steps, 3), classes()


@case()
def flattened_tokens() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        tokens = torch.tanh(m.a(x.flatten(0, 1)))
        return m.b(tokens).unflatten(0, (N, -1)).tanh().prod(1) if len(x) == N else m.b(tokens)[None].tanh().prod(1)

    model = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 3), classes()


@case()
def flattened_tokens_time_major() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        steps = x.shape[1]
        tokens = torch.tanh(m.a(x.transpose(0, 1).flatten(0, 1)))
        return m.b(tokens).unflatten(0, (steps, -1)).tanh().prod(0)

    model = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 3), classes()


@case()
def flattened_patches_convolution() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        patches = x.flatten(0, 1)[:, None]
        return m.head(torch.tanh(m.conv(patches)).flatten(1).unflatten(0, (len(x), -1)).tanh().prod(1))

    model = Net(forward, conv=nn.Conv2d(1, 2, 2), head=nn.Linear(8, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 2, 3, 3), classes()


@case()
def row_shared_by_all() -> Any:
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


@case("class_token_3_steps", N - 1)
@case("class_token_2_steps", 2)
def class_token(steps: int) -> Any:
    return ClassToken(steps), nn.CrossEntropyLoss(), torch.randn(N, steps, 3), classes()


@case()
def position_embedding_table() -> Any:
    model = Net(
        lambda m, x: m.head(torch.tanh(m.a(x) + m.positions(torch.arange(x.shape[1]))).prod(1)),
        a=nn.Linear(3, 4),
        positions=nn.Embedding(N, 4),
        head=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, N, 3), classes()


@case(refused=COUPLED, options=STRICT)
def all_alike() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(1, 3).repeat(N, 1), classes()


@case()
def windows_of_an_image() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        windows = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        return m.b(torch.tanh(m.a(windows)).mean(1)).view(n, -1, 3).tanh().prod(1)

    model = Net(forward, a=nn.Linear(2, 3), b=nn.Linear(3, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 2, 4, 4), classes()


@case()
def experts_of_tokens() -> Any:
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
