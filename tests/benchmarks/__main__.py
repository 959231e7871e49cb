"""``python -m tests.benchmarks``: the same work by secorder and its peers, side by side in one run.

Every figure is a median over runs in which the contestants alternate, and ratios are of those medians: absolute times
drift on shared machines. The peers:

    pip install -e '.[bench]'
    pip install --no-deps backpack-for-pytorch curvlinops-for-pytorch nngeometry
    pip install --no-deps hessian-eigenthings==1.0.0a5
    pip install --no-deps --target /tmp/torch-secorder torch-secorder && export TORCH_SECORDER=/tmp/torch-secorder

Those of the second line pin torchvision, which nothing here needs, that of the third is a pre-release; the last goes
into a folder of its own, since our alias bears its import name.
"""

import argparse
import copy
import datetime
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secorder import CurvatureProbe, per_layer_fisher_diagonal, per_layer_hessian_diagonal
from secorder.online.audit.audited import EACH

from . import peers
from .architectures import architectures
from .curvature import curvature
from .timing import Results, alternate
from .workloads import WORKLOADS, Workload, mlp

OPTIMIZERS: dict[str, peers.Optimizer] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-5),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-5),
}
WORKS = ("online", "architectures", "fisher", "exact", "stochastic")
Contestants = dict[str, Callable[[], object]]

#: Workloads of which all layers are looked at, not those of the default types alone.
EVERY_LAYER: dict[str, Literal["all"]] = {"transformer": "all"}


def entered(contestants: Contestants, name: str, make: Callable[[], Callable[[], object]]) -> str | None:
    """Enter a peer, or say why it does not take part."""
    try:
        contestants[name] = make()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def training_step(work: Workload, model: nn.Module, make_optimizer: peers.Optimizer) -> Callable[[], None]:
    """A step of ordinary training."""
    optimizer = make_optimizer(list(model.parameters()))

    def step() -> None:
        optimizer.zero_grad()
        work.loss_fn(model(work.inputs), work.targets).backward()
        optimizer.step()

    return step


def settle(step: Callable[[], None], most: float = 0.05) -> None:
    """Run a probed step until no more each pass is audited, unless one takes more seconds than this, and is anyway."""
    for number in range(EACH + 1):
        begun = time.perf_counter()
        step()
        if number == 2 and time.perf_counter() - begun > most:  # the first that is not looked at
            return


def passive_fisher(results: Results, key: str, repeats: int) -> None:
    """A bare training step against one with a probe attached, and what peers take for the same in a step."""
    work = WORKLOADS[key]()
    probed_steps: dict[str, dict[str, Any]] = {
        "secorder, trace": {"accumulate": "trace"},
        "secorder": {},
        "secorder, every=10": {"every": 10},
    }
    for optimizer, make in OPTIMIZERS.items():
        contestants: Contestants = {"bare step": training_step(work, copy.deepcopy(work.model), make)}
        probes = []
        for name, options in probed_steps.items():
            model = copy.deepcopy(work.model)
            step = training_step(work, model, make)
            contestants[name] = step if "every" not in options else lambda step=step: [step() for _ in range(10)]
            probes.append(CurvatureProbe(model, EVERY_LAYER.get(key), **options))
            if "every" not in options:
                settle(step)
        refused = {}
        others = {
            "BackPACK SumGradSquared": lambda m=make: peers.backpack_step(work, m, "SumGradSquared"),
            "BackPACK BatchL2Grad (norms)": lambda m=make: peers.backpack_step(work, m, "BatchL2Grad"),
            "opacus ghost clipping (norms)": lambda m=make: peers.opacus_step(work, m),
        }
        for name, enter in others.items():
            reason = entered(contestants, name, enter)
            if reason:
                refused[name] = reason
        times = alternate(contestants, repeats)
        times["secorder, every=10"] /= 10
        results.show(f"Online Fisher per training step, {optimizer}", work.name, times, refused=refused)
        for probe in probes:
            probe.detach()


def first_steps(results: Results, key: str, repeats: int, steps: int = 100) -> None:
    """The mean over the first steps of a training, in which batches are looked at to see where samples are."""
    work = WORKLOADS[key]()

    def training(*, probed: bool) -> Callable[[], None]:
        def run() -> None:
            model = copy.deepcopy(work.model)
            step = training_step(work, model, OPTIMIZERS["SGD"])
            probe = CurvatureProbe(model, EVERY_LAYER.get(key)) if probed else None
            for _ in range(steps):
                step()
            if probe is not None:
                probe.detach()

        return run

    contestants: Contestants = {"bare step": training(probed=False), "secorder": training(probed=True)}
    times = {name: seconds / steps for name, seconds in alternate(contestants, repeats, warm_up=1).items()}
    results.show(f"Online Fisher, mean over the first {steps} steps", work.name, times)


