"""On every model class of transformers: which norms are found, which have a role, and where other parts find a place.

python -m benchmarks.costs.architectures
"""

import argparse
import json
import re
import resource
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.architectures import build_small, model_classes, reference_norms
from benchmarks.harness.environment import write_environment
from benchmarks.harness.rows import Row, Rows
from benchmarks.harness.runner import RESULTS, start_process
from benchmarks.harness.tables import markdown
from peft_lntune import BottleneckConfig, LNTuningConfig, ModuleTuningConfig, PrefixConfig
from peft_lntune.core.module_tree import base_modules
from peft_lntune.errors import NoMatchError, PeftLNTuneError
from peft_lntune.planning.plan import plan
from peft_lntune.planning.types import Plan

NAME = "architectures"
SECONDS = 120  # that one class may take
MEMORY = 12 * 2**30  # bytes of address space that a process may take
BATCH = 150  # classes a process: starting one takes as long as twenty classes
WANTED_EXACT, WANTED_ROLES = 1800, 0.9
OTHERS: Mapping[str, Callable[[], Any]] = {
    "bottleneck": BottleneckConfig,
    "prefix": PrefixConfig,
    "components": lambda: ModuleTuningConfig(
        components=["query", "key", "value", "attention_output", "ffn_up", "ffn_gate", "ffn_down"]
    ),
}


def measure(model_class: type[nn.Module]) -> Row:
    """Compare what a plan says of a class with the reference.

    Args:
        model_class: a model class of transformers.

    Returns:
        The row without its cell. A class that cannot be built has the status `"not built"`.
    """
    try:
        model = build_small(model_class)
    except Exception as error:  # strange models raise strange errors
        return {"status": "not built", "error": _short(error)}
    reference, modules = reference_norms(model), base_modules(model)
    found, told = _plan_norms(model)
    named = sorted(name for name in reference.keys() - found.keys() if name in told)
    missed = sorted(reference.keys() - found.keys() - set(named))
    extra = sorted(found.keys() - reference.keys())
    return {
        "status": "success",
        "modules": len(modules),
        "norms": len(reference),
        "found": len(found),
        "named": _patterns(f"{name} ({reference[name]})" for name in named),
        "missed": _patterns(f"{name} ({reference[name]})" for name in missed),
        "extra": _patterns(f"{name} ({type(modules[name]).__name__})" for name in extra),
        "num_missed": len(missed),
        "roles": dict(Counter(role for role in found.values() if role)),
        "without_role": _patterns(name for name, role in found.items() if not role),
        **{part: _outcome(model, config) for part, config in OTHERS.items()},
    }


def _plan_norms(model: nn.Module) -> tuple[dict[str, str], Iterable[str]]:
    """Roles of the norms that are tuned, and the names of the modules that the plan says are not."""
    try:
        planned = _plan(model, LNTuningConfig())
    except NoMatchError as error:
        return {}, [line.replace("(", ":").partition(":")[0].strip() for line in str(error).splitlines()]
    roles = {name: "" if part.roles == "unknown" else part.roles for name, part in planned.parts.items()}
    return roles, {*planned.left_out, *getattr(planned, "missed", ())}


def _plan(model: nn.Module, config: Any) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plan(model, config)


def _outcome(model: nn.Module, config: Callable[[], Any]) -> int | str:
    """How many places a part finds, or the class of our refusal, or what else was raised, which is a fault."""
    try:
        return len(_plan(model, config()).parts)
    except PeftLNTuneError as error:
        return type(error).__name__
    except Exception as error:  # what this sweep looks for
        return f"fault: {_short(error)}"


def _patterns(names: Iterable[str]) -> list[str]:
    """Names with a star for each number, each pattern once."""
    return list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names))


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def run_batch(names: Sequence[str]) -> None:
    """Measure classes in this process, and print a row for each as soon as it is known."""
    start_process(threads=1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, _stop)
    classes = model_classes(list(dict.fromkeys(name.partition(".")[0] for name in names)))
    for name in names:
        signal.alarm(SECONDS)
        try:
            row = measure(classes[name])
        except _TooLong:
            row = {"status": "took too long"}
        finally:
            signal.alarm(0)
        print(json.dumps({"cell": {"model": name}, **row}), flush=True)


class _TooLong(BaseException):
    """A class took more than its time; no `except Exception` on the way may keep it."""


def _stop(*_: object) -> None:
    raise _TooLong


def sweep(names: Sequence[str], rows: Rows) -> None:
    """Measure the classes that have no row, in processes one after the other.

    Where a process ends before its last class, that class gets a row that says so, and the others go on.

    Args:
        names: of the classes, as `model_classes` gives them.
        rows: where the rows go.
    """
    from tqdm import tqdm

    left = [name for name in names if {"model": name} not in rows]
    with tqdm(total=len(left), desc=NAME, file=sys.stderr, disable=not left) as bar:
        while left:
            for row in _run(left[:BATCH]):
                rows.append(row)
                left.remove(row["cell"]["model"])
                bar.update()


def _run(batch: Sequence[str]) -> Iterable[Row]:
    command = [sys.executable, "-m", "benchmarks.costs.architectures", "--batch", *batch]
    done = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
                done += 1
    if process.returncode and done < len(batch):
        yield {"cell": {"model": batch[done]}, "status": f"ended its process with {process.returncode}"}


