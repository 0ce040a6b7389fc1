"""`peft-lntune doctor`: whether the norms learned in a training run, from its checkpoints."""

from pathlib import Path

import click

from peft_lntune.cli.group import command as make
from peft_lntune.cli.options import csv_option, json_option

__all__ = ["command"]


@make("doctor", "Whether the norms of a training run learned, and if not, why.")
@click.argument("before")
@click.argument("after")
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    help="Largest of the run.  [default: the one that Trainer logged in AFTER, if it did]",
)
@json_option
@csv_option
def command(before: str, after: str, learning_rate: float | None, as_json: bool, csv_file: Path | None) -> None:
    """Tell whether the norms moved between the checkpoints BEFORE and AFTER of any training run, and what may be wrong.

    Both are local: a safetensors file, the index of a sharded checkpoint, the folder of a model, or the folder of a
    PEFT adapter. An adapter is compared with the model it was trained on, or with an earlier adapter. One tensor is
    read at a time. With the learning rate, the report also counts the entries that could move in the dtype of the
    files. Gradients and optimizers are not in checkpoints: run a few steps with the callback NormDoctor to see those.

    \b
    Examples:
      peft-lntune doctor ./llama ./run/checkpoint-500
      peft-lntune doctor ./run/step-100 ./run/step-500 --learning-rate 1e-4
    """
    from peft_lntune.cli.doctor import examine_checkpoints
    from peft_lntune.cli.printing import print_result, write_files

    report = examine_checkpoints(before, after, learning_rate=learning_rate)
    write_files(report.table, csv_file)
    print_result(as_json, report.to_data(), report)
