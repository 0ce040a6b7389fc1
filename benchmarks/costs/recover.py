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

from benchmarks.harness.damage import GROUP, damage
from benchmarks.harness.environment import write_environment
from benchmarks.harness.least_squares import closed_form
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import base_parser, format_seconds, run_cells, stamp, start_process
from benchmarks.harness.tables import NONE, markdown
from peft_lntune.cli.data import token_rows
from peft_lntune.recover import distill, quality, recovery_config

NAME = "recover"
LENGTH = 128  # tokens of a row
BATCH = 2  # rows
STEPS = 40
HELD_OUT = 24  # rows of each domain
CALIBRATION = 16  # rows of the closed form
SEEDS = (0, 1, 2)
RATE = {"norms": 3e-3, "closed+norms": 3e-3, "closed-ridge+norms": 3e-3, "lora": 3e-3}
OTHER_RATES = {"lora": (1e-3,), "norms": (1e-2,)}  # tried on the damage searched at, seed 0
SEARCHED_AT = "round-3"
OTHERS = ("prune-50", "round-4", "hqq-3", "round-2")
MORE = ("hqq-2", "hqq-4")
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
DOMAINS = {"gsm8k": ("question", "answer"), "tinyshakespeare": ("text",)}  # the first is what is trained on
LAST = 0.25  # share of the steps whose divergence chooses a rate