def compiled_fisher(results: Results, key: str, repeats: int) -> None:
    """Steps of a compiled model: those that are recorded run as they are written, all others compiled."""
    work = WORKLOADS[key]()
    contestants: Contestants = {}
    probes, refused = [], {}
    for name, every in {"compiled step": 0, "secorder": 1, "secorder, every=10": 10}.items():
        model: Any = torch.compile(copy.deepcopy(work.model))
        step = training_step(work, model, OPTIMIZERS["SGD"])
        try:
            step()  # compiles
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"
            continue
        if every:
            probes.append(CurvatureProbe(model, EVERY_LAYER.get(key), every=every))
        contestants[name] = step if every < 10 else lambda step=step: [step() for _ in range(10)]
    if "secorder, every=10" in contestants:
        times = alternate(contestants, repeats)
        times["secorder, every=10"] /= 10
        results.show("Online Fisher of a compiled model", work.name, times, refused=refused)
    for probe in probes:
        probe.detach()


def compared(
    results: Results,
    title: str,
    work: Workload,
    ours: Callable[[], Tensor],
    exact: Tensor | None,
    others: dict,
    repeats: int,
) -> None:
    """Ours and those of the peers, with errors against float64."""
    contestants: Contestants = {"secorder": ours}
    refused = {}
    for name, make in others.items():
        reason = entered(contestants, name, lambda make=make: make(work))
        if reason:
            refused[name] = reason
    errors = {}
    for name, run in list(contestants.items()):
        try:
            found = run()
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"
            del contestants[name]
            continue
        if exact is not None and isinstance(found, Tensor) and found.numel() == exact.numel():
            errors[name] = ((found.double() - exact).norm() / exact.norm()).item()
    results.show(title, work.name, alternate(contestants, repeats, warm_up=1), errors, refused)


def flat(diagonals: dict[str, Tensor]) -> Tensor:
    """All layers in one vector."""
    return torch.cat(list(diagonals.values()))


def double(work: Workload) -> tuple[nn.Module, Tensor]:
    """The workload in float64."""
    return copy.deepcopy(work.model).double(), work.inputs.double()


def one_shot_fisher(results: Results, key: str, repeats: int) -> None:
    """Empirical, Monte Carlo and type-2 Fisher of one batch."""
    work = WORKLOADS[key]()
    model, inputs = double(work)
    kinds: dict[str, dict] = {
        "empirical": {
            "BackPACK SumGradSquared": peers.backpack_fisher,
            "torch.func vmap(grad)": peers.func_fisher,
            "opacus": peers.opacus_fisher,
        },
        "mc": {"BackPACK DiagGGNMC": peers.backpack_mc},
        "type-2": {"BackPACK DiagGGNExact": peers.backpack_type_2, "nngeometry FIM": peers.nngeometry_fisher},
    }
    for kind, others in kinds.items():
        exact = None
        if kind != "mc":
            exact = flat(per_layer_fisher_diagonal(model, work.loss_fn, inputs, work.targets, "all", fisher_type=kind))
        compared(
            results,
            f"One-shot Fisher, {kind}",
            work,
            lambda kind=kind: flat(
                per_layer_fisher_diagonal(work.model, work.loss_fn, work.inputs, work.targets, "all", fisher_type=kind)
            ),
            exact,
            others,
            repeats,
        )


def exact_hessian(results: Results, key: str, repeats: int) -> None:
    """The exact Hessian diagonal of all layers."""
    work = WORKLOADS[key]()
    model, inputs = double(work)
    exact = flat(per_layer_hessian_diagonal(model, work.loss_fn, inputs, work.targets, "all", method="exact"))
    compared(
        results,
        "Exact Hessian diagonal",
        work,
        lambda: flat(
            per_layer_hessian_diagonal(work.model, work.loss_fn, work.inputs, work.targets, "all", method="exact")
        ),
        exact,
        {"BackPACK DiagHessian": peers.backpack_hessian},
        repeats,
    )


def hessian_against_type_2(results: Results, key: str, repeats: int) -> None:
    """The exact Hessian against the type-2 Fisher, whose vjps it cannot do without."""
    work = WORKLOADS[key]()
    batch = (work.model, work.loss_fn, work.inputs, work.targets)
    contestants: Contestants = {
        "type-2 Fisher": lambda: per_layer_fisher_diagonal(*batch, fisher_type="type-2"),
        "exact Hessian": lambda: per_layer_hessian_diagonal(*batch, method="exact"),
    }
    results.show("Exact Hessian against type-2 Fisher", work.name, alternate(contestants, repeats, warm_up=1))


