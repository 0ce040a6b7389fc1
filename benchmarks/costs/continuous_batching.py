"""What does it cost to serve many adapters by continuous batching? Run it when nothing else runs.

python -m benchmarks.costs.continuous_batching --model DIR_OR_HUB_ID
"""

import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.harness.claims import claim, time_claim
from benchmarks.harness.counting import count_operations
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import run_timed, stamp
from benchmarks.harness.tables import NOT_RUN, markdown
from benchmarks.harness.timing import summary, take_turns
from peft_lntune import AdapterBank, LNTuningConfig

MODEL = "HuggingFaceTB/SmolLM2-135M"
PROTOCOLS: dict[str, dict[str, Any]] = {
    "cpu": {"rounds": 10, "tenants": 64, "prompt": (2, 6), "new": 5},
    "gpu": {"rounds": 20, "tenants": 64, "prompt": (64, 256), "new": 128},
}
COUNTED = (1, 8, 64)
THROUGHPUT = 0.95  # of the base engine's, wanted before it was measured
SPREAD = 0.1  # standard deviation of the random deltas


def cells(protocol: str) -> list[Cell]:
    """Return what is measured, each in one go."""
    return [{"protocol": protocol, "measure": measure} for measure in ("time", "operations", "tokens")]


def run_cell(cell: Cell, checkpoint: str, device: torch.device) -> Row:
    """Measure one cell."""
    measure = {"tokens": _tokens, "operations": _operations, "time": _time}[cell["measure"]]
    protocol = PROTOCOLS[cell["protocol"]]
    return {**measure(protocol, checkpoint, device), **protocol, **stamp(device)}


def _tokens(protocol: dict[str, Any], checkpoint: str, device: torch.device) -> Row:
    """Greedy tokens of one batch of all tenants, against single runs of `generate` with each adapter."""
    model = load(checkpoint, device)
    prompts = prompts_of(model, protocol)
    options = {"generation_config": generation(protocol), "continuous_batching_config": engine(protocol)}
    base = model.generate_batch(prompts, **options)
    bank = filled(model, protocol["tenants"])
    with bank.route(bank.names):
        outputs = model.generate_batch(prompts, **options)
    single = GenerationConfig(max_new_tokens=protocol["new"], do_sample=False, pad_token_id=0)
    single.eos_token_id = None
    equal, other = 0, 0
    for name, prompt, output, plain in zip(bank.names, prompts, outputs.values(), base.values(), strict=True):
        ids = torch.tensor([prompt], device=device)
        with bank.route(name), torch.no_grad():
            alone = model.generate(input_ids=ids, generation_config=single)[0, len(prompt) :].tolist()
        equal += output.generated_tokens == alone
        other += alone != plain.generated_tokens
    return {"equal": equal, "other_than_base": other}


def _operations(protocol: dict[str, Any], checkpoint: str, device: torch.device) -> Row:
    """Dispatched operations of the first step (prompts) and of a later one (a token each), by distinct adapters."""
    model = load(checkpoint, device)
    prompts = prompts_of(model, protocol)
    found: dict[str, list[int]] = {"base": _steps(model, protocol, prompts, [None] * len(prompts))}
    bank = filled(model, protocol["tenants"])
    _steps(model, protocol, prompts, bank.names)  # the place of the tokens is measured once
    for count in COUNTED:
        names = [bank.names[place % count] for place in range(len(prompts))]
        found[str(count)] = _steps(model, protocol, prompts, names)
    return {"operations": found}


def _steps(
    model: Any, protocol: dict[str, Any], prompts: Sequence[list[int]], names: Sequence[str | None]
) -> list[int]:
    manager = model.init_continuous_batching(
        generation_config=generation(protocol), continuous_batching_config=engine(protocol)
    )
    manager.warmup()  # makes the processor of batches
    for prompt, name in zip(prompts, names, strict=True):
        manager.add_request(prompt, **({} if name is None else {"adapter": name}))
    counts = []
    for _ in range(2):
        manager.batch_processor.prepare_next_batch()
        counts.append(count_operations(manager._generation_step))
        manager.batch_processor.update_batch()
    manager.destroy()
    return counts


def _time(protocol: dict[str, Any], checkpoint: str, device: torch.device) -> Row:
    """All requests from first to last token, by the engine of the base model, which runs twice, and of a bank."""
    plain, served = load(checkpoint, device), load(checkpoint, device)
    bank, prompts = filled(served, protocol["tenants"]), prompts_of(plain, protocol)
    managers = [
        model.init_continuous_batching(
            generation_config=generation(protocol), continuous_batching_config=engine(protocol)
        )
        for model in (plain, served)
    ]
    for manager in managers:
        manager.start()
    base, ours = (
        requests(manager, prompts, options)
        for manager, options in zip(managers, ({}, {"adapters": bank.names}), strict=True)
    )
    try:
        calls = {"base": _Counted(base), "base again": _Counted(base), "bank": _Counted(ours)}
        arms = summary(take_turns(calls, protocol["rounds"], device, warm_up=1), "base")
        processor = summary({name: call.seconds[1:] for name, call in calls.items()}, "base")
    finally:
        for manager in managers:
            manager.stop()
            manager.destroy()
    for name, arm in arms.items():
        arm["processor"] = processor[name]
    tokens = protocol["new"] * len(prompts)
    return {
        "arms": arms,
        "tokens_per_second": {name: round(tokens / arm["seconds"][1], 1) for name, arm in arms.items()},
    }