ARMS = {
    "none": "nothing",
    "spread": "gains by the spread of channels",
    "closed": "gains by least squares, ridge 0.001",
    "closed-ridge": "gains by least squares, ridge 1",
    "closed-teacher": "gains by least squares, ridge 0.001, the teacher's inputs",
    "closed+norms": "gains by least squares, ridge 0.001, then norms",
    "closed-ridge+norms": "gains by least squares, ridge 1, then norms",
    "norms": "norms",
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
    return found if arm not in RATE else {**found, "learning_rate": RATE[arm] if rate is None else rate}


def cells() -> list[Cell]:
    """Return all runs, most informative first."""
    first = [cell_of("undamaged", "none")]
    first += [cell_of(SEARCHED_AT, arm) for arm in ("none", "norms", "closed", "closed+norms", "lora")]
    first += [cell_of(damaged, arm) for damaged in OTHERS for arm in ("none", "norms")]
    first += [cell_of(SEARCHED_AT, arm, rate=rate) for arm, rates in OTHER_RATES.items() for rate in rates]
    first += [cell_of(SEARCHED_AT, arm) for arm in ("closed-ridge", "closed-teacher", "spread", "closed-ridge+norms")]
    first += [cell_of(damaged, "lora") for damaged in OTHERS]
    for seed in SEEDS[1:]:
        first += [cell_of(damaged, arm, seed) for damaged in (SEARCHED_AT, *OTHERS) for arm in ("norms", "lora")]
    first += [cell_of(damaged, arm) for damaged in MORE for arm in ("none", "norms", "lora")]
    return first


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

    def __init__(self, model: str, data_dir: Path, steps: int, held_out: int) -> None:
        from transformers import AutoTokenizer

        self.folder, self.steps = model, steps
        tokenizer = AutoTokenizer.from_pretrained(model)
        tuned = next(iter(DOMAINS))
        self.train = token_rows(tokenizer, read_texts(data_dir, tuned, "train"), LENGTH, tuned)
        self.held_out = {
            domain: self._batches(
                token_rows(tokenizer, read_texts(data_dir, domain, "validation"), LENGTH, domain)[:held_out]
            )
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

    return get_peft_model(model, recovery_config(model))


def closed(bench: Bench, model: nn.Module, way: str = "own inputs", ridge: float = 1e-3) -> nn.Module:
    """Put an adapter of all norms on a model, with gains in closed form."""
    deltas = closed_form(model, bench.teacher, bench.calibration(), way, ridge)
    adapted = norms(bench, model)
    places = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, delta in deltas.items():
            places[f"base_model.model.{name}.lntune_weight.default.weight"].copy_(delta)
    return adapted


def lora(bench: Bench, model: nn.Module) -> nn.Module:
    """Put LoRA on all linear maps of a model but its head."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))


PREPARE: dict[str, Callable[[Bench, nn.Module], nn.Module]] = {
    "none": lambda bench, model: model,
    "closed": closed,
    "closed-ridge": partial(closed, ridge=1.0),
    "closed-teacher": partial(closed, way="teacher inputs"),
    "spread": partial(closed, way="spread"),
    "norms": norms,
    "closed+norms": closed,
    "closed-ridge+norms": partial(closed, ridge=1.0),
    "lora": lora,
}

ROUNDS = 3  # of the comparison of steps


@cache
def step_ratio(bench: Bench) -> float:
    """Return the processor time of a step of LoRA, relative to a step of norms, in turns; measured once."""
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


def run_cell(cell: Cell, model: str, data_dir: Path, steps: int, held_out: int) -> Row:
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
    ratio = step_ratio(made) if cell["arm"] == "lora" else 1.0
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


def last_divergence(row: Row) -> float:
    """Return the divergence in the last quarter of the steps of a run."""
    losses = row["losses"]
    return statistics.mean(losses[-max(1, round(LAST * len(losses))) :])


def chosen_rate(rows: Rows, arm: str) -> float:
    """Return the rate of an arm with the lowest divergence in the last quarter of its steps.

    Every batch is seen once, and its divergence is taken before its step, so this needs no further text.
    """
    found = {}
    for rate in (RATE[arm], *OTHER_RATES.get(arm, ())):
        row = rows.get(cell_of(SEARCHED_AT, arm, rate=rate))
        if row is not None:
            found[rate] = last_divergence(row)
    return min(found, key=lambda rate: found[rate], default=RATE[arm])


def _of_seeds(rows: Rows, damaged: str, arm: str) -> list[Row]:
    seeds = SEEDS if arm in ("norms", "lora") else SEEDS[:1]
    return [row for seed in seeds if (row := rows.get(cell_of(damaged, arm, seed))) is not None]


def _mean(values: Sequence[float], form: str) -> str:
    text = format(statistics.mean(values), form)
    return text if len(values) == 1 else f"{text} ({format(min(values), form)} to {format(max(values), form)})"


def report(rows: Rows) -> str:
    """Return the page: what was repaired, the rates that were tried, what was not run."""
    whole = rows.get(cell_of("undamaged", "none"))
    parts = ["# Repair of quantized and pruned models"]
    parts.append(
        f"SmolLM2-135M-Instruct in float32, whose linear maps are damaged, and norms or LoRA of rank {LORA['r']} (on "
        f"all linear maps, alpha {LORA['lora_alpha']}) trained on the logits of the undamaged model: {STEPS} steps of "
        f"{BATCH} rows of {LENGTH} tokens of gsm8k's training part. LoRA gets as many steps as take the same "
        f"processor time. Perplexity on {HELD_OUT} rows each of gsm8k's and tinyshakespeare's validation parts; "
        "tinyshakespeare is never trained on. Divergence: KL from the undamaged model, in nats per token. Groups have "
        f"{GROUP} weights. Several seeds: mean (lowest to highest)."
    )
    if whole is not None:
        undamaged = [f"{domain} {whole['metrics'][domain]['perplexity']:.2f}" for domain in DOMAINS]
        parts.append(f"Perplexity of the undamaged model: {', '.join(undamaged)}.")
    lines: list[list[object]] = []
    for damaged in (SEARCHED_AT, *OTHERS, *MORE):
        for arm, words in ARMS.items():
            found = _of_seeds(rows, damaged, arm)
            if found:
                cells_of = [
                    _mean([row["metrics"][domain][measure] for row in found], form)
                    for measure, form in (("perplexity", ".1f"), ("divergence", ".2f"))
                    for domain in DOMAINS
                ]
                entries = f"{found[0]['num_method_params']:,}" if found[0]["num_method_params"] else NONE
                seconds = [_mean([row["prepare_seconds"] + row["train_seconds"] for row in found], ".0f")]
                steps = found[0]["steps"] or NONE
                lines.append(
                    [WORDS[damaged], words, *cells_of, entries, steps, *(seconds if entries != NONE else [NONE])]
                )
    measures = [f"{measure}, {domain}" for measure in ("perplexity", "divergence") for domain in DOMAINS]
    header = ["damage", "repair", *measures, "entries", "steps", "processor seconds"]
    parts += ["## What is repaired", markdown(header, lines) if lines else "Nothing was run."]
    tried = []
    for arm in ("norms", "lora"):
        for rate in sorted((RATE[arm], *OTHER_RATES[arm])):
            row = rows.get(cell_of(SEARCHED_AT, arm, rate=rate))
            if row is not None:
                perplexity = row["metrics"][next(iter(DOMAINS))]["perplexity"]
                tried.append([ARMS[arm], f"{rate:g}", f"{last_divergence(row):.3f}", f"{perplexity:.1f}"])
    if tried:
        about = (
            "Rates were tried on 3 bits, rounded. Every batch is seen once, so the divergence of the last quarter of "
            "the steps, each before its step, chooses without further text. All other runs have the rate "
            + ", ".join(f"{RATE[arm]:g} ({ARMS[arm]})" for arm in ("norms", "lora"))
            + "."
        )
        best = [f"{ARMS[arm]}: {chosen_rate(rows, arm):g}" for arm in ("norms", "lora")]
        parts += [
            "## Learning rates",
            about,
            markdown(["repair", "rate", "last divergence", "perplexity, gsm8k"], tried),
        ]
        parts.append(f"Lowest of those tried: {', '.join(best)}.")
    parts += ["## How to read it", *LIMITS]
    left = [cell for cell in cells() if cell not in rows]
    if left:
        names: dict[str, list[str]] = {}
        for cell in left:
            own = cell.get("learning_rate", 0)
            at = f", rate {own:g}" if own != RATE.get(cell["arm"], 0) else ""
            names.setdefault(f"{WORDS[cell['damage']]}: {cell['arm']}{at}", []).append(str(cell["seed"]))
        listed = "; ".join(f"{name} (seed {', '.join(seeds)})" for name, seeds in names.items())
        parts += ["## Not run yet", f"{listed}. `python -m benchmarks.costs.recover` goes on with them."]
    return "\n\n".join(parts) + "\n"


LIMITS = (
    "- The weights of this copy of SmolLM2 come from a GGUF file of type Q4_1, so they lie on a grid of 4 bits in "
    "groups of 32 already. Rounding them again to 4 bits in groups of 64 is a second rounding.\n"
    "- Damage is computed and kept in float32, as a kernel for the packed format would compute it. The head, tied to "
    "the embeddings, is not damaged.\n"
    "- Processor time leaves out the teacher: its last hidden states were computed before, for all methods. Without "
    "that, a step of any method takes one forward pass more.\n"
    "- HQQ is torchao's search for zero points, which reads no texts. torchao's GPTQ runs on CUDA alone, so GPTQ was "
    "not run.\n"
    "- The model has no bias, so tuning biases as well could not be measured.",
)


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
        one = partial(run_cell, model=options.model, data_dir=options.data_dir, steps=STEPS, held_out=HELD_OUT)
        for cell in left:
            if options.until and time.strftime("%H:%M") >= options.until:
                break
            failed += run_cells([cell], rows, one, jobs=1, title=NAME)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{NAME}.md").write_text(report(rows), encoding="utf-8")
    return failed


def estimate(cell: Cell) -> float:
    """Return about how many seconds a run takes on one core."""
    return 60 + (160 if "learning_rate" in cell else 0) + (60 if cell["arm"].startswith(("closed", "spread")) else 0)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
