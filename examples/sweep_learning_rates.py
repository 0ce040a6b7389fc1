"""Sixteen learning rates in one run: each is a separate task in every batch, on the same rows.

    python examples/sweep_learning_rates.py --data-dir my_data --model bert-base-uncased
    python examples/sweep_learning_rates.py --task sst2 --rates 1e-4 1e-3 1e-2        # data from the Hub

The rates are those of the norms; every head learns at --head-learning-rate, as in the other examples. A batch has as
many rows as that of one run, shared among the rates: with 32 rows and sixteen rates, each sees two. So a step takes
about as long as one of a single run; pass a larger --batch-size if the device is not busy.
Without --task and --data-dir it uses the demo's data.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from methods import HEAD_LR, METHODS, find_head
from peft import get_peft_model
from task_data import add_task_options, errors_as_text, say
from text_classification import task_or_demo
from training import Run, Task, load_base, make_trainer, quiet
from transformers import TrainingArguments

from peft_lntune import LNTuningConfig, ManyTasks
from peft_lntune.analysis import Table
from peft_lntune.tasks.trainer import TaskTrainer

RATES = [float(f"{rate:.2g}") for rate in np.geomspace(1e-4, 1e-1, 16)]
COLUMN = "rate"
Found = dict[float, dict[str, float]]
"""By rate what evaluation found."""
TIMED = 10  # steps of one run alone, to compare with


def repeated(rows: datasets.Dataset, names: Sequence[str]) -> datasets.Dataset:
    """The rows once for each name, with the name in a column."""
    # Shown, not copied: each part is a view of the same table.
    return datasets.concatenate_datasets([rows.add_column(COLUMN, [name] * len(rows)) for name in names])


def sweep(task: Task, model: str, rates: Sequence[float], args: argparse.Namespace) -> tuple[Found, float]:
    """Train all rates at once and save each as an adapter.

    Returns:
        What evaluation found, and the seconds of a step.
    """
    names = [adapter_name(rate) for rate in rates]
    base = load_base(task, model, args.seed)
    config = LNTuningConfig(task_type=task.peft_type, modules_to_save=find_head(base))
    peft_model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        peft_model.add_adapter(name, config)
    rows = max(1, args.batch_size // len(names))
    with ManyTasks(peft_model) as tasks:
        trainer = TaskTrainer(
            tasks,
            TrainingArguments(
                output_dir=str(args.out),
                max_steps=args.max_steps,
                warmup_steps=0.1,  # a share of all steps
                per_device_eval_batch_size=4 * args.batch_size,
                seed=args.seed,
                save_strategy="no",
                logging_steps=10,
                report_to="none",
                disable_tqdm=False,
                remove_unused_columns=False,  # the collator reads the texts
                dataloader_pin_memory=torch.cuda.is_available(),
                label_names=["labels"],
            ),
            task_column=COLUMN,
            rows_per_task=rows,
            learning_rates=dict(zip(names, rates, strict=True)),
            head_learning_rate=args.head_learning_rate,
            train_dataset=repeated(task.train, names),
            data_collator=task.collator,
            compute_metrics=lambda found: task.evaluate(found.predictions),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        begin = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - begin) / args.max_steps
        found = trainer.evaluate(repeated(task.validation, names))
        tasks.save(args.out)
    return {rate: by_rate(found, name) for rate, name in zip(rates, names, strict=True)}, seconds


def adapter_name(rate: float) -> str:
    """The name of a rate's adapter and folder, in which there can be no dot."""
    return f"{rate:.1e}".replace(".", "_")


def by_rate(found: Mapping[str, float], name: str) -> dict[str, float]:
    """The loss and the metrics of one rate; what an evaluation says about its own speed is left out."""
    prefix, speed = f"eval_{name}_", ("runtime", "per_second", "preparation_time")
    own = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    return {key: value for key, value in own.items() if not key.endswith(speed)}


def time_alone(task: Task, model: str, args: argparse.Namespace) -> float:
    """Seconds of a step of one run by itself, in PEFT's way, with as many rows in a batch."""
    run = Run("ln", model, "", steps=min(TIMED, args.max_steps), batch_size=args.batch_size, seed=args.seed)
    trainer = make_trainer(run, METHODS["ln"].prepare(load_base(task, model, args.seed), task.peft_type), task)
    begin = time.perf_counter()
    trainer.train()
    return (time.perf_counter() - begin) / trainer.state.global_step


def format_table(found: Found) -> str:
    """One rate a line."""
    columns = list(next(iter(found.values())))
    rows = [[f"{rate:g}", *(f"{values[column]:.4f}" for column in columns)] for rate, values in found.items()]
    return str(Table(["learning rate", *columns], rows))


def warn_of_rates(found: Found, chance: float | None) -> None:
    """Say which rates end no better than an answer that does not look at the input."""
    lost = [f"{rate:g}" for rate, values in found.items() if chance is not None and not values["loss"] < chance]
    if lost:
        rates = ", ".join(lost)
        say(f"warning: at {rates} the validation loss is not below that of chance ({chance:.3f}): nothing was learned")


def plot(found: Found, path: Path) -> None:
    """Draw loss and metrics over the learning rate."""
    from matplotlib.figure import Figure

    columns = list(next(iter(found.values())))
    figure = Figure(figsize=(4.2 * len(columns), 3.2), layout="constrained")
    for axis, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        axis.semilogx(list(found), [values[column] for values in found.values()], marker="o")
        axis.set_xlabel("learning rate")
        axis.set_ylabel(f"validation {column}")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_options(parser)
    parser.add_argument("--model", help="a checkpoint's name or folder; without it, an installed all-MiniLM-L6-v2")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="default: sixteen from 1e-4 to 1e-1")
    parser.add_argument("--head-learning-rate", type=float, default=HEAD_LR, help=f"of every head; default {HEAD_LR:g}")
    parser.add_argument("--max-steps", type=int, default=300, help="default 300")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of all rates together; default 32")
    parser.add_argument("--seed", type=int, default=0, help="of the head and the order of the rows; default 0")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="default runs/sweep")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Sweep, print the table and the seconds, draw the plot."""
    args = parse_args(argv)
    quiet()
    args.out.mkdir(parents=True, exist_ok=True)
    with errors_as_text():
        task, model = task_or_demo(args)
        found, seconds = sweep(task, model, args.rates, args)
    print(format_table(found))
    warn_of_rates(found, task.chance)
    alone = time_alone(task, model, args)
    rows = max(1, args.batch_size // len(args.rates))
    print(
        f"{len(found)} rates at once, {rows} rows each: {1000 * seconds:.0f} ms a step; one alone with "
        f"{args.batch_size} rows: {1000 * alone:.0f} ms"
    )
    plot(found, args.out / "sweep.png")
    print(f"wrote {args.out / 'sweep.png'}, and each rate as an adapter into a folder of its own")


if __name__ == "__main__":
    main()
