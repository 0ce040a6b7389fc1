"""What tuning the norms repairs of a quantized or pruned language model, beside LoRA for equal time.

python -m benchmarks.costs.recover --model <folder of SmolLM2-135M> --data-dir <folder>
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.damage import damage
from benchmarks.harness.environment import write_environment
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import base_parser, format_seconds, run_cells, stamp, start_process
from peft_lntune.recover import distill, quality, recovery_config

NAME = "recover"
LENGTH = 128  # tokens of a row
BATCH = 2  # rows
STEPS = 40
HELD_OUT = 24  # rows of each domain
CALIBRATION = 16  # rows of the closed form
SEEDS = (0, 1, 2)
RATE = {"norms": 3e-3, "closed+norms": 3e-3, "lora": 3e-3}
OTHER_RATES = {"lora": (1e-3,), "norms": (1e-2,)}  # tried on the damage searched at, seed 0
SEARCHED_AT = "round-3"
OTHERS = ("prune-50", "round-4", "hqq-3", "round-2")
MORE = ("hqq-2", "hqq-4")
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
DOMAINS = {"gsm8k": ("question", "answer"), "tinyshakespeare": ("text",)}  # the first is what is trained on
LAST = 0.25  # share of the steps whose divergence chooses a rate

ARMS = {
    "none": "nothing",
    "closed": "gains by least squares, one pass",
    "norms": "norms",
    "closed+norms": "gains by least squares, then norms",
    "lora": "LoRA, equal time",
}
WORDS = {
    "undamaged": "undamaged",
    "round-4": "4 bits, rounded",
    "round-3": "3 bits, rounded",
    "round-2": "2 bits, rounded",
    "hqq-4": "4 bits, HQQ",
    "hqq-3": "3 bits, HQQ",
    "hqq-2": "2 bits, HQQ",
    "prune-50": "50 % pruned",
}


def cell_of(damaged: str, arm: str, seed: int = 0, rate: float | None = None) -> Cell:
    """Return the coordinates of a run."""
    found = {"protocol": "cpu", "damage": damaged, "arm": arm, "seed": seed}
    return found if arm in ("none", "closed") else {**found, "learning_rate": RATE[arm] if rate is None else rate}


def cells() -> list[Cell]:
    """Return all runs, most informative first."""
    first = [cell_of("undamaged", "none")]
    first += [cell_of(SEARCHED_AT, arm) for arm in ("none", "norms", "closed", "closed+norms", "lora")]
    first += [cell_of(damaged, arm) for damaged in OTHERS for arm in ("none", "norms")]
    first += [cell_of(SEARCHED_AT, arm, rate=rate) for arm, rates in OTHER_RATES.items() for rate in rates]
    first += [cell_of(damaged, "lora") for damaged in OTHERS]
    for seed in SEEDS[1:]:
        first += [cell_of(damaged, arm, seed) for damaged in (SEARCHED_AT, *OTHERS) for arm in ("norms", "lora")]
    first += [cell_of(damaged, arm) for damaged in MORE for arm in ("none", "norms", "lora")]
    return first


def text_rows(tokenizer: Any, texts: Sequence[str], length: int = LENGTH) -> Tensor:
    """Return texts as one stream of tokens, cut into rows `(rows, length)`; what is left over is dropped."""
    stream = torch.tensor([token for ids in tokenizer([f"{text}\n\n" for text in texts])["input_ids"] for token in ids])
    return stream[: len(stream) // length * length].view(-1, length)


def read_texts(data_dir: Path, domain: str, part: str) -> list[str]:
    """Return the texts of one file, columns joined by a line break."""
    lines = (data_dir / domain / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return ["\n".join(row[column] for column in DOMAINS[domain]) for row in map(json.loads, lines)]


class Bench:
    """The model, the texts, and what the teacher says to them, made once per process.

    Args:
        model: folder of the model.
        data_dir: folder of the data.
        steps: batches to train on.
        held_out: rows of each domain to measure on.
    """

    def __init__(self, model: str, data_dir: Path, steps: int = STEPS, held_out: int = HELD_OUT) -> None:
        from transformers import AutoTokenizer

        self.folder, self.steps = model, steps
        tokenizer = AutoTokenizer.from_pretrained(model)
        tuned = next(iter(DOMAINS))
        self.train = text_rows(tokenizer, read_texts(data_dir, tuned, "train"))
        self.held_out = {
            domain: self._batches(text_rows(tokenizer, read_texts(data_dir, domain, "validation"))[:held_out])
            for domain in DOMAINS
        }
        self.teacher = self.load()
        self._hidden: dict[int, Tensor] = {}  # the last hidden states of the teacher, by the identity of the batch
        self._of_seed: dict[int, list[dict[str, Tensor]]] = {}

    def load(self) -> nn.Module:
        """Load the undamaged model."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval().requires_grad_(False)

    def batches(self, seed: int) -> list[dict[str, Tensor]]:
        """Return the batches of a seed, the same for every arm and damage."""
        if seed not in self._of_seed:
            order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
            self._of_seed[seed] = self._batches(self.train[order[: self.steps * BATCH]])
        return self._of_seed[seed]

    def calibration(self) -> dict[str, Tensor]:
        """Return the rows of the closed form, which no batch has."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(len(self.train)))
        return {"input_ids": self.train[order[:CALIBRATION]]}

    def known(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the teacher's logits; of its body, which takes most of the time, the answer is kept."""
        with torch.no_grad():
            if id(batch) not in self._hidden:
                body: Any = self.teacher.base_model
                self._hidden[id(batch)] = body(**batch).last_hidden_state
            head: Any = self.teacher.get_output_embeddings()  # type: ignore[operator]
            logits: Tensor = head(self._hidden[id(batch)])
            return logits

    def measure(self, model: nn.Module) -> Row:
        """Return perplexity and divergence on each domain."""
        found = {domain: quality(model, self.known, batches) for domain, batches in self.held_out.items()}
        return {
            domain: {name: round(value, 6) for name, value in one._asdict().items()} for domain, one in found.items()
        }

    def _batches(self, rows: Tensor) -> list[dict[str, Tensor]]:
        return [{"input_ids": chosen} for chosen in rows.split(BATCH)]


