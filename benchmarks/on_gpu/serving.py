"""Serving: greedy decoding, mixed batches and banks of 1, 32 and 256 tenants, eager and compiled."""

from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from benchmarks.harness.arms import find_arm
from benchmarks.harness.costs import in_turns
from benchmarks.harness.made import made_inputs
from benchmarks.harness.mixed import add_copies, mixed_call
from benchmarks.harness.rows import Cell, Row
from benchmarks.harness.timing import Call
from benchmarks.on_gpu.bench import Bench
from benchmarks.on_gpu.shapes import shape_of
from peft_lntune import AdapterBank, LNTuningConfig

MODEL = "llama-3.2-1b"
DECODED = ("base", "base again", "ln", "stock-ln", "lora", "road")
COMPILED = ("base", "base again", "ln", "lora")
COMPILED_LAYERS = 8  # compiling all sixteen, once per arm, would take a third of the time


def decoding(cell: Cell, bench: Bench) -> Row:
    """Time greedy generation of all arms in turns; compiled, with a static cache, as transformers compiles it."""
    compiled = cell["mode"] == "compiled"
    rows, prompt, new = bench.size((8, 64, 32), (2, 4, 3))
    layers = COMPILED_LAYERS if compiled else None
    options: dict[str, Any] = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
    if compiled:
        from transformers import CompileConfig

        settings = {"mode": "default", "fullgraph": False, **bench.compiler}
        options |= {"cache_implementation": "static", "compile_config": CompileConfig(**settings)}
    calls: dict[str, Call] = {}
    for arm in COMPILED if compiled else DECODED:
        model: Any = bench.model(MODEL, "bfloat16", layers=layers)
        kind = arm.removesuffix(" again")
        model = (model if kind == "base" else find_arm(kind).tune(model)).to(bench.device).eval()
        if compiled and bench.device.type != "cuda":
            options["compile_config"]._compile_all_devices = True
        calls[arm] = partial(model.generate, **made_inputs(rows, prompt, bench.device), **options)
    arms = in_turns(calls, bench.rounds, bench.device, box=0.6 * bench.box, warm_up=2)
    return {"arms": arms, "rows": rows, "prompt": prompt, "new_tokens": new, "layers": _layers(bench, layers)}


def tenants(cell: Cell, bench: Bench) -> Row:
    """Time rows of one token, as in decoding, each row with one of so many adapters."""
    rows = bench.size(256, 8)
    count = min(cell["tenants"], rows)
    inputs = made_inputs(rows, 1, bench.device)
    plain = bench.keep("base", lambda: bench.model(MODEL, "bfloat16"))
    base = torch.no_grad()(lambda: plain(**inputs))
    served, bank = bench.keep("bank", lambda: filled(bench, bench.size(256, 8)))
    calls: dict[str, Call] = {"base": base, "base again": base, "bank": routed(bank, served, inputs, count)}
    for arm in ("ln", "lora"):
        peer = bench.keep(arm, partial(_tuned, bench, arm))
        calls[arm] = _mixed(peer, count, inputs)
    arms = in_turns(calls, bench.rounds, bench.device, box=0.5 * bench.box, warm_up=2)
    return {"arms": arms, "rows": rows, "tokens": 1, "distinct": count, "bank": len(bank.names)}


def compiled_tenants(cell: Cell, bench: Bench) -> Row:
    """Time the same rows, eager and compiled, by base and bank, and by PEFT's LoRA where its graph can be compiled."""
    rows = bench.size(256, 8)
    count = min(cell["tenants"], rows)
    inputs = made_inputs(rows, 1, bench.device)
    plain = bench.keep("base", lambda: bench.model(MODEL, "bfloat16", layers=COMPILED_LAYERS))
    served, bank = bench.keep("bank", lambda: filled(bench, bench.size(256, 8), COMPILED_LAYERS))
    routed(bank, served, inputs, count)()  # where the samples are is measured outside of graphs
    graph = bench.keep("base graph", lambda: torch.compile(plain, **bench.compiler))
    bank_graph = bench.keep("bank graph", lambda: torch.compile(served, **bench.compiler))
    base = torch.no_grad()(lambda: graph(**inputs))
    calls: dict[str, Call] = {
        "base, compiled": base,
        "base, compiled, again": base,
        "bank, compiled": routed(bank, bank_graph, inputs, count),
        "base, eager": torch.no_grad()(lambda: plain(**inputs)),
        "bank, eager": routed(bank, served, inputs, count),
    }
    if cell["arm"] == "lora":
        peer = _tuned(bench, "lora", COMPILED_LAYERS)
        calls["lora, eager"] = _mixed(peer, count, inputs)
        calls["lora, compiled"] = mixed_call(_Compiled(peer, bench.compiler), count, inputs)
    arms = in_turns(calls, bench.rounds, bench.device, box=0.5 * bench.box, warm_up=3)
    return {
        "arms": arms,
        "rows": rows,
        "tokens": 1,
        "distinct": count,
        "bank": len(bank.names),
        "layers": _layers(bench, COMPILED_LAYERS),
    }


def _tuned(bench: Bench, arm: str, layers: int | None = None) -> Any:
    return find_arm(arm).tune(bench.model(MODEL, "bfloat16", layers=layers)).to(bench.device)


def _mixed(peer: Any, count: int, inputs: dict[str, Tensor]) -> Call:
    add_copies(peer, [f"tenant{number}" for number in range(count)])  # the names that `mixed_call` uses
    return mixed_call(peer, count, inputs)


class _Compiled:
    """A PeftModel whose forward pass is compiled, with what `mixed_call` asks of a model."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self.peft_config, self.eval = model.peft_config, model.eval
        self._graph = torch.compile(model, **options)

    def __call__(self, **inputs: Any) -> object:
        return self._graph(**inputs)


def filled(bench: Bench, size: int, layers: int | None = None) -> tuple[Any, AdapterBank]:
    """Return a model and its attached bank of so many adapters; what they hold changes no cost."""
    torch.manual_seed(0)
    donor: Any = get_peft_model(bench.model(MODEL, "bfloat16", layers=layers), LNTuningConfig(init_weights=False))
    served = bench.model(MODEL, "bfloat16", layers=layers)
    bank = AdapterBank(served, capacity=size)
    bank.add_many({f"tenant{number}": (donor.eval(), "default") for number in range(size)})
    bank.attach()
    return served, bank


def routed(bank: AdapterBank, model: Any, inputs: dict[str, Tensor], count: int) -> Call:
    """Return a forward pass inside a route of so many distinct adapters, the route's entry included."""
    chosen = bank.names[:count]
    names = [chosen[row % len(chosen)] for row in range(len(inputs["input_ids"]))]

    @torch.no_grad()
    def call() -> None:
        with bank.route(names):
            model(**inputs)

    return call


def _layers(bench: Bench, layers: int | None) -> int:
    return int(shape_of(MODEL, bench.small, layers).num_hidden_layers)
