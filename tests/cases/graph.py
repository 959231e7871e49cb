"""Shapes of graphs: reuse, ties, branches, penalties, in-place operations, checkpoints, derivatives."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder import DoubleBackwardError, InvalidTypeError

from ..helpers import Fn, Net
from .case import PASSIVE_REFUSES, N, case, classes, settled


@case()
def module_twice_in_a_row() -> Any:
    model = Net(lambda m, x: m.head(torch.tanh(m.a(torch.tanh(m.a(x))))), a=nn.Linear(4, 4), head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case()
def module_three_times_relu() -> Any:
    model = Net(lambda m, x: m.head(m.a(torch.relu(m.a(torch.relu(m.a(x)))))), a=nn.Linear(4, 4), head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case()
def siamese() -> Any:
    model = Net(lambda m, x, y: m.head((m.a(x).tanh() - m.a(y).tanh()).abs()), a=nn.Linear(4, 3), head=nn.Linear(3, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(N, 4), torch.randn(N, 4)), classes()


@case()
def siamese_convolution() -> Any:
    model = Net(lambda m, x, y: (torch.tanh(m.a(x)) * m.a(y)).flatten(1) @ torch.ones(8, 3), a=nn.Conv2d(1, 2, 2))
    return model, nn.MSELoss(), (torch.randn(N, 1, 3, 3), torch.randn(N, 1, 3, 3)), torch.randn(N, 3)


def tie(model: Any) -> Any:
    model.b.weight = model.a.weight
    return model


@case()
def tied_linear() -> Any:
    model = tie(Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(3, 3), b=nn.Linear(3, 3)))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case()
def tied_embedding_and_head() -> Any:
    model = tie(Net(lambda m, i: m.b(torch.tanh(m.a(i))).mean(1), a=nn.Embedding(5, 3), b=nn.Linear(3, 5)))
    return model, nn.CrossEntropyLoss(), torch.randint(5, (N, 2)), classes(5)


@case(options={"layers": ["a"]})
def tied_to_a_layer_not_selected() -> Any:
    model = tie(Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(3, 3), b=nn.Linear(3, 3)))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case()
def parameter_used_outside() -> Any:
    model = Net(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight), a=nn.Linear(3, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case()
def parameter_used_only_outside() -> Any:
    model = Net(lambda m, x: F.linear(torch.tanh(m.b(x)), m.a.weight), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case(refused=PASSIVE_REFUSES)
def weight_penalty_in_the_loss() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def loss_fn(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t) + 0.1 * model[0].weight.pow(4).sum()

    return model, loss_fn, torch.randn(N, 3), classes()


@case()
def residual() -> Any:
    model = Net(lambda m, x: m.head(x + torch.tanh(m.a(x))), a=nn.Linear(4, 4), head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case()
def inplace_residual() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.a(x))
        out = m.b(hidden)
        out += hidden
        return m.head(torch.tanh(out))

    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), head=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case("inplace_silu", nn.SiLU)
@case("inplace_elu", nn.ELU)
@case("inplace_leaky", nn.LeakyReLU)
@case("inplace_relu", nn.ReLU)
def inplace_activations(activation: Any) -> Any:
    model = nn.Sequential(nn.Linear(3, 4), activation(inplace=True), nn.Linear(4, 4), activation(inplace=True))
    return model, nn.MSELoss(), torch.randn(N, 3), torch.randn(N, 4)


@case()
def inplace_over_sequences() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)  # which PyTorch makes as a view
        y += m.b(m.act(m.down(x)))
        y[:, 0].mul_(2)
        y = y.tanh()
        output: Tensor = m.head(y).add_(y[..., :3]).mean(1)
        return output

    model = Net(
        forward,
        a=nn.Linear(3, 4),
        down=nn.Linear(3, 2),
        act=nn.SiLU(inplace=True),
        b=nn.Linear(2, 4),
        head=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 5, 3), classes()


@case()
def inplace_convolutions() -> Any:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 2), nn.ReLU(True), nn.Flatten(), nn.Linear(8, 3)
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 1, 4, 4), classes()


@case()
def gated() -> Any:
    model = Net(
        lambda m, x: m.head(torch.sigmoid(m.gate(x)) * m.value(x)),
        gate=nn.Linear(4, 4),
        value=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case()
def product_of_linear_layers() -> Any:
    model = Net(lambda m, x: m.a(x) * m.b(x), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case()
def square_of_a_layer() -> Any:
    model = Net(lambda m, x: m.a(x) ** 2, a=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case()
def concatenated_branches() -> Any:
    model = Net(
        lambda m, x: m.head(torch.cat([torch.relu(m.a(x)), torch.tanh(m.b(x)), x], 1)),
        a=nn.Linear(4, 2),
        b=nn.Linear(4, 2),
        head=nn.Linear(8, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case()
def resnet_block_eval() -> Any:
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


@case()
def layer_never_called() -> Any:
    model = Net(lambda m, x: m.a(x).tanh(), a=nn.Linear(4, 3), unused=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case()
def output_detached() -> Any:
    model = Net(lambda m, x: m.a(x) + m.b(x).detach(), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case()
def called_without_gradient() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = m.b(x)
        return m.a(x).tanh() + teacher

    model = Net(forward, a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), classes()


@case()
def frozen_layer() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case()
def frozen_backbone() -> Any:
    model = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case(skip={"online": "there is no backward"})
def fully_frozen() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).requires_grad_(False)
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case(by_slices=True)
def dropout() -> Any:
    model = nn.Sequential(
        nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 4), nn.Dropout(0.2), nn.Linear(4, 3)
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case(by_slices=True)
def dropout_in_lstm() -> Any:
    core = nn.LSTM(2, 2, num_layers=2, dropout=0.5, batch_first=True)
    model = Net(lambda m, x: m.head(m.core(x)[0][:, -1]), core=core, head=nn.Linear(2, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3, 2), classes()


@case("checkpoint_non_reentrant", False)
@case("checkpoint_reentrant", True)
def checkpointed_block(reentrant: bool) -> Any:
    model = Net(
        lambda m, x: m.head(checkpoint(m.block, m.first(x), use_reentrant=reentrant)),
        first=nn.Linear(3, 4),
        block=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
        head=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case()
def checkpoint_every_layer_non_reentrant() -> Any:
    model = Net(
        lambda m, x: checkpoint(m.b, torch.tanh(checkpoint(m.a, x, use_reentrant=False)), use_reentrant=False),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 3),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case(refused=dict.fromkeys(("hessian", "fisher", "online"), InvalidTypeError))
def data_parallel() -> Any:
    return nn.DataParallel(nn.Linear(3, 3)), nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case(refused=PASSIVE_REFUSES)
def penalty_by_a_list_of_parameters() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    kept = list(model.parameters())

    def loss_fn(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t) + 0.1 * sum(p.pow(4).sum() for p in kept)

    return model, loss_fn, torch.randn(N, 3), classes()


@case()
def parameters_kept_in_a_list() -> Any:
    model = Net(lambda m, x: F.linear(torch.tanh(m.a(x)), m.kept[0]), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    model.kept = [model.b.weight]
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case()
def frozen_parameters_kept_in_a_list() -> Any:
    model = Net(lambda m, x: F.linear(torch.tanh(m.a(x)), m.kept[0]), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    model.b.requires_grad_(False)
    model.kept = [model.b.weight]
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case()
def model_overwrites_its_input() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        x *= 1.5
        return m.b(torch.tanh(m.a(x)))

    class Copied(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clone())

    model = Copied(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


@case(skip={"online": "autograd itself refuses this backward"})
def input_of_a_layer_overwritten() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = torch.sin(x)
        with torch.no_grad():
            z = m.frozen(hidden)
        hidden.add_(1.0)
        return m.b(torch.tanh(m.a(hidden)) + z)

    model = Net(forward, a=nn.Linear(3, 4), frozen=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()


def force(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        energy = torch.tanh(m.b(torch.tanh(m.a(x)))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


@case()
def model_returns_its_own_derivative() -> Any:
    model = Net(force, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    return model, nn.MSELoss(), torch.randn(N, 3), torch.randn(N, 3)


@case()
def energy_and_forces() -> Any:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = m.b(torch.tanh(m.a(x))).squeeze(1)
            return energy, torch.autograd.grad(energy.sum(), x, create_graph=True)[0]

    model = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 1))
    targets = (torch.randn(N), torch.randn(N, 3))
    return model, lambda o, t: F.mse_loss(o[0], t[0]) + F.mse_loss(o[1], t[1]), torch.randn(N, 3), targets


@case()
def derivative_by_torch_func() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda row: torch.tanh(m.a(row)).sum()))(x)

    return Net(forward, a=nn.Linear(3, 4)), nn.MSELoss(), torch.randn(N, 3), torch.randn(N, 3)


@case(skip={"online": "the loss is not a sum over samples seen by hooks"})
def loss_differentiates_the_model() -> Any:
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


@case(refused={"hessian": DoubleBackwardError})
def operator_without_double_backward() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), Fn(OnceOnly.apply), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 3), classes()
