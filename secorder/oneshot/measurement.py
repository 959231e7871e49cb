"""One measurement: the isolated model, the loss, the batch, and the options."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._torch.autocast import autocast_state, under_autocast
from .._torch.modules import modules_in
from .._torch.pytree import Made, map_tensors, once_each, tensors_in
from .._torch.random_state import fresh_generator
from .._torch.surroundings import inside_transform
from .._torch.vjp import check_chunk_size, gradients, products_at_once
from .._torch.weight_norm import differentiable_weight_norm
from ..batch import (
    arguments_of,
    batch_size,
    owned_batch,
    part_of_batch,
    require_agreement,
    sample_dimension,
    take_samples,
)
from ..errors import InvalidArgumentError, InvalidTypeError, ProbeStateError
from ..layers.selection import Layer, present
from ..layers.structure import independent_by_structure, pure_by_structure
from ..owners import Owned
from ..parallel.fsdp import gathered
from ..parallel.ranks import Ranks
from .isolation import IsolatedModel, Result, isolate, run_isolated
from .known_losses import known_loss
from .loss import check_loss, explains_targets, require_loss_function
from .overwriting import LossOverwrites, on_copies, versions
from .provenance import Traced
from .recording import RecordingFailed
from .timing import Told

LossFunction = Callable[[Any, Any], Tensor]


@dataclass
class Measurement:
    """What was asked for, on an isolated model."""

    isolated: IsolatedModel  #: the isolated model
    layers: Sequence[Layer]  #: the layers to measure
    loss_fn: LossFunction  #: the loss, under the autocast state of the call
    inputs: Any  #: what the model takes
    targets: Any  #: what the loss takes second
    num_samples: int  #: the samples of the batch; 1 where it cannot be cut into samples, which a Hessian needs not
    sample_dim: int  #: where they are in the inputs
    generator: torch.Generator  #: random numbers of draws and checks
    create_graph: bool  #: whether results are to be differentiable
    chunk_size: int | None  #: products batched at most
    progress: bool  #: whether to show progress bars
    certain: bool  #: whether samples are independent, and in dim 0, by the model's structure
    known_loss: bool  #: whether the loss is PyTorch's own, without any state
    autocast: bool  #: whether the user's code runs under autocast
    #: what is wrong with the sizes of inputs and targets, to be told if the loss fails
    mismatch: InvalidArgumentError | None = field(default=None, repr=False)
    owned: Owned | None = field(default=None, repr=False)  #: whose the inputs are, where no dimension holds the samples
    recordable: bool = True  #: whether the model runs with detached parameters in the layers' calls
    told: Told = field(default_factory=Told, repr=False)  #: by trials, of this measurement or one before
    by_operation: float = math.inf  #: numbers that an operation of model and loss computes on average, if it is known

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.isolated.model

    @property
    def ruled(self) -> list[Layer]:
        """The layers that have a rule, which their recorded calls are for."""
        return [layer for layer in self.layers if layer.rule is not None and self.recordable]

    def loss(self, *, second_order: bool = False, forward: Callable[[Any], Any] | None = None) -> tuple[Any, Tensor]:
        """The model's output (by ``forward``) and the loss, from the same state each time."""
        output = (forward or self.isolated.forward)(self.inputs)
        given = () if self.known_loss else (output, self.targets)
        before = versions(given)
        try:
            loss = self.loss_fn(output, self.targets)
        except Exception as error:
            if self.mismatch is not None:
                raise self.mismatch from error
            require_agreement(output, self.targets, self.num_samples, self.sample_dim)
            raise
        if versions(given) != before:
            raise LossOverwrites
        loss = check_loss(loss, self.isolated, self.inputs)
        self.isolated.require_replacements((loss, output))
        if second_order and loss.requires_grad:
            # A factor that requires a gradient lets functions without a double backward see that there will be one:
            # where the gradient is constant, they would pass for linear.
            loss = loss * torch.ones_like(loss, requires_grad=True)
        return output, loss

    def traced(self, *, inputs: bool) -> Traced:
        """How to run the model so that its graph may tell where samples are, perhaps also in the inputs."""
        inputs = inputs and not self.autocast  # under which numbers of full precision are compared
        return Traced(self.isolated, self.dimension, self.num_samples, inputs=inputs, known=self.certain)

    def loss_again(self, output: Any, targets: Any, seed: int | None = None) -> Tensor:
        """The loss of another output and targets, from the state in which it ran first, or of another seed."""
        if self.known_loss:
            return self.loss_fn(output, targets)
        with self.isolated.loss_once_more(seed):
            return self.loss_fn(output, targets)

    def products_at_once(self, elements: int, like: Tensor) -> int:
        """How many Hessian-vector products to batch that keep so many numbers each."""
        return products_at_once(elements, like, self.chunk_size, self.by_operation)

    def enters_model(self, loss: Tensor, leaves: Sequence[Tensor]) -> bool:
        """Whether a loss of the output alone depends on leaves inside of the model, or on the layers' parameters."""
        replacements = [s for layer in self.layers for s in self.isolated.replacements(layer)]
        return any(g is not None for g in gradients(loss, [*leaves, *replacements]))

    def dimension(self, tensor: Tensor) -> int | None:
        """Where a tensor's samples are; what has none is shared by all samples."""
        return sample_dimension(tensor, self.num_samples, self.sample_dim)

    def of_rows(self, output: Any) -> bool:
        """Whether output and targets are tensors of a row a sample."""
        rows = isinstance(output, Tensor) and isinstance(self.targets, Tensor) and bool(self.targets.dim())
        return rows and output.shape[:1] == self.targets.shape[:1] == (self.num_samples,)

    def cut(self, output: Any, index: Sequence[int], *, rows: bool = False) -> tuple[Any, Any]:
        """Output and targets of some samples."""
        (output,) = take_samples([output], index, self.num_samples, self.sample_dim)
        (targets,) = take_samples([self.targets], index, self.num_samples, self.sample_dim, rows=rows)
        return output, targets

    def part(self, index: Sequence[int]) -> tuple[Any, Any, dict[int, Tensor]]:
        """Inputs and targets of some samples, in leaves of their own, and these leaves by the ``id`` of the batch's.

        One tensor that is both stays one.
        """
        leaves, cut = Made(), Made()
        leaf = once_each(lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad), leaves)
        batch = self.inputs, self.targets, self.num_samples, self.sample_dim
        inputs, targets = (map_tensors(leaf, x) for x in part_of_batch(*batch, index, owned=self.owned, cut=cut))
        return inputs, targets, {key: leaves[id(t)][1] for key, (_, t) in cut.items() if id(t) in leaves}

    def random(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Standard normal numbers."""
        device = self.generator.device
        return torch.randn(tuple(shape), generator=self.generator, dtype=like.dtype, device=device).to(like.device)

    def signs(self, count: int, like: Sequence[Tensor]) -> list[Tensor]:
        """For each tensor ``count`` draws of random signs, stacked; the same whether they are drawn at once or not."""
        sizes = [t.numel() for t in like]
        device = self.generator.device
        bits = torch.stack(
            [torch.randint(0, 2, (sum(sizes),), generator=self.generator, device=device) for _ in range(count)]
        )
        parts = zip(bits.split(sizes, 1), like, strict=True)
        return [b.to(t.device).mul_(2).sub_(1).to(t.dtype).reshape(count, *t.shape) for b, t in parts]


def measure(
    work: Callable[[Measurement], Result],
    model: nn.Module,
    layers: Sequence[Layer],
    loss_fn: LossFunction,
    inputs: Any,
    targets: Any,
    *,
    by_sample: bool,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
    chunk_size: int | None = None,
    progress: bool = False,
    sample_dim: int = 0,
    told: Told | None = None,
) -> Result:
    """Run ``work`` on an isolated model.

    With ``by_sample`` the quantity is made of samples, so that inputs and targets must agree on them. What trials tell
    is kept in ``told``, for measurements to come.
    """
    _require_measurable(loss_fn, chunk_size, generator)
    for layer in layers:
        _require_present(model, layer)
    if by_sample:
        _refuse_packed(inputs)
    owned = owned_batch(inputs, targets, sample_dim)
    whole = owned is not None and (owned.num_samples == 1 or not by_sample)  # a Hessian needs to know of no samples
    if whole:
        owned = None
    try:
        count, mismatch = 1 if whole else batch_size(inputs, targets, sample_dim), None
    except InvalidArgumentError as error:
        if by_sample:
            raise
        batch_size(inputs, None, sample_dim)  # raises again where it is not the targets that do not fit
        count, mismatch = 1, error
    if any(t.is_inference() for t in tensors_in(targets)):  # which autograd does not take
        targets = map_tensors(_usable, targets)
    generator = generator or fresh_generator(next((p.device for x in layers for p in x.parameters.values()), None))
    under, autocast, known = under_autocast(loss_fn), bool(autocast_state()), known_loss(loss_fn)
    certain = mismatch is None and owned is None and independent_by_structure(model, sample_dim)
    pure = certain and known and pure_by_structure(model)

    def on_isolated(direct: bool, recordable: bool = True) -> Result:
        twice = [] if by_sample and not create_graph else modules_in(model)  # differentiated twice
        isolation = isolate(model, loss_fn, layers, create_graph=create_graph, direct=direct, pure=pure)
        with isolation as isolated, differentiable_weight_norm(twice):
            batch = inputs, targets, count, sample_dim
            how = generator, create_graph, chunk_size, progress
            task = Measurement(isolated, layers, under, *batch, *how, certain, known, autocast, mismatch, owned)
            task.recordable, task.told = recordable, told or task.told
            return work(task)

    kept = [] if known else [(t, t.clone()) for t in tensors_in(targets)]
    with explains_targets(inputs, targets):
        try:
            return _measured(on_isolated, model)
        except LossOverwrites:
            with torch.no_grad():
                for target, values in kept:
                    target.copy_(values)
        under = under_autocast(on_copies(loss_fn))
        return _measured(on_isolated, model)


def _require_measurable(loss_fn: Any, chunk_size: int | None, generator: Any) -> None:
    """Raise for what goes with no batch, and where nothing can be measured."""
    if inside_transform():
        raise ProbeStateError(
            "a measurement runs backward passes of its own, which torch.func's transforms (vmap, grad, jvp, …) do not "
            "take: measure outside of them."
        )
    require_loss_function(loss_fn)
    check_chunk_size(chunk_size)
    if not isinstance(generator, (torch.Generator, type(None))):
        raise InvalidTypeError(f"generator must be a torch.Generator, got {type(generator).__name__}.")


def _measured(on_isolated: Callable[..., Result], model: nn.Module) -> Result:
    with suppress(RecordingFailed):
        return run_isolated(on_isolated, model)
    return run_isolated(partial(on_isolated, recordable=False), model)


def _refuse_packed(inputs: Any) -> None:
    """Raise where the model is given packed sequences, of which no dimension holds the samples."""
    args, kwargs = arguments_of(inputs)
    if any(isinstance(x, PackedSequence) for x in (inputs, *args, *kwargs.values())):
        raise InvalidTypeError(
            "packed sequences have no dimension that holds the samples: pass padded ones with their lengths, and pack "
            "them in the model."
        )


def _usable(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def _require_present(model: nn.Module, layer: Layer) -> None:
    try:
        present = model.get_submodule(layer.name) is layer.module
    except AttributeError:
        present = False
    if not present:
        raise ProbeStateError(
            f"layer {layer.name!r} is no longer the module that was selected: it was replaced or taken out; make a new "
            "probe."
        )
    if any(p.is_meta for p in layer.parameters.values()):
        raise InvalidArgumentError(
            f"layer {layer.name!r} has its weights on the meta device, where there are no numbers: load them first."
        )


@contextmanager
def whole_layers(model: nn.Module, layers: Sequence[Layer], ranks: Ranks | None) -> Iterator[Sequence[Layer]]:
    """Layers for passes of our own: under ``fully_shard`` with their parameters gathered."""
    if ranks is not None and ranks.tensor:
        raise InvalidArgumentError(
            "one-shot measurements are not supported where parts of layers lie over ranks (tensor parallelism): "
            "measure a copy of the model that is whole, or read what training accumulates."
        )
    if not any(layer.sharded for layer in layers):
        yield [present(layer) for layer in layers]
        return
    with gathered(model):
        yield [
            replace(
                layer, parameters={name: layer.module.get_parameter(name) for name in layer.parameters}, spread=None
            )
            for layer in layers
        ]
