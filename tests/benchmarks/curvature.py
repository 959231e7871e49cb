"""Estimates of the Hessian of real architectures at small sizes, trained for a while: ours and those of the peers.

Diagonals and top eigenvalues of all layers and traces of single ones, at equal time or to equal tolerance. Errors are
those against the exact Hessian in float64, of some layers.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secorder import CurvatureProbe

from . import peers
from .timing import Results, alternate, timed

BATCH, LENGTH, WIDTH, LAYERS, WORDS, LABELS = 4, 12, 96, 3, 200, 5
STEPS = 40

#: Draws a layer of ours, which set the clock.
DRAWS = 32

#: A tolerance on residuals which is about the root of the usual one: that is about the eigenvalue's own error.
LOOSE = 0.03

#: Layers of BERT whose traces are told.
_BERT = "core.bert.encoder.layer."
TRACED = [
    _BERT + "0.attention.self.query", _BERT + "0.output.dense", _BERT + "1.attention.self.value",
    _BERT + "1.intermediate.dense", _BERT + "1.attention.output.LayerNorm", _BERT + "2.attention.output.dense",
    _BERT + "2.output.LayerNorm",
]  # fmt: skip


class _Logits(nn.Module):
    """A model of transformers that returns logits alone, as peers want it."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.core(ids).logits
        return found


class NextToken(nn.CrossEntropyLoss):
    """The loss of a language model."""

    def forward(self, logits: Tensor, ids: Tensor) -> Tensor:
        return super().forward(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@dataclass
class Trained:
    """A model, its loss and a batch.

    Attributes:
        name: as it is shown.
        model: trained for a while.
        loss_fn: of the logits and targets.
        inputs: of one batch.
        targets: of it.
        layers: those whose Hessian is known exactly.
    """

    name: str
    model: nn.Module
    loss_fn: nn.CrossEntropyLoss
    inputs: Tensor
    targets: Tensor
    layers: Sequence[str]


def _sentences(count: int) -> Tensor:
    """Words of which each is one of four that may follow the one before."""
    generator = torch.Generator().manual_seed(0)
    following = torch.randint(WORDS, (WORDS, 4), generator=generator)
    words = [torch.randint(WORDS, (count,))]
    for _ in range(LENGTH - 1):
        words.append(following[words[-1], torch.randint(4, (count,))])
    return torch.stack(words, 1)


def _trained(name: str, core: nn.Module, layers: Sequence[str], *, labels: bool) -> Trained:
    """After some steps of Adam."""
    model = _Logits(core)
    loss_fn = nn.CrossEntropyLoss() if labels else NextToken()

    def batch(count: int) -> tuple[Tensor, Tensor]:
        ids = _sentences(count)
        return ids, ids[:, 0] % LABELS if labels else ids

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(STEPS):
        inputs, targets = batch(32)
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
    return Trained(name, model.eval(), loss_fn, *batch(BATCH), layers)


def gpt2() -> Trained:
    """transformers' GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    core = GPT2LMHeadModel(GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=4, vocab_size=WORDS, n_positions=LENGTH, bos_token_id=0, eos_token_id=0,
        use_cache=False, attn_implementation="eager",
    ))  # fmt: skip
    block = "core.transformer.h.1."
    return _trained("GPT-2", core, [block + "attn.c_proj", block + "mlp.c_proj", block + "ln_2"], labels=False)


def llama() -> Trained:
    """transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    core = LlamaForCausalLM(LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=4, intermediate_size=256, vocab_size=WORDS,
        bos_token_id=0, eos_token_id=0, use_cache=False, attn_implementation="eager",
    ))  # fmt: skip
    block = "core.model.layers.1."
    layers = [block + "self_attn.v_proj", block + "mlp.down_proj", block + "input_layernorm"]
    return _trained("Llama", core, layers, labels=False)


def bert() -> Trained:
    """transformers' BERT, as a classifier."""
    from transformers import BertConfig, BertForSequenceClassification

    core = BertForSequenceClassification(BertConfig(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=4, intermediate_size=4 * WIDTH,
        vocab_size=WORDS, num_labels=LABELS, attn_implementation="eager",
    ))  # fmt: skip
    block = "core.bert.encoder.layer.1."
    layers = [block + "attention.self.value", block + "output.dense", block + "attention.output.LayerNorm"]
    return _trained("BERT", core, layers, labels=True)


MODELS: dict[str, Callable[[], Trained]] = {"GPT-2": gpt2, "Llama": llama, "BERT": bert}

#: A peer's estimate by so many products.
Peer = Callable[[Trained, int], Callable[[], Any]]


