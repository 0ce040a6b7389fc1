"""The tables of `serving.py`, from its rows alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness.claims import claim, time_claim
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.tables import NOT_RUN, cost_table, markdown

# The bounds this project set itself before it measured.
OPERATIONS = 1.10  # of the base model's, for any number of adapters in the bank and in the batch
SECONDS = 1.05  # of the base model's, with 64 distinct adapters in a batch of 64
FASTER = 5.0  # times, than PEFT's mixed batches of LoRA and RoAd with 32 distinct adapters
SWITCHING = 1.05  # of a forward pass with other adapters each time in the smallest bank, in the largest
LOADED = 1000.0  # adapters per second from a bank file


def write_report(rows: Rows, results: Path, cells: Sequence[Cell], protocol: str) -> None:
    """Write `serving.md`, for another protocol than the CPU's with its name in it."""
    parts = [
        "# Serving from a bank",
        "all-MiniLM-L6-v2, float32, 64 rows, a bank of 10,000 adapters unless said otherwise. Arms are timed in turns; "
        "ratios are taken within a round, to the first arm of the table. The arm named `again` is the first one a "
        "second time: how far its ratio is from 1 is noise.",
    ]
    titles: dict[str, tuple[str, Callable[[Row], list[str]]]] = {
        "operations": ("Dispatched operations", _operations),
        "time": ("A batch of 64 distinct adapters", _time),
        "mixed": ("32 distinct adapters, and PEFT's mixed batches", _mixed),
        "switching": ("Other adapters in every batch, by the size of the bank", _switching),
        "loading": ("Loading", _loading),
        "memory": ("Memory", _memory),
    }
    for cell in cells:
        title, write = titles[cell["measure"]]
        row = rows.get(cell)
        parts += [f"## {title}", *([NOT_RUN] if row is None else write(row))]
    results.mkdir(parents=True, exist_ok=True)
    stem = "serving" if protocol == "cpu" else f"serving_{protocol}"
    (results / f"{stem}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _operations(row: Row) -> list[str]:
    base = row["base"]
    distinct = list(next(iter(row["operations"].values())))
    lines = [
        [f"{int(size):,}", *(f"{count:,} ({count / base:.3f})" for count in counts.values())]
        for size, counts in row["operations"].items()
    ]
    header = (f"adapters in the bank: operations (of the base's {base:,})", *(f"{d} in the batch" for d in distinct))
    ratios = [count / base for counts in row["operations"].values() for count in counts.values()]
    held = max(ratios) <= OPERATIONS and min(ratios) == max(ratios)
    wanted = f"at most {OPERATIONS:.2f} of the base, the same for any number of adapters"
    return [markdown(header, lines), claim(wanted, f"{min(ratios):.3f} to {max(ratios):.3f}", held)]


def _time(row: Row) -> list[str]:
    ours, noise = row["arms"]["bank"]["ratio"], row["arms"]["base again"]["ratio"]
    return [cost_table(row["arms"]), time_claim(f"at most {SECONDS:.2f} of the base", ours, noise, SECONDS)]


def _mixed(row: Row) -> list[str]:
    parts = []
    for tokens, arms in row["by_tokens"].items():
        lines = [
            claim(
                f"at least {FASTER:g} times faster than PEFT's mixed batch of {name}",
                f"{arms[name]['ratio'][1]:.2f}",
                arms[name]["ratio"][1] >= FASTER,
            )
            for name in ("lora", "road")
        ]
        parts += [f"Rows of {tokens} token{'s' * (tokens != '1')}:", cost_table(arms), "\n".join(lines)]
    lengths = list(row["by_tokens"].values())
    counts = [
        [name, *(f"{arms[name]['operations']:,}" for arms in lengths)] for name in lengths[0] if "again" not in name
    ]
    header = ("arm", *(f"operations, {tokens} a row" for tokens in row["by_tokens"]))
    return [*parts, markdown(header, counts)]


def _switching(row: Row) -> list[str]:
    lines = [
        [f"{int(size):,}", f"{1000 * arm['seconds'][1]:.2f}", *_ratios(row["whole"][size]["ratio"])]
        for size, arm in row["entering"].items()
    ]
    header = ("adapters in the bank", "entering the route, ms", "route and forward pass: ratio (quartiles)")
    last = list(row["whole"].values())[-1]["ratio"]
    wanted = f"with the largest bank at most {SWITCHING:.2f} of the smallest"
    return [markdown(header, lines), claim(wanted, f"{last[1]:.3f}", last[1] <= SWITCHING)]


def _loading(row: Row) -> list[str]:
    names = {
        "bank file": "`AdapterBank.open(file, model).load()`, digests checked",
        "directories": "`bank.add_many` of directories",
        "load_adapter": "`PeftModel.load_adapter`",
    }
    lines = [[text, f"{row['adapters'][name]:,}", f"{row['a_second'][name]:,.0f}"] for name, text in names.items()]
    found = row["a_second"]["bank file"]
    wanted = f"at least {LOADED:,.0f} adapters a second from a bank file"
    return [
        markdown(("from", "adapters", "adapters a second"), lines),
        claim(wanted, f"{found:,.0f}", found >= LOADED),
    ]


def _memory(row: Row) -> list[str]:
    size, own, file = row["adapters"], row["row_bytes"], row["file_size"]
    lines = [
        ["a row of the bank", f"{own:,}", f"{own / file:.2f}"],
        [
            "the process's memory by an adapter more",
            f"{row['measured_bytes'] / size:,.0f}",
            f"{row['measured_bytes'] / size / file:.2f}",
        ],
        ["the adapter's weight file", f"{file:,}", "1.00"],
    ]
    grown = row["measured_bytes"] / 1e9
    text = f"{size:,} adapters: {own * size / 1e9:.3f} GB of rows, and the process grew by {grown:.3f} GB."
    return [markdown(("an adapter", "bytes", "of its file"), lines), text]


def _ratios(ratio: Sequence[float]) -> list[str]:
    low, middle, high = ratio
    return [f"{middle:.3f} ({low:.3f} to {high:.3f})"]