class _Counted:
    """Counts the processor's seconds of each call, in all threads; on a shared machine, steadier than a clock."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call, self.seconds = call, list[float]()

    def __call__(self) -> None:
        begin = time.process_time()
        self.call()
        self.seconds.append(time.process_time() - begin)


def requests(manager: Any, prompts: Sequence[list[int]], options: dict[str, Any]) -> Callable[[], object]:
    """Return a call that adds all requests to a running engine and waits for their results."""

    def call() -> None:
        left = set(manager.add_requests(list(prompts), **options))
        while left:
            output = manager.get_result(timeout=600)
            if output is None or output.error is not None:
                raise RuntimeError(f"the engine failed: {output}")
            left.discard(output.request_id)

    return call


def load(checkpoint: str, device: torch.device) -> Any:
    """The model in float32 and evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval().requires_grad_(False).to(device)


def filled(model: Any, tenants: int) -> AdapterBank:
    """A bank of so many adapters with different random deltas, attached."""
    tuned: Any = get_peft_model(model, LNTuningConfig())
    deltas = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {f"tenant{number}": Path(temporary, str(number)) for number in range(tenants)}
        for folder in folders.values():
            with torch.no_grad():
                for delta in deltas:
                    delta.copy_(SPREAD * torch.randn(delta.shape, generator=generator))
            tuned.save_pretrained(str(folder))
        bank = AdapterBank(tuned.unload(), capacity=tenants)
        bank.add_many(folders)
    bank.attach()
    return bank


def prompts_of(model: Any, protocol: dict[str, Any]) -> list[list[int]]:
    """A prompt of random tokens for each tenant."""
    chance, vocabulary = random.Random(0), model.config.vocab_size
    return [
        [chance.randrange(1, vocabulary) for _ in range(chance.randint(*protocol["prompt"]))]
        for _ in range(protocol["tenants"])
    ]


def generation(protocol: dict[str, Any]) -> GenerationConfig:
    """Greedy, to the full length."""
    return GenerationConfig(max_new_tokens=protocol["new"], do_sample=False, eos_token_id=-1, pad_token_id=0)


def engine(protocol: dict[str, Any]) -> ContinuousBatchingConfig:
    """Room for all requests in one step; no CUDA graphs in either arm."""
    longest = protocol["prompt"][1]
    blocks = -(-(longest + protocol["new"]) // 32) + 1
    return ContinuousBatchingConfig(
        page_size=32,
        num_blocks=2 * blocks * protocol["tenants"],
        max_batch_tokens=longest * protocol["tenants"],
        use_cuda_graph=False,
    )


def write_report(rows: Rows, results: Path, planned: Sequence[Cell], protocol: str) -> None:
    """Write `continuous_batching.md`, for another protocol than the CPU's with its name in it."""
    size = PROTOCOLS[protocol]
    low, high = size["prompt"]
    parts = [
        "# Continuous batching with many adapters",
        f"SmolLM2-135M, float32, {size['tenants']} requests with an adapter each, prompts of {low} to {high} tokens, "
        f"{size['new']} new tokens. Arms are timed in turns; ratios are taken within a round, to the engine without a "
        "bank. The arm named `again` is the first one a second time: how far its ratio is from 1 is noise.",
    ]
    titles: dict[str, tuple[str, Callable[[Row], list[str]]]] = {
        "tokens": ("Tokens", _said_tokens),
        "operations": ("Dispatched operations", _said_operations),
        "time": ("Time", _said_time),
    }
    for cell in planned:
        title, write = titles[cell["measure"]]
        row = rows.get(cell)
        parts += [f"## {title}", *([NOT_RUN] if row is None else write(row))]
    results.mkdir(parents=True, exist_ok=True)
    stem = "continuous_batching" if protocol == "cpu" else f"continuous_batching_{protocol}"
    (results / f"{stem}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _said_tokens(row: Row) -> list[str]:
    tenants, other = row["tenants"], row["other_than_base"]
    wanted = "the tokens of each request equal those of a single run with its adapter"
    return [
        claim(wanted, f"{row['equal']} of {tenants}", row["equal"] == tenants),
        f"{other} of the {tenants} single runs differ from the base model's.",
    ]


def _said_operations(row: Row) -> list[str]:
    counts = row["operations"]
    base = counts["base"]
    lines = [
        [
            name if name == "base" else f"{name} adapters",
            *(f"{c:,} ({c / b:.3f})" for c, b in zip(own, base, strict=True)),
        ]
        for name, own in counts.items()
    ]
    alike = len({tuple(own) for name, own in counts.items() if name != "base"}) == 1
    header = ("in the batch", "step of prompts (of the base's)", "step of one token each")
    return [
        markdown(header, lines),
        claim("the same number for any number of adapters", "the same" if alike else "not the same", alike),
    ]


def _said_time(row: Row) -> list[str]:
    ours, noise = row["arms"]["bank"]["ratio"], row["arms"]["base again"]["ratio"]
    lines = [
        [
            name,
            f"{row['tokens_per_second'][name]:,.1f}",
            _quartiles(arm["ratio"]),
            _quartiles(arm["processor"]["ratio"]),
        ]
        for name, arm in row["arms"].items()
    ]
    header = (
        "arm",
        "tokens per second",
        "time, ratio: median (quartiles)",
        "processor time, ratio: median (quartiles)",
    )
    table = markdown(header, lines)
    wanted = f"at least {THROUGHPUT:.2f} of the base engine's throughput, so at most {1 / THROUGHPUT:.3f} of its time"
    return [table, time_claim(wanted, ours, noise, 1 / THROUGHPUT)]


def _quartiles(values: Sequence[float]) -> str:
    low, middle, high = values
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    description = "Tokens, operations and time of transformers' continuous batching with an adapter per request."
    return run_timed(
        "continuous_batching",
        description,
        tuple(PROTOCOLS),
        cells,
        run_cell,
        write_report,
        10,
        arguments,
        default=lambda: MODEL,
    )


if __name__ == "__main__":
    sys.exit(min(main(), 1))