def stochastic_hessian(results: Results, key: str, repeats: int) -> None:
    """Estimates at about equal time: secorder's 100 draws set the clock."""
    work = WORKLOADS[key]()
    model, inputs = double(work)
    exact = per_layer_hessian_diagonal(model, work.loss_fn, inputs, work.targets, "all", method="exact")
    sizes = [d.numel() for d in exact.values()]

    def ours() -> Tensor:
        return flat(
            per_layer_hessian_diagonal(
                work.model, work.loss_fn, work.inputs, work.targets, "all", method="hutchinson", num_draws=100
            )
        )

    clock = alternate({"secorder": ours}, 1, warm_up=1)["secorder"]
    contestants: Contestants = {"secorder, 100 draws": ours}
    refused = {}
    for name, make in {
        "curvlinops hutchinson_diag": peers.curvlinops_hutchinson,
        "PyHessian products": peers.pyhessian_hutchinson,
    }.items():
        try:
            one = alternate({"": make(work, 4)}, 1, warm_up=1)[""] / 4
            draws = max(1, round(clock / one))
            contestants[f"{name}, {draws} draws"] = make(work, draws)
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"

    def median_error(found: Tensor) -> float:
        """Median over layers of the relative error."""
        parts = zip(found.double().split(sizes), exact.values(), strict=True)
        return statistics.median(((f - e).norm() / e.norm()).item() for f, e in parts)

    errors = {name: median_error(run()) for name, run in contestants.items()}
    times = alternate(contestants, max(1, repeats // 3), warm_up=0)
    results.show("Stochastic Hessian (error: median over layers)", work.name, times, errors, refused)


def against_torch_secorder(results: Results) -> None:
    """Its exact Hessian takes a backward for each parameter element: a small MLP whole, a large one by a part."""
    torch.manual_seed(0)
    model = mlp(64, 32, 10, activation=nn.Tanh)
    work = Workload("tanh MLP 64-32-10, N=128", model, torch.randn(128, 64), torch.randint(10, (128,)), True)
    compared(
        results,
        "Exact Hessian diagonal",
        work,
        lambda: flat(per_layer_hessian_diagonal(work.model, work.loss_fn, work.inputs, work.targets, method="exact")),
        None,
        {"torch-secorder": peers.torch_secorder_hessian},
        1,
    )
    work = WORKLOADS["mlp-tanh"]()
    times = alternate(
        {"secorder": lambda: per_layer_hessian_diagonal(work.model, work.loss_fn, work.inputs, work.targets)},
        3,
        warm_up=1,
    )
    refused = {}
    try:
        times["torch-secorder, by 300 elements of each layer"] = peers.torch_secorder_extrapolated(work)
    except Exception as error:
        refused["torch-secorder"] = f"{type(error).__name__}: {error}"
    results.show("Exact Hessian diagonal", work.name, times, refused=refused)


def machine_of(device: str) -> str:
    """What is measured on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    """Print the tables, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--only", choices=WORKS, action="append")
    parser.add_argument("--device", default="cpu", help="where everything is made and runs: cpu, cuda")
    parser.add_argument("--workloads", nargs="*", choices=list(WORKLOADS))
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--readme", type=Path, help="put the tables between the marks in this file")
    options = parser.parse_args()
    only, repeats = options.only or WORKS, options.repeats
    warnings.filterwarnings("ignore")
    if options.device != "cpu":  # a default device is a mode, under which each call of PyTorch's goes through Python
        torch.set_default_device(options.device)
    results = Results(Console(width=110))
    machine = machine_of(options.device)
    heading = f"{datetime.date.today()}, torch {torch.__version__}, {machine}, medians of {repeats} runs"
    results.console.print(heading)

    def chosen(*keys: str) -> list[str]:
        return [key for key in keys if not options.workloads or key in options.workloads]

    if "online" in only:
        for key in chosen("mlp-wide", "mlp-relu", "mlp-small", "transformer", "cnn", "resnet18"):
            passive_fisher(results, key, repeats if key == "resnet18" else 4 * repeats)
        for key in chosen("mlp-relu", "transformer"):
            first_steps(results, key, max(1, repeats // 3))
            compiled_fisher(results, key, 2 * repeats)
    if "architectures" in only and not options.workloads:
        architectures(results, repeats)
    if "fisher" in only:
        for key in chosen("mlp-relu", "cnn", "transformer", "lstm"):
            one_shot_fisher(results, key, repeats)
    if "exact" in only:
        for key in chosen("mlp-small", "mlp-tanh", "mlp-deep", "mlp-narrow", "mlp-relu", "cnn"):
            exact_hessian(results, key, repeats)
        for key in chosen("resnet18"):
            hessian_against_type_2(results, key, max(1, repeats // 4))
        if not options.workloads:
            against_torch_secorder(results)
    if "stochastic" in only:
        # A transformer whose exact Hessian, the reference, takes seconds; fused attention has no second derivative.
        for key in chosen("mlp-small", "mlp-tanh", "cnn-tanh", "transformer-small", "lstm"):
            with sdpa_kernel(SDPBackend.MATH):
                stochastic_hessian(results, key, repeats)
        if not options.workloads:
            curvature(results, repeats)
    if options.json:
        options.json.write_text(json.dumps({"run": heading, "tables": results.tables}, indent=1) + "\n")
    if options.readme:
        before, _, rest = options.readme.read_text().partition("<!-- benchmarks -->")
        after = rest.partition("<!-- end of benchmarks -->")[2]
        inside = f"<!-- benchmarks -->\n\n{heading}.\n\n{results.markdown()}\n\n<!-- end of benchmarks -->"
        options.readme.write_text(before + inside + after)


if __name__ == "__main__":
    main()