@cache
def bench(model: str, data_dir: Path, steps: int, held_out: int) -> Bench:
    """Return the model and texts of this process."""
    return Bench(model, data_dir, steps, held_out)


def norms(bench: Bench, model: nn.Module) -> nn.Module:
    """Put an adapter of all norms on a model."""
    from peft import get_peft_model

    return get_peft_model(model, recovery_config(model))  # type: ignore[arg-type]


def closed(bench: Bench, model: nn.Module) -> nn.Module:
    """Put an adapter of all norms on a model, with gains by least squares."""
    from peft_lntune.recover.closed_form import closed_form

    deltas = closed_form(model, bench.teacher, bench.calibration())
    adapted = norms(bench, model)
    places = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, delta in deltas.items():
            places[f"base_model.model.{name}.lntune_weight.default.weight"].copy_(delta)
    return adapted


def lora(bench: Bench, model: nn.Module) -> nn.Module:
    """Put LoRA on all linear maps of a model but its head."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))  # type: ignore[arg-type]


PREPARE: dict[str, Callable[[Bench, nn.Module], nn.Module]] = {
    "none": lambda bench, model: model,
    "closed": closed,
    "norms": norms,
    "closed+norms": closed,
    "lora": lora,
}

ROUNDS = 3  # of the comparison of steps


def step_ratio(bench: Bench) -> float:
    """Return the processor time of a step of LoRA, relative to a step of norms; the two take turns."""
    models = {name: PREPARE[name](bench, bench.load()) for name in ("norms", "lora")}
    batch = bench.batches(0)[:1]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(ROUNDS + 1):
        for name, model in models.items():
            begin = time.process_time()
            distill(model, bench.known, batch, steps=1)
            if turn:  # the first warms up, and computes what the teacher says
                seconds[name].append(time.process_time() - begin)
    return statistics.median(other / own for own, other in zip(seconds["norms"], seconds["lora"], strict=True))


@cache
def ratio_of(model: str, data_dir: Path, steps: int, held_out: int) -> float:
    """Return `step_ratio`, measured once per process."""
    return step_ratio(bench(model, data_dir, steps, held_out))


def run_cell(cell: Cell, model: str, data_dir: Path, steps: int = STEPS, held_out: int = HELD_OUT) -> Row:
    """Damage, repair and measure.

    Returns:
        Perplexity and divergence on both domains, the divergence of the batches before each step, steps, processor
        seconds (the teacher's are not counted: its answers are kept), and how many entries are tuned.
    """
    made = bench(model, data_dir, steps, held_out)
    damaged = made.load()
    if cell["damage"] != "undamaged":
        damage(damaged, cell["damage"])
    batches = made.batches(cell["seed"])
    ratio = ratio_of(model, data_dir, steps, held_out) if cell["arm"] == "lora" else 1.0
    chosen = max(1, round(steps / ratio))
    if "learning_rate" in cell:
        for batch in batches[:chosen]:
            made.known(batch)  # before the clock runs
    begin = time.process_time()
    torch.manual_seed(cell["seed"])
    tuned = PREPARE[cell["arm"]](made, damaged)
    prepared = time.process_time()
    losses: list[float] = []
    if "learning_rate" in cell:
        losses = distill(tuned, made.known, batches, steps=chosen, learning_rate=cell["learning_rate"])
    end = time.process_time()
    entries = 0 if cell["arm"] == "none" else sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    return {
        "metrics": made.measure(tuned),
        "losses": [round(loss, 5) for loss in losses],
        "steps": len(losses),
        "step_ratio": round(ratio, 4),
        "prepare_seconds": round(prepared - begin, 1),
        "train_seconds": round(end - prepared, 1),
        "num_method_params": entries,
        **stamp(torch.device("cpu")),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells that have no row, and write the page."""
    parser = base_parser("What tuning norms repairs of quantized and pruned models.")
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--data-dir", type=Path, help="folder with gsm8k and tinyshakespeare")
    parser.add_argument("--until", help="local time, HH:MM, after which no run begins")
    options = parser.parse_args(arguments)
    rows = Rows(options.results / f"{NAME}.jsonl")
    left = [cell for cell in cells() if cell not in rows]
    if options.list:
        print(f"{len(left)} runs left; about {format_seconds(sum(map(estimate, left)))} on one quiet core.")
        for cell in left:
            print(" ".join(f"{name}={value}" for name, value in cell.items()))
        return 0
    failed = 0
    if not options.report:
        if options.model is None or options.data_dir is None:
            parser.error("give --model and --data-dir, or --report")
        start_process(threads=1)
        write_environment(options.results / "environment.json", NAME, torch.device("cpu"), workers=1)
        one = partial(run_cell, model=options.model, data_dir=options.data_dir)
        for cell in left:
            if options.until and time.strftime("%H:%M") >= options.until:
                break
            failed += run_cells([cell], rows, one, jobs=1, title=NAME)
    return failed


def estimate(cell: Cell) -> float:
    """Return about how many seconds a run takes on one core."""
    return 60 + (160 if "learning_rate" in cell else 0) + (60 if cell["arm"].startswith("closed") else 0)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
