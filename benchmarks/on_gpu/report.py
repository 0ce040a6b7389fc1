"""The page of `gpu.py`, from its rows alone: checks, then a table per measurement, then what has no row."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.costs import fisher_cost
from benchmarks.costs.speed_report import SLOWER
from benchmarks.harness.claims import claim, in_runs, time_claim
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.tables import cost_table, markdown
from benchmarks.on_gpu.plan import PARTS, Part, cells_of

# Bounds that this project set itself before it had a GPU.
OF_BASE = 1.05  # times the base model's time, of a bank or of decoding, at most
OF_LORA = 5.0  # times faster than PEFT's mixed batch of LoRA, at least
OF_THE_LOOP = fisher_cost.OF_THE_LOOP["gpu"]

INTRODUCTION = """# On a GPU

Written from the rows of `python -m benchmarks.gpu`; [the protocol](../README.md#on-a-gpu) says how they are measured.
Weights are random, in the shapes of the public models that the titles name, unless a line says otherwise. Methods are
timed in turns; ratios are taken within a round, to the first method of the table. The one named `again` is the first
one a second time: how far its ratio is from 1 is noise. Peak memory is the allocator's, without what was allocated
before the call."""


def write_report(rows: Rows, results: Path, protocol: str) -> bool:
    """Write `gpu.md`, or `gpu_small.md` of the small protocol, if there are rows.

    Returns:
        Whether there are.
    """
    devices = list(dict.fromkeys(row["cell"]["device"] for row in rows if row["cell"]["protocol"] == protocol))
    if not devices:
        return False
    parts = [INTRODUCTION]
    if protocol == "small":
        parts.append("These rows come from tiny models that test the script. Their times say nothing.")
    for device in devices:
        parts += _device(rows, protocol, device)
    results.mkdir(parents=True, exist_ok=True)
    stem = "gpu" if protocol == "gpu" else "gpu_small"
    (results / f"{stem}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return True


def said(cell: Cell) -> str:
    """Return a cell's coordinates in words, without protocol and device.

    Example:
        >>> said({"protocol": "gpu", "device": "cpu", "part": "training", "model": "minilm", "dtype": "float32"})
        'training, minilm, float32'
    """
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in _values(cell))


def _values(cell: Cell) -> Iterator[object]:
    for key, value in cell.items():
        if key not in ("protocol", "device"):
            yield f"{value} tenants" if key == "tenants" else value


def _device(rows: Rows, protocol: str, device: str) -> Iterator[str]:
    own = [row for row in rows if row["cell"]["protocol"] == protocol and row["cell"]["device"] == device]
    versions: dict[str, str] = next((row["versions"] for row in own if "versions" in row), {})
    yield f"## {device}"
    yield ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
    missing: list[str] = []
    for part in PARTS:
        found = [(cell, rows.get(cell)) for cell in cells_of(part, protocol, device)]
        ran = [row for _, row in found if row is not None and row["status"] == "success"]
        missing += [_missing(cell, row) for cell, row in found if row is None or row["status"] != "success"]
        if ran:
            yield f"### {part.title}"
            yield from WRITERS[part.name](part, ran)
    if missing:
        yield "### Not measured"
        yield "\n".join(missing)


def _missing(cell: Cell, row: Row | None) -> str:
    if row is None:
        return f"- {said(cell)}: no row."
    return f"- {said(cell)}: {row['status']}: {row['reason']}"


def _checks(part: Part, rows: Sequence[Row]) -> Iterator[str]:
    lines: list[list[object]] = []
    for row in rows:
        largest = "not a number" if row["largest"] is None else f"{row['largest']:.1e}"
        outcome = "passed" if row["passed"] else "**failed**"
        lines.append([row["cell"]["check"], row["wanted"], largest, f"{row['tolerance']:g}", outcome])
    yield "Errors are relative, ‖found - wanted‖ / ‖wanted‖, unless the check says otherwise; the largest of all cases."
    yield markdown(("check", "what must hold", "largest error", "at most", "outcome"), lines)


def _moving(part: Part, rows: Sequence[Row]) -> Iterator[str]:
    lines: list[list[object]] = []
    for row in rows:
        cell = row["cell"]
        shares = [f"{row['moved']:.2%}", f"{row['not_finite']:.2%}"]
        lines.append([cell["model"], cell["dtype"], f"{cell['learning_rate']:g}", cell["arm"], *shares])
    yield (
        f"Share of the norms' entries that are finite and not where they started, after {rows[0]['steps']} AdamW steps "
        f"on random tokens, loss times {rows[0]['loss_scale']:g}."
    )
    yield markdown(("model", "base", "learning rate", "method", "moved", "not finite"), lines)
    ours = [row for row in rows if row["cell"]["arm"] == "ln"]
    if ours:
        every = sum(row["moved"] == 1 for row in ours)
        least = f"in {every} of {len(ours)} runs, at least {min(row['moved'] for row in ours):.2%}"
        yield in_runs("every entry of ln moves", least, every, len(ours)).line


def _timed(part: Part, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table per row, with the claims on it."""
    for row in rows:
        title = said({key: value for key, value in row["cell"].items() if key != "part"})
        yield f"#### {title}"
        yield f"{_sizes(row)} {next(iter(row['arms'].values()))['rounds']} rounds."
        yield cost_table(row["arms"])
        lines = list(CLAIMS[part.name](row))
        if lines:
            yield "\n".join(lines)


def _sizes(row: Row) -> str:
    found = [f"{row['rows']} rows"]
    found += [f"{row[key]:,} {word}" for key, word in SIZES.items() if key in row]
    return ", ".join(found) + (f", weights: {row['weights']}." if "weights" in row else ".")


SIZES = {
    "tokens": "tokens each",
    "prompt": "tokens of prompt",
    "new_tokens": "new tokens",
    "batches": "batches",
    "distinct": "distinct adapters",
    "bank": "adapters in the bank",
    "layers": "layers",
    "virtual_tokens": "virtual tokens",
}


def _against(row: Row, name: str, first: str, again: str, bound: float) -> Iterator[str]:
    if name in row["arms"]:
        ratio, noise = row["arms"][name]["ratio"], row["arms"][again]["ratio"]
        yield time_claim(f"{name} at most {bound:.2f} of {first}", ratio, noise, bound)


def _training_claims(row: Row) -> Iterator[str]:
    yield from _against(row, "ln", "plain", "plain again", SLOWER)


def _decoding_claims(row: Row) -> Iterator[str]:
    yield from _against(row, "ln", "base", "base again", OF_BASE)


def _tenant_claims(row: Row) -> Iterator[str]:
    yield from _against(row, "bank", "base", "base again", OF_BASE)
    yield from _faster(row, "bank", "lora")


def _compiled_claims(row: Row) -> Iterator[str]:
    yield from _against(row, "bank, compiled", "base, compiled", "base, compiled, again", OF_BASE)
    if "lora, compiled" in row["arms"]:
        yield from _faster(row, "bank, compiled", "lora, compiled")


def _faster(row: Row, ours: str, theirs: str) -> Iterator[str]:
    if row["cell"]["tenants"] > 1:
        times = row["arms"][theirs]["seconds"][1] / row["arms"][ours]["seconds"][1]
        yield claim(f"{ours} at least {OF_LORA:g} times faster than {theirs}", f"{times:.1f}", times >= OF_LORA)


def _fisher_claims(row: Row) -> Iterator[str]:
    low, middle, high = row["loop_to_fisher"]
    measured = f"{middle:.1f} ({low:.1f} to {high:.1f})"
    yield from _against(row, "fisher", "step", "step again", fisher_cost.OF_A_STEP)
    yield claim(f"at least {OF_THE_LOOP:g} times faster than the loop", measured, middle >= OF_THE_LOOP)
    yield f"- Largest difference of the two ways to the scores, relative to the largest score: {row['difference']:.1e}."


def _attention_claims(row: Row) -> Iterator[str]:
    yield f"- Relative error against eager attention in float32: {row['error']:.1e}."


def _quantized_claims(row: Row) -> Iterator[str]:
    moved = row["moved"]
    yield claim(f"every entry moves in {row['steps']} steps", f"{moved:.2%}", moved == 1)
    sizes = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in row["base_bytes"].items())
    yield f"- The base model alone: {sizes}."


CLAIMS: dict[str, Callable[[Row], Iterator[str]]] = {
    "training": _training_claims,
    "decoding": _decoding_claims,
    "decoding, compiled": _decoding_claims,
    "tenants": _tenant_claims,
    "tenants, compiled": _compiled_claims,
    "fisher": _fisher_claims,
    "attention": _attention_claims,
    "quantized": _quantized_claims,
}
WRITERS: dict[str, Callable[[Part, Sequence[Row]], Iterator[str]]] = {
    "checks": _checks,
    "half precision": _moving,
    **dict.fromkeys(CLAIMS, _timed),
}
