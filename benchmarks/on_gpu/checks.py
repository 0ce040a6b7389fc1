"""Checks of correctness; what a check guards is measured only if it has passed.

Each check compares with an independent way to the same numbers: plain tensors in float64, the adapter alone, a merged
model, a loop.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.costs.fisher_cost import loop, tuned_norms
from benchmarks.harness.rows import Cell, Row
from benchmarks.on_gpu.bench import Bench
from benchmarks.on_gpu.shapes import make_batch, vary_gains
from peft_lntune import AdapterBank, LNTuningConfig, PrefixConfig, find_norms, fisher_scores

# Relative errors in the norm of the whole tensor. Float32 with TF32 off sums at most a few thousand products, each with
# an error of 6e-8, in another order than the reference; TF32 or a wrong row would give 1e-3 and more.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
LAYERS = 2  # of the real widths: an error of a kernel or of a route is seen in one layer
BASE = "__base__"

Check = Callable[[Bench], dict[str, float]]
CHECKS: dict[str, tuple[Check, float, str]] = {}


def check(name: str, tolerance: float, wanted: str) -> Callable[[Check], Check]:
    """Register a function that returns errors by case; the largest is held to the tolerance."""

    def add(run: Check) -> Check:
        CHECKS[name] = run, tolerance, wanted
        return run

    return add


def run_cell(cell: Cell, bench: Bench) -> Row:
    """Run one check."""
    run, tolerance, wanted = CHECKS[cell["check"]]
    errors = run(bench)
    largest = _worst(list(errors.values()))
    # Not `largest <= tolerance` negated: NaN must not pass.
    return {
        "passed": all(error <= tolerance for error in errors.values()),
        "errors": {case: error if error == error else None for case, error in errors.items()},  # JSON has no NaN
        "largest": largest if largest == largest else None,
        "tolerance": tolerance,
        "wanted": wanted,
    }


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return ‖found − wanted‖ / ‖wanted‖, in float64.

    Example:
        >>> relative(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        0.0
    """
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def logits(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """Return the logits of a forward pass without gradients, cloned: a CUDA graph writes the next ones over them."""
    with torch.no_grad():
        found: Tensor = model(**batch, **options).logits
    return found.clone()


def _model(bench: Bench, name: str, dtype: str = "float32", **options: Any) -> Any:
    model = bench.model(name, dtype, layers=LAYERS, **options)
    vary_gains(model)
    return model


def _inputs(bench: Bench, name: str, rows: int = 4) -> dict[str, Tensor]:
    batch = make_batch(name, rows, bench.size(48, 6), bench.device)
    del batch["labels"]
    return batch


def _tuned(base: nn.Module, adapters: int = 1) -> Any:
    """Adapters with different random deltas."""
    model: Any = get_peft_model(base, LNTuningConfig(init_weights=False), adapter_name="a0")
    for number in range(1, adapters):
        model.add_adapter(f"a{number}", LNTuningConfig(init_weights=False))
    return model.eval()


@check("start", 0.0, "a new adapter changes no bit of the base model's logits (entries that differ)")
def start(bench: Bench) -> dict[str, float]:
    """Compare a fresh adapter with the base in every dtype."""
    errors = {}
    for name in ("llama-3.2-1b", "bert-large", "qwen3-0.6b"):
        for dtype in ("float32", "bfloat16", "float16"):
            model, batch = _model(bench, name, dtype), _inputs(bench, name)
            base = logits(model, batch)
            found = logits(get_peft_model(model, LNTuningConfig()).eval(), batch)
            errors[f"{name}, {dtype}"] = float((found != base).sum())
    return errors


@check("gradients", TOLERANCE["float32"], "gradients of deltas in float32 equal those of plain norms in float64")
def gradients(bench: Bench) -> dict[str, float]:
    """Compare the gradient of every delta with that of the norm's own parameter."""
    errors = {}
    for name in ("llama-3.2-1b", "bert-large"):
        plain = _model(bench, name)
        batch = make_batch(name, 4, bench.size(48, 6), bench.device)
        tuned: Any = get_peft_model(copy.deepcopy(plain), LNTuningConfig()).eval()
        tuned(**batch).loss.backward()
        found = [p for p in tuned.parameters() if p.requires_grad]
        wide = plain.double()
        wanted = list(tuned_norms(wide).values())
        wide(**batch).loss.backward()
        errors[name] = _worst(
            [relative(_gradient(own), _gradient(theirs)) for own, theirs in zip(found, wanted, strict=True)]
        )
    return errors


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise AssertionError("a norm has no gradient")
    return parameter.grad


def _worst(errors: list[float]) -> float:
    """Return the largest error, or NaN where one is NaN, which `max` may pass over."""
    return max(errors, key=lambda error: (error != error, error))


def _alone(model: Any, batch: dict[str, Tensor], names: list[str]) -> Tensor:
    """Each row with its adapter, in a batch in which all rows have it."""
    rows = []
    for row, name in enumerate(names):
        if name == BASE:
            with model.disable_adapter():
                rows.append(logits(model, batch)[row])
        else:
            model.set_adapter(name)
            rows.append(logits(model, batch)[row])
    return torch.stack(rows)


NAMES = ["a1", "a0", BASE, "a1"]


@check("mixed", TOLERANCE["float32"], "a row of a mixed batch equals the row of its adapter alone")
def mixed(bench: Bench) -> dict[str, float]:
    """Compare `adapter_names` with each adapter alone."""
    errors = {}
    for name in ("llama-3.2-1b", "bert-large"):
        model, batch = _tuned(_model(bench, name), adapters=2), _inputs(bench, name)
        errors[name] = relative(logits(model, batch, adapter_names=NAMES), _alone(model, batch, NAMES))
    return errors


@check("bank", TOLERANCE["float32"], "a row served by a bank equals the row of its adapter alone")
def bank(bench: Bench) -> dict[str, float]:
    """Compare an `AdapterBank` with each adapter alone."""
    errors = {}
    for name in ("llama-3.2-1b", "bert-large"):
        donor, served, batch = _tuned(_model(bench, name), adapters=2), _model(bench, name), _inputs(bench, name)
        adapters = AdapterBank(served)
        adapters.add_many({"a0": (donor, "a0"), "a1": (donor, "a1")})
        adapters.attach()
        with adapters.route(NAMES):
            found = logits(served, batch)
        errors[name] = relative(found, _alone(donor, batch, NAMES))
    return errors


@check("decoding", TOLERANCE["float32"], "every greedy token is a largest logit of the merged model (shortfall)")
def decoding(bench: Bench) -> dict[str, float]:
    """Compare generation by cache and adapter with one forward pass of a merged copy."""
    model, batch = _tuned(_model(bench, "llama-3.2-1b")), _inputs(bench, "llama-3.2-1b")
    new = bench.size(16, 4)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    sequences = model.generate(**batch, min_new_tokens=new, max_new_tokens=new, do_sample=False)
    length = batch["input_ids"].shape[1]
    found = logits(merged, {"input_ids": sequences})[:, length - 1 : -1]
    chosen = found.gather(-1, sequences[:, length:, None])[..., 0]
    return {"llama-3.2-1b": float(((found.amax(-1) - chosen) / found.abs().amax()).max())}


@check("fisher", TOLERANCE["float32"], "Fisher scores equal the squares of a loop over samples in float64")
def fisher(bench: Bench) -> dict[str, float]:
    """Compare the scores of all norms with one backward pass per sample."""
    errors = {}
    for name in ("llama-3.2-1b", "bert-large"):
        model = _model(bench, name)
        data = [make_batch(name, 3, bench.size(24, 6), bench.device)]
        found = fisher_scores(model, data, "empirical", progress=False)
        wide = copy.deepcopy(model).double()
        wanted = loop(wide, tuned_norms(wide), data)
        errors[name] = _worst([relative(found[key], value) for key, value in wanted.items()])
    return errors


@check("compiled", TOLERANCE["float32"], "a compiled model, and a compiled bank with other rows, equal the eager one")
def compiled(bench: Bench) -> dict[str, float]:
    """Compare compiled and eager logits before and after a change of delta and of route."""
    batch, errors = _inputs(bench, "llama-3.2-1b"), {}
    model = _tuned(_model(bench, "llama-3.2-1b"))
    graph = torch.compile(model, **bench.compiler)
    errors["adapter"] = relative(logits(graph, batch), logits(model, batch))
    for delta in (p for p in model.parameters() if p.requires_grad):
        delta.data.add_(0.25)
    errors["adapter, changed"] = relative(logits(graph, batch), logits(model, batch))
    donor, served = _tuned(_model(bench, "llama-3.2-1b"), adapters=2), _model(bench, "llama-3.2-1b")
    adapters = AdapterBank(served)
    adapters.add_many({"a0": (donor, "a0"), "a1": (donor, "a1")})
    adapters.attach()
    graph = torch.compile(served, **bench.compiler)
    for names in (NAMES, NAMES[::-1]):
        with adapters.route(names):
            eager = logits(served, batch)  # first: where the samples are is measured outside of graphs
            errors[f"bank, {' '.join(names)}"] = relative(logits(graph, batch), eager)
    return errors


@check("prefix", TOLERANCE["bfloat16"], "prefixes by fused attention in bfloat16 equal eager attention in float32")
def prefix(bench: Bench) -> dict[str, float]:
    """Compare the default kernels with attention written out."""
    batch, errors = _inputs(bench, "llama-3.2-1b"), {}
    torch.manual_seed(0)
    tuned: Any = get_peft_model(
        _model(bench, "llama-3.2-1b", "bfloat16"), PrefixConfig(num_virtual_tokens=4, init_weights=False)
    ).eval()
    found = logits(tuned, batch)
    wide = copy.deepcopy(tuned).float()
    wide.base_model.model.set_attn_implementation("eager")
    errors["sdpa"] = relative(found, logits(wide, batch))
    with tuned.disable_adapter():
        changed = relative(logits(tuned, batch), found)
    if not changed > 0:
        raise AssertionError("the prefix changes nothing, so that the comparison says nothing")
    return errors


@check("norms", 0.0, "every norm of the shapes is found (norms missed)")
def norms(bench: Bench) -> dict[str, float]:
    """Count the norms that are not found: two per layer and one at an end, four per layer in Qwen 3."""
    errors = {}
    for name, per_layer in (("llama-3.2-1b", 2), ("bert-large", 2), ("qwen3-0.6b", 4)):
        layers = 2
        errors[name] = float(per_layer * layers + 1 - len(find_norms(_model(bench, name))))
    return errors
