"""The Fisher of layers without a rule, by the operations that take their parameters."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .._sharing import counted_once
from .._torch.graph import Users, outputs_of, users_of
from .._torch.sample_graph import InnerSizes, samples_in_nodes
from .._torch.vjp import split_like
from ..errors import DoubleBackwardError
from ..layers.contraction import added, contract, contract_sum
from ..layers.dtypes import compute_dtype
from ..layers.layout import DIM_ZERO
from ..layers.operations import OperationCall
from ..layers.per_sample import Outer, PerSample, Rows, dense, weighted
from ..layers.selection import Layer
from ..layers.uses import Route, Uses, brought, hidden, pieces, reentrant
from ..results import LayerInfo, Strategy
from .fisher_pairs import Found
from .measurement import Measurement
from .output_hessian import output_points
from .recorded_layer import parts_of_one
from .roots import Columns
from .use_rows import ByCotangents, Evidence, follow_uses, gradients_at

#: By layer and parameter, per-sample gradients.
Pulled = dict[str, dict[str, list[PerSample]]]


def by_uses(
    task: Measurement,
    layers: Sequence[Layer],
    pairs: Columns,
    model_outputs: Sequence[Tensor] | None = None,
    inner_sizes: InnerSizes | None = None,
) -> Found:
    """Of the layers whose operations can be followed; samples are independent, and no hook changes gradients.

    ``model_outputs`` are of a forward that used the layers' own parameters, samples in dim 0, and ``inner_sizes`` what
    its graph tells of samples; by default it runs again.
    """
    if task.create_graph or task.num_samples == 1:
        return {}
    if model_outputs is None:
        model_outputs = output_points(task.isolated.forward(task.inputs), task.dimension)
    if inner_sizes is None:
        inner_sizes = samples_in_nodes(model_outputs, task.num_samples)
    evidence = ByCotangents([(f, DIM_ZERO) for f in model_outputs], task.num_samples, task.generator, inner_sizes)
    users = users_of(model_outputs)
    usable = _followed(task, layers, users, evidence)
    mine = [x for x in layers if x.name in usable]
    if not mine:
        return {}
    pulled_back = partial(_pulled_back, task, model_outputs, usable, evidence)
    totals = _contracted(mine, pairs, pulled_back, 1 / task.num_samples)
    info = LayerInfo(Strategy.RULE, checks={"rows_are_samples": True})
    return {
        name: (values, info if usable[name].uses else LayerInfo(Strategy.UNUSED)) for name, values in totals.items()
    }


def _contracted(
    layers: Sequence[Layer], pairs: Columns, pulled_back: Callable[[Sequence[Layer], Tensor], Pulled], alpha: float
) -> dict[str, list[Tensor]]:
    """α Σ_k Σ_n u_k ⊙ v_k of each layer, by parameter; where others hold all of its parameters, theirs."""
    totals = {x.name: parts_of_one(x) for x in layers}
    once = counted_once({x.name: list(x.parameters.values()) for x in layers})
    every = [x for x in layers if x.name in once]
    for k in range(pairs.num_columns):
        some = pairs.columns(range(k, k + 1))
        left = pulled_back(every, some.u[0])
        right = left if some.v is None else pulled_back(every, some.v[0])
        sign = None if some.sign is None else some.sign[0]
        for layer in every:
            for name, total in zip(layer.parameters, totals[layer.name], strict=True):
                u, v = left[layer.name].get(name, []), right[layer.name].get(name, [])
                if u:
                    _add(total, u, v, sign, float(k > 0), alpha)
                elif not k:
                    total.zero_()
        del left, right  # before the next are computed
    known = {id(p): total for x in every for p, total in zip(x.parameters.values(), totals[x.name], strict=True)}
    for layer in layers:
        if layer.name not in once:
            for p, total in zip(layer.parameters.values(), totals[layer.name], strict=True):
                total.copy_(known[id(p)])
    return totals


def _followed(task: Measurement, layers: Sequence[Layer], users: Users, evidence: Evidence) -> dict[str, Uses]:
    """By layer its uses in a graph, where it is known where samples are in them, and what they saved can be read."""
    parameters = {x.name: dict(zip(x.parameters, task.isolated.replacements(x), strict=True)) for x in layers}
    routes: dict[str, frozenset[Route]] = {x.name: frozenset() for x in layers}
    try:
        found = {} if reentrant(users) else follow_uses(users, parameters, evidence, routes, known=False)
    except DoubleBackwardError:
        return {}
    return {name: uses for name, uses in found.items() if uses is not None and not hidden(uses)}


def _pulled_back(
    task: Measurement,
    model_outputs: Sequence[Tensor],
    usable: dict[str, Uses],
    evidence: Evidence,
    layers: Sequence[Layer],
    cotangent: Tensor,
) -> Pulled:
    """By layer and parameter, the per-sample gradients of one cotangent (N, C) on the outputs."""
    cotangents = [part[0] for part in split_like(cotangent[None], model_outputs)]
    every = list(dict.fromkeys(use.node for uses in usable.values() for use in uses.uses))
    outputs = [(node, output) for node in every for output in outputs_of(node)]
    gradients = gradients_at(model_outputs, outputs, cotangents)
    on_outputs: dict[object, list[Tensor | None]] = {node: [] for node in every}
    for (node, _), g in zip(outputs, gradients, strict=True):
        on_outputs[node].append(g)
    result = {}
    with torch.no_grad():
        for layer in layers:
            uses, found = usable[layer.name], []
            for use in uses.uses:
                own = on_outputs[use.node]
                if all(g is None for g in own):
                    continue
                layouts = [x for x in evidence.layouts[use.node] if x is not None]
                call = OperationCall(use.node, own, layouts, task.num_samples, compute_dtype(layer))
                targets = use.targets if len(uses.uses) > 1 else None
                found.append(brought(call, use.sources, uses.leaves, uses.followed, targets))
            result[layer.name] = pieces(found)
    return result


def _same_factor(u: PerSample, v: PerSample) -> bool:
    """Whether what two per-sample gradients are linear in is all that they differ in."""
    if isinstance(u, Outer) and isinstance(v, Outer):  # that of a matrix from the right has the cotangent in its place
        return u.a is v.a or (isinstance(u.a, Tensor) and isinstance(v.a, Tensor) and torch.equal(u.a, v.a))
    return isinstance(u, Tensor) or (isinstance(u, Rows) and isinstance(v, Rows) and torch.equal(u.ids, v.ids))


def _add(total: Tensor, u: list[PerSample], v: list[PerSample], sign: Tensor | None, beta: float, alpha: float) -> None:
    """Add α Σ_n u_n ⊙ v_n sign_n to beta times the total."""
    numel = total.numel()
    if v is u and sign is None:
        contract_sum(u, numel=numel, out=total, beta=beta, alpha=alpha)
    elif len(u) == 1 and (v is u or _same_factor(u[0], v[0])):
        contract(u[0], v[0] if sign is None else weighted(v[0], sign), numel=numel, out=total, beta=beta, alpha=alpha)
    else:
        left, right = (torch.stack([dense(part, numel) for part in parts]).sum(0) for parts in (u, v))
        products = left * right if sign is None else left * right * sign.to(left)[:, None]
        added(products.sum(0), total, beta, alpha)
