"""What is measured, in which order, how long each part may take, and which checks must have passed before."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.rows import Cell, Row
from benchmarks.on_gpu import attention, checks, fisher, quantized, serving, training
from benchmarks.on_gpu.bench import Bench

Run = Callable[[Cell, Bench], Row]


@dataclass(frozen=True)
class Part:
    """Cells that are run one after the other, in one budget.

    Attributes:
        name: as in rows.
        seconds: what it may take, at `MINUTES` for all parts; time that a part leaves is the next one's.
        run: measures one cell.
        cells: coordinates, the most informative first.
        needs: names of checks; a cell is not measured unless all of them have passed.
        title: for the page.
    """

    name: str
    seconds: float
    run: Run
    cells: Sequence[Mapping[str, Any]]
    needs: tuple[str, ...]
    title: str


def _moving() -> list[dict[str, Any]]:
    settings = [("llama-3.2-1b", 1e-4), ("llama-3.2-1b", 1e-3), ("bert-large", 1e-4)]
    return [
        {"model": model, "dtype": dtype, "arm": arm, "learning_rate": rate}
        for model, rate in settings
        for dtype in ("bfloat16", "float16")
        for arm in training.MOVING
    ]


MINUTES = 9.0
START = 20.0  # seconds: importing the libraries and the first kernel
TENANTS = (1, 32, 256)
PARTS: tuple[Part, ...] = (
    Part("checks", 60, checks.run_cell, [{"check": name} for name in checks.CHECKS], (), "Checks"),
    Part("half precision", 40, training.moving, _moving(), ("start", "gradients", "norms"), "What moves"),
    Part(
        "training",
        95,
        training.cost,
        [
            {"model": model, "dtype": "float32" if model == "minilm" else "bfloat16"}
            for model in ("llama-3.2-1b", "bert-large", "minilm", "qwen3-0.6b", "llama-3.2-3b")
        ],
        ("start", "gradients", "norms"),
        "Training steps",
    ),
    Part(
        "fisher",
        40,
        fisher.run_cell,
        [
            {"model": "minilm", "dtype": "float32", "kind": "empirical"},
            {"model": "llama-3.2-1b", "dtype": "bfloat16", "kind": "empirical"},
        ],
        ("fisher", "norms"),
        "Fisher scores",
    ),
    Part("decoding", 40, serving.decoding, [{"mode": "eager"}], ("start", "decoding"), "Greedy decoding"),
    Part(
        "tenants",
        85,
        serving.tenants,
        [{"mode": "eager", "tenants": count} for count in TENANTS],
        ("mixed", "bank"),
        "Many tenants in a batch",
    ),
    Part(
        "attention",
        20,
        attention.run_cell,
        [{"kernel": kernel} for kernel in attention.KERNELS],
        ("prefix",),
        "Prefixes and fused attention",
    ),
    Part(
        "quantized",
        30,
        quantized.run_cell,
        [{"base": base} for base in quantized.BASES],
        ("start", "gradients"),
        "Quantized bases",
    ),
    # Last: a graph that takes too long to compile then takes nothing from the others.
    Part(
        "tenants, compiled",
        70,
        serving.compiled_tenants,
        [
            *({"mode": "compiled", "arm": "bank", "tenants": count} for count in TENANTS),
            *({"mode": "compiled", "arm": "lora", "tenants": count} for count in TENANTS),
        ],
        ("bank", "compiled"),
        "Many tenants in a batch, compiled",
    ),
    Part("decoding, compiled", 40, serving.decoding, [{"mode": "compiled"}], ("decoding", "compiled"),
         "Greedy decoding, compiled"),
)  # fmt: skip


def find_part(name: str) -> Part:
    """Return a part by name.

    Raises:
        ValueError: there is no such part.
    """
    for part in PARTS:
        if part.name == name:
            return part
    raise ValueError(f"There is no part {name!r}; the parts are {[part.name for part in PARTS]}.")


def cells_of(part: Part, protocol: str, device: str) -> list[Cell]:
    """Return the cells of a part on a device, as rows name them."""
    return [{"protocol": protocol, "device": device, "part": part.name, **cell} for cell in part.cells]


def deadlines(parts: Iterable[Part], seconds: float) -> dict[str, float]:
    """Return when each part must have ended, in seconds from the start; earlier parts' savings are the later ones'.

    Args:
        parts: those that are run, in order.
        seconds: for all of them, the start included; budgets shrink or grow in proportion.
    """
    chosen = list(parts)
    scale = max(0.0, seconds - START) / sum(part.seconds for part in chosen)
    found, end = {}, START
    for part in chosen:
        end += scale * part.seconds
        found[part.name] = end
    return found