def _joint(work: Trained, draws: int, product: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """The mean of v ⊙ Hv, v random signs on all parameters together."""
    total = torch.zeros(size)
    for _ in range(draws):
        v = torch.randint(2, (size,)) * 2.0 - 1
        total += v * product(v) / draws
    return total


def _eigenthings(work: Trained, layer: str = "") -> Any:
    """hessian-eigenthings' operator of one layer's parameters, or of all."""
    from hessian_eigenthings import HessianOperator, match_names

    return HessianOperator(
        work.model,
        [(work.inputs, work.targets)],
        lambda model, batch: work.loss_fn(model(batch[0]), batch[1]),
        param_filter=match_names(f"{layer}.*") if layer else None,
    )


def _eigenthings_diagonal(work: Trained, draws: int) -> Callable[[], Tensor]:
    operator = _eigenthings(work)
    return lambda: _joint(work, draws, operator.matvec, operator.size)


DIAGONALS: dict[str, Peer] = {
    "curvlinops hutchinson_diag": peers.curvlinops_hutchinson,
    "curvlinops xdiag": peers.curvlinops_xdiag,
    "PyHessian products": peers.pyhessian_hutchinson,
    "hessian-eigenthings products": _eigenthings_diagonal,
}


def _draws_in(make: Callable[[int], Callable[[], Any]], seconds: float, few: int = 6) -> int:
    """How many products take so long."""
    run = make(few)
    run()
    return max(few, round(seconds / (timed(run) / few)))


def diagonals(results: Results, work: Trained, repeats: int) -> None:
    """The Hessian diagonal of all layers at equal time: ours layer by layer, the peers' jointly."""
    with CurvatureProbe(work.model, "all") as probe:

        def ours() -> dict[str, Tensor]:
            found = probe.hessian_diagonal(
                work.loss_fn, work.inputs, work.targets, method="hutchinson", num_draws=DRAWS
            )
            return {name: found[name] for name in work.layers}

        exact = {}
        for name in work.layers:
            with CurvatureProbe(work.model, layers=name) as single:
                exact |= single.hessian_diagonal(work.loss_fn, work.inputs, work.targets, method="exact")
        places, start = {}, 0
        for name, parameter in work.model.named_parameters():
            owner = name.rpartition(".")[0]
            before = places.get(owner, slice(start, start))
            places[owner] = slice(before.start, start + parameter.numel())
            start += parameter.numel()
        contestants: dict[str, Callable[[], Any]] = {f"secorder, {DRAWS} draws a layer": ours}
        ours()
        seconds, refused = timed(ours), {}
        for name, peer in DIAGONALS.items():
            try:
                count = _draws_in(lambda few, peer=peer: peer(work, few), seconds) // 2 * 2
                contestants[f"{name}, {count}"] = peer(work, count)
            except Exception as error:
                refused[name] = f"{type(error).__name__}: {error}"
        errors = {}
        for name, run in contestants.items():
            found = run()
            if isinstance(found, Tensor):
                found = {layer: found[places[layer]] for layer in work.layers}
            errors[name] = statistics.median(((found[x] - exact[x]).norm() / exact[x].norm()).item() for x in exact)
        title = "Stochastic Hessian of an architecture (error: median over layers)"
        results.show(title, work.name, alternate(contestants, max(1, repeats // 4), warm_up=0), errors, refused)


def _root_mean_square(found: Sequence[float], exact: float) -> float:
    return (sum((x - exact) ** 2 for x in found) / len(found)) ** 0.5 / abs(exact)


def traces(results: Results, work: Trained, repeats: int) -> None:
    """The trace of single layers at equal time."""
    names = {"secorder, 100 draws": "ours", "hessian-eigenthings hutch++": "theirs"}
    times: dict[str, list[float]] = {name: [] for name in names}
    errors: dict[str, list[float]] = {name: [] for name in names}
    refused: dict[str, str] = {}
    mine, other = names
    for layer in TRACED:
        with CurvatureProbe(work.model, layers=layer, frozen=True) as probe:
            batch = work.loss_fn, work.inputs, work.targets
            exact = probe.hessian_trace(*batch, method="exact")[layer].value
            runs: dict[str, Callable[[], float]] = {}
            runs[mine] = lambda probe=probe, batch=batch, layer=layer: (
                probe.hessian_trace(*batch, method="hutchinson", num_draws=100)[layer].value
            )
            runs[mine]()
            try:
                runs[other] = _hutch_plus_plus(work, layer, timed(runs[mine]))
            except Exception as error:
                refused[other] = f"{type(error).__name__}: {error}"
            found: dict[str, list[float]] = {name: [] for name in runs}
            spent: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(max(5, repeats)):
                for name, run in runs.items():
                    start = time.perf_counter()
                    found[name].append(run())
                    spent[name].append(time.perf_counter() - start)
            for name in runs:
                times[name].append(statistics.median(spent[name]))
                errors[name].append(_root_mean_square(found[name], exact))
    shown = {name: sum(t) for name, t in times.items() if t}
    ratios = [b / a for a, b in zip(errors[mine], errors[other], strict=False)]
    worse = f"; theirs / ours: {statistics.median(ratios):.1f} in the median" if ratios else ""
    medians = {name: statistics.median(e) for name, e in errors.items() if e}
    results.show(f"Trace of single layers (error: median over layers{worse})", work.name, shown, medians, refused)


def _hutch_plus_plus(work: Trained, layer: str, seconds: float) -> Callable[[], float]:
    from hessian_eigenthings import trace

    operator = _eigenthings(work, layer)

    def make(count: int) -> Callable[[], float]:
        return lambda: trace(operator, num_matvecs=count).estimate

    return make(_draws_in(make, seconds))


def top_eigenvalues(results: Results, work: Trained, repeats: int, tolerance: float = 1e-3) -> None:
    """The largest eigenvalue in modulus of single layers, to equal tolerance, and to about equal error.

    Ours takes all layers in one call; the peers know of one at a time, on a model of which the others are frozen.
    """
    refused: dict[str, str] = {}
    with CurvatureProbe(work.model, layers=work.layers, frozen=True) as probe:

        def ours(tolerance: float) -> list[float]:
            found = probe.hessian_eigenvalues(
                work.loss_fn, work.inputs, work.targets, which="largest", tolerance=tolerance, max_iterations=400
            )
            return [(found[layer].top + found[layer].bottom)[0] for layer in work.layers]

        exact = dict(zip(work.layers, ours(1e-7), strict=True))
        contestants: dict[str, Callable[[], list[float]]] = {
            "secorder": lambda: ours(tolerance),
            f"secorder, tolerance {LOOSE:g}": lambda: ours(LOOSE),
        }
        others: dict[str, Callable[[str], Callable[[], float]]] = {
            "hessian-eigenthings lanczos": lambda layer: _lanczos(work, layer, tolerance),
            "PyHessian eigenvalues": lambda layer: _power_iteration(work, layer, tolerance),
            f"PyHessian, to an error of {tolerance:g}": lambda layer: _power_iteration(
                work, layer, _tolerance_for(work, layer, tolerance, exact[layer])
            ),
        }
        for name, make in others.items():
            try:
                single = [make(layer) for layer in work.layers]
                contestants[name] = lambda single=single: [run() for run in single]
                contestants[name]()
            except Exception as error:
                contestants.pop(name, None)
                refused[name] = f"{type(error).__name__}: {error}"
        errors = {
            name: statistics.median(abs(a / b - 1) for a, b in zip(run(), exact.values(), strict=True))
            for name, run in contestants.items()
        }
        title = f"Top eigenvalue of single layers, tolerance {tolerance:g} (error: median over layers)"
        results.show(title, work.name, alternate(contestants, max(1, repeats // 3), warm_up=0), errors, refused)


def _lanczos(work: Trained, layer: str, tolerance: float) -> Callable[[], float]:
    """With as many steps as the tolerance takes: it has to be told them, and finding them is not counted."""
    from hessian_eigenthings import lanczos

    operator = _eigenthings(work, layer)
    for steps in range(5, 200, 5):
        if bool(lanczos(operator, k=1, max_iter=steps, tol=tolerance).converged.all()):
            break
    return lambda: float(lanczos(operator, k=1, max_iter=steps, tol=tolerance).eigenvalues[0])


def _power_iteration(work: Trained, layer: str, tolerance: float) -> Callable[[], float]:
    """On a copy of which the other layers are frozen."""
    from pyhessian import hessian

    model = copy.deepcopy(work.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(f"{layer}."))

    def run() -> float:
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            computer = hessian(model, work.loss_fn, data=(work.inputs, work.targets), cuda=False)
        return float(computer.eigenvalues(maxIter=400, tol=tolerance)[0][0])

    return run


def _tolerance_for(work: Trained, layer: str, error: float, exact: float, starts: int = 3) -> float:
    """With which power iteration, which stops where an eigenvalue changes little, comes as close from some starts.

    It has to know the eigenvalue; finding out is not counted.
    """
    tolerance = error
    while tolerance > 1e-7:
        run = _power_iteration(work, layer, tolerance)
        if max(abs(run() / exact - 1) for _ in range(starts)) <= error:
            break
        tolerance /= 2
    return tolerance


def curvature(results: Results, repeats: int) -> None:
    """All of it; an architecture of a package that is not there is named."""
    for name, make in MODELS.items():
        torch.manual_seed(0)
        try:
            work = make()
        except ImportError as error:  # transformers is no dependency
            results.show("Stochastic Hessian of an architecture", name, {}, refused={"secorder": str(error)})
            continue
        diagonals(results, work, repeats)
        top_eigenvalues(results, work, repeats)
        if name == "BERT":
            traces(results, work, repeats)
