"""What does it cost to serve very many adapters from a bank? Run it when nothing else runs.

python -m benchmarks.costs.serving
"""

import gc
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from benchmarks.costs.serving_report import write_report
from benchmarks.harness.arms import find_arm
from benchmarks.harness.costs import in_turns
from benchmarks.harness.counting import count_operations
from benchmarks.harness.made import made_inputs
from benchmarks.harness.mixed import mixed_call
from benchmarks.harness.models import load_body
from benchmarks.harness.rows import Cell, Row
from benchmarks.harness.runner import run_timed, stamp
from benchmarks.harness.timing import Call
from peft_lntune import AdapterBank, LNTuningConfig
from peft_lntune.storage.adapter_file import WEIGHTS_FILE

PROTOCOLS: dict[str, dict[str, Any]] = {
    "cpu": {"rounds": 20, "batch": 64, "tokens": 32, "short": 1, "sizes": (10, 100, 1000, 10_000), "loaded": 30},
    "gpu": {"rounds": 50, "batch": 64, "tokens": 128, "short": 1, "sizes": (10, 100, 1000, 10_000), "loaded": 30},
}
DISTINCT = (1, 8, 32, 64)
MANY, MIXED = 64, 32  # distinct adapters in a batch: against the base model, and against PEFT's mixed batches


def cells(protocol: str) -> list[Cell]:
    """Return what is measured, each in one go."""
    measures = ("operations", "time", "mixed", "switching", "loading", "memory")
    return [{"protocol": protocol, "model": "minilm", "measure": measure} for measure in measures]


def run_cell(cell: Cell, checkpoint: str, device: torch.device) -> Row:
    """Measure one cell."""
    measure = {
        "operations": _operations,
        "time": _time,
        "mixed": _mixed,
        "switching": _switching,
        "loading": _loading,
        "memory": _memory,
    }[cell["measure"]]
    protocol = PROTOCOLS[cell["protocol"]]
    return {**measure(protocol, checkpoint, device), "rounds": protocol["rounds"], **stamp(device)}


def _operations(protocol: dict[str, Any], checkpoint: str, device: torch.device) -> Row:
    """Dispatched operations, of a bank of few and of many adapters, for few and many of them in a batch."""
    model, inputs = load_body(checkpoint).to(device), made_inputs(protocol["batch"], protocol["tokens"], device)
    base = count_operations(torch.no_grad()(lambda: model(**inputs)))
    found: dict[str, dict[int, int]] = {}
    for size in (protocol["sizes"][0], protocol["sizes"][-1]):
        bank = filled(model, checkpoint, size)
        counts = {}
        for distinct in DISTINCT:
            call = routed(bank, model, inputs, [names_of(bank, protocol["batch"], distinct)])
            call()  # the base model's rows are kept
            counts[distinct] = count_operations(call)
        found[str(size)] = counts
        bank.detach()
    return {"base": base, "operations": found}


def _time(protocol: dict[str, Any], checkpoint: str, device: torch.device) -> Row:
    """A batch of many adapters against the base model, which runs twice."""
    plain, served = load_body(checkpoint).to(device), load_body(checkpoint).to(device)
    inputs = made_inputs(protocol["batch"], protocol["tokens"], device)
    bank = filled(served, checkpoint, protocol["sizes"][-1])
    base = torch.no_grad()(lambda: plain(**inputs))
    batches = fresh(bank, protocol, MANY)
    arms = in_turns(
        {"base": base, "base again": base, "bank": routed(bank, served, inputs, batches)}, protocol["rounds"], device
    )
    return {"arms": arms}


def _mixed(protocol: dict[str, Any], checkpoint: str, device: torch.device) -> Row:
    """The same batch by the bank and by PEFT's `adapter_names`: rows of one token, as in generating, and long ones."""
    served = load_body(checkpoint).to(device)
    bank = filled(served, checkpoint, protocol["sizes"][-1])
    batches = fresh(bank, protocol, MIXED)
    peers = {arm: find_arm(arm).tune(load_body(checkpoint)).to(device) for arm in ("ln", "lora", "road")}
    found = {}
    for tokens in (protocol["short"], protocol["tokens"]):
        inputs = made_inputs(protocol["batch"], tokens, device)
        ours = routed(bank, served, inputs, batches)
        calls: dict[str, Call] = {"bank": ours, "bank again": ours}
        calls |= {arm: mixed_call(model, MIXED, inputs) for arm, model in peers.items()}
        timed = in_turns(calls, protocol["rounds"], device)  # first: a first call keeps rows for later ones
        found[str(tokens)] = {name: {**arm, "operations": count_operations(calls[name])} for name, arm in timed.items()}
    return {"by_tokens": found}


