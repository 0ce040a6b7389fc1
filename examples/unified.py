"""Prefix, attention adapter and LN-tuning as one adapter, compared with each of the three alone (arXiv 2211.08682).

    python examples/unified.py                                   # the demo's data, offline
    python examples/unified.py --task sst2 --model bert-base-cased
    python examples/unified.py --data-dir my_data

Trains and saves four adapters, then loads them all into one model, where one batch uses all of them and the base model.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from methods import HEAD_LR
from peft import PeftModel
from task_data import add_task_options
from text_classification import task_or_demo
from training import Run, Task, format_table, load_base, quiet, reload, train_method

from peft_lntune import UnifiedConfig, plan

COMBINED = "prefix+mha-adapter+ln"
METHOD_NAMES = ("ln", "mha-adapter", "prefix", COMBINED)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_options(parser)
    parser.add_argument("--model", help="a checkpoint's name or folder; without it, an installed all-MiniLM-L6-v2")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, help="of all but the head; default: each method's own, 1e-3")
    parser.add_argument("--head-learning-rate", type=float, default=HEAD_LR, help=f"default {HEAD_LR:g}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/unified"))
    return parser.parse_args(argv)


def serve_together(runs: dict[str, Run], task: Task, out: Path) -> None:
    """Load every adapter into one model and let one batch be answered by all of them, row by row."""
    combined = runs[COMBINED]
    model = reload(combined, task, out / COMBINED, adapter_name="combined")
    assert isinstance(model, PeftModel)
    alone = [f"only-{name}" for name in METHOD_NAMES[:-1]]  # PEFT warns of names that are part of its own, as "ln" is
    for name, method in zip(alone, METHOD_NAMES, strict=False):
        model.load_adapter(str(out / method), name)
    names = ["combined", *alone, "__base__"]
    row = task.validation[0]
    batch = {key: value for key, value in task.collator([row] * len(names)).items() if key != "labels"}
    model.eval()
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
        model.set_adapter("combined")
        switched = model(**batch).logits
        with model.disable_adapter():
            off = model(**batch).logits
    print("\none batch, the same text in every row, another adapter for each:")
    for name, logits in zip(names, mixed, strict=True):
        print(f"  {name:16}", "  ".join(f"{value:9.5f}" for value in logits.tolist()))
    print(f"largest difference to the combined adapter alone: {(mixed[0] - switched[0]).abs().max():.0e}")
    print(f"largest difference to the model switched off:     {(mixed[-1] - off[-1]).abs().max():.0e}")


def main(argv: Sequence[str] | None = None) -> None:
    """Plan, train each and all, compare, and serve them from one model."""
    args = parse_args(argv)
    quiet()
    task, model_name = task_or_demo(args)
    base = load_base(task, model_name, args.seed)
    print(plan(base, UnifiedConfig(preset=COMBINED, task_type=task.peft_type)), "\n")
    source = str(args.data_dir or "Hub")
    runs = {
        name: Run(
            name,
            model_name,
            source,
            steps=args.max_steps,
            batch_size=args.batch_size,
            lr=args.lr,
            seed=args.seed,
            head_lr=args.head_learning_rate,
        )
        for name in METHOD_NAMES
    }
    results = [train_method(run, task, args.out / name, checkpoints=False) for name, run in runs.items()]
    print(format_table(results))
    serve_together(runs, task, args.out)


if __name__ == "__main__":
    main()