def report(rows: Rows, planned: int | None = None) -> str:
    """The page: totals against what is wanted, then the classes that fell short.

    Args:
        rows: of the classes that were measured.
        planned: how many classes there are; None: as many as there are rows.
    """
    every = sorted(rows, key=lambda row: row["cell"]["model"])
    built = [row for row in every if row["status"] == "success"]
    norms, found = sum(row["norms"] for row in built), sum(row["found"] for row in built)
    missed = sum(row["num_missed"] for row in built)
    exact = [row for row in built if not (row["missed"] or row["named"] or row["extra"])]
    with_role = sum(sum(row["roles"].values()) for row in built)
    share = with_role / max(found, 1)
    parts = ["# Every model class of transformers"]
    if planned is not None and planned > len(every):
        parts.append(
            f"{planned - len(every):,} of {planned:,} classes were not run yet; the script goes on with these."
        )
    parts.append(
        f"Of {len(every):,} model classes {len(built):,} build from a small config without weights. The reference "
        "takes a module for a norm by the name of its class and by its parameters."
    )
    wanted = (
        ("norms in the reference", f"{norms:,}", "", None),
        ("norms that `LNTuningConfig()` tunes", f"{found:,}", "", None),
        ("norms missed without a word", f"{missed:,}", "0", missed == 0),
        ("classes whose norms are exactly the reference's", f"{len(exact):,}", f"{WANTED_EXACT:,}", None),
        ("norms with a role", f"{with_role:,} ({share:.1%})", f"{WANTED_ROLES:.0%}", share >= WANTED_ROLES),
        *((f"plans of {part} that raise what is not ours", _faults(built, part), "0", None) for part in OTHERS),
    )
    lines: list[list[object]] = [[what, figure, goal] for what, figure, goal, _ in wanted]
    parts.append(markdown(("what", "measured", "wanted"), lines))
    parts.append("## Roles\n\n" + markdown(("role", "norms"), _role_lines(built)))
    parts.append(
        "## Bottlenecks, prefixes, components\n\n"
        + markdown(
            ("part", "classes with a place", "refused", "raised what is not ours"),
            [[part, *_outcome_counts(built, part)] for part in OTHERS],
        )
    )
    parts.append("## Norms that are not tuned, or more than the reference\n\n" + _short_of(built))
    parts.append("## Norms without a role, by the most frequent names\n\n" + _without_role(built))
    other = [row for row in every if row["status"] != "success"]
    parts.append(
        "## Classes that do not build\n\n"
        + markdown(("class", "why"), [[row["cell"]["model"], row.get("error", row["status"])] for row in other])
    )
    return "\n\n".join(parts) + "\n"


def _faults(built: Sequence[Row], part: str) -> int:
    return sum(str(row[part]).startswith("fault") for row in built)


def _role_lines(built: Sequence[Row]) -> list[list[object]]:
    counts: Counter[str] = Counter()
    for row in built:
        counts.update(row["roles"])
    return [[role, f"{count:,}"] for role, count in counts.most_common()]


def _outcome_counts(built: Sequence[Row], part: str) -> list[object]:
    placed = sum(isinstance(row[part], int) for row in built)
    faults = _faults(built, part)
    return [f"{placed:,}", f"{len(built) - placed - faults:,}", faults]


def _short_of(built: Sequence[Row]) -> str:
    lines: list[list[object]] = [
        [row["cell"]["model"], *("; ".join(row[key]) for key in ("missed", "named", "extra"))]
        for row in built
        if row["missed"] or row["named"] or row["extra"]
    ]
    return markdown(("class", "missed without a word", "named by the plan", "more than the reference"), lines)


def _without_role(built: Sequence[Row]) -> str:
    classes: dict[str, list[str]] = {}
    for row in built:
        for name in row["without_role"]:
            classes.setdefault(name.rpartition("*.")[2], []).append(row["cell"]["model"])
    most = sorted(classes.items(), key=lambda item: -len(item[1]))[:60]
    return markdown(("name", "classes", "such as"), [[name, len(of), of[0]] for name, of in most])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report."""
    parser = argparse.ArgumentParser(description="Norms, roles and places on every model class of transformers.")
    parser.add_argument("--list", action="store_true", help="print how many classes have no row, and run nothing")
    parser.add_argument("--report", action="store_true", help="write the page from the rows, and run nothing")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the rows (default: benchmarks/results)"
    )
    parser.add_argument("--batch", nargs="+", metavar="CLASS", help="measure these in this process; rows are printed")
    options = parser.parse_args(arguments)
    if options.batch:
        run_batch(options.batch)
        return 0
    rows, planned = Rows(options.results / f"{NAME}.jsonl"), None
    if not options.report:
        names = list(model_classes())
        planned = len(names)
        if options.list:
            print(f"{sum({'model': name} not in rows for name in names)} classes left; about 1 s each.")
            return 0
        write_environment(options.results / "environment.json", NAME, torch.device("cpu"), workers=1)
        sweep(names, rows)
    (options.results / f"{NAME}.md").write_text(report(rows, planned), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