def _switching(protocol: dict[str, Any], checkpoint: str, device: torch.device) -> Row:
    """Entering a route with other adapters than before, and a whole forward pass in it, by the size of the bank."""
    inputs = made_inputs(protocol["batch"], protocol["tokens"], device)
    entering: dict[str, Call] = {}
    whole: dict[str, Call] = {}
    for size in protocol["sizes"]:
        model = load_body(checkpoint).to(device)
        bank = filled(model, checkpoint, size)
        batches = fresh(bank, protocol, protocol["sizes"][0])  # as many distinct ones, whatever the size
        entering[str(size)] = routed(bank, None, inputs, batches)
        whole[str(size)] = routed(bank, model, inputs, batches)
    rounds = protocol["rounds"]
    return {"entering": in_turns(entering, 10 * rounds, device), "whole": in_turns(whole, rounds, device)}


def _loading(protocol: dict[str, Any], checkpoint: str, device: torch.device) -> Row:
    """Adapters a second: all of a bank file, directories into a bank, directories into a PeftModel."""
    model, size, few = load_body(checkpoint).to(device), protocol["sizes"][-1], protocol["loaded"]
    with tempfile.TemporaryDirectory() as temporary:
        file, folder = Path(temporary, "bank.safetensors"), Path(temporary, "adapter")
        bank = filled(model, checkpoint, size)
        bank.save(file)
        bank.detach()
        tuned(checkpoint).save_pretrained(str(folder))
        peft_model: Any = get_peft_model(load_body(checkpoint).to(device), LNTuningConfig())

        def open_all() -> None:
            AdapterBank.open(file, model).load()

        def add_all() -> None:
            AdapterBank(model).add_many({str(number): folder for number in range(few)})

        def load_all() -> None:
            for number in range(few):
                peft_model.load_adapter(str(folder), str(number))

        seconds = {
            "bank file": _seconds(open_all),
            "directories": _seconds(add_all),
            "load_adapter": _seconds(load_all),
        }
    counts = {"bank file": size, "directories": few, "load_adapter": few}
    return {"adapters": counts, "a_second": {name: round(counts[name] / seconds[name], 1) for name in counts}}


def _memory(protocol: dict[str, Any], checkpoint: str, device: torch.device) -> Row:
    """Memory of an adapter in the bank, against its file; of the process, and as the tensors have it."""
    model, size = load_body(checkpoint).to(device), protocol["sizes"][-1]
    source = tuned(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        source.save_pretrained(folder)
        file_size = Path(folder, WEIGHTS_FILE).stat().st_size
    before = _resident(device)
    bank = filled(model, checkpoint, size, source)
    grown = _resident(device) - before
    return {"adapters": size, "row_bytes": bank.row_bytes, "file_size": file_size, "measured_bytes": grown}


def tuned(checkpoint: str) -> PeftModel:
    """An adapter of all norms with random deltas."""
    torch.manual_seed(0)
    return get_peft_model(load_body(checkpoint), LNTuningConfig(init_weights=False)).eval()


def filled(model: Any, checkpoint: str, size: int, source: PeftModel | None = None) -> AdapterBank:
    """A bank of so many adapters, attached. What they hold changes no cost, so all hold the same."""
    bank = AdapterBank(model, capacity=size)
    one = tuned(checkpoint) if source is None else source
    bank.add_many({f"tenant{number}": (one, "default") for number in range(size)})
    bank.attach()
    return bank


def routed(
    bank: AdapterBank, model: Any, inputs: dict[str, Tensor], batches: Sequence[list[str]]
) -> Callable[[], object]:
    """Return a forward pass in a route that is entered with the next names; without a model, the route alone."""
    state = {"call": 0}

    @torch.no_grad()
    def call() -> None:
        names = batches[state["call"] % len(batches)]
        state["call"] += 1
        with bank.route(names):
            if model is not None:
                model(**inputs)

    return call


def names_of(bank: AdapterBank, rows: int, distinct: int) -> list[str]:
    """The first adapters of a bank, in turn."""
    names = bank.names[:distinct]
    return [names[row % len(names)] for row in range(rows)]


def fresh(bank: AdapterBank, protocol: dict[str, Any], distinct: int) -> list[list[str]]:
    """Names for many batches, each of so many adapters from all over the bank."""
    chance, names = random.Random(0), bank.names
    batches = []
    for _ in range(200):
        chosen = chance.sample(names, min(distinct, len(names)))
        batches.append([chosen[row % len(chosen)] for row in range(protocol["batch"])])
    return batches


def _seconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _resident(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    description = "Operations, time, loading and memory of a bank of many adapters, against the base model and PEFT."
    return run_timed("serving", description, tuple(PROTOCOLS), cells, run_cell, write_report, 10, arguments)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
