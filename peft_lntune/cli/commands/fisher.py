"""`peft-lntune fisher`: which entries of the norms matter for a task, as masks in a file."""

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click

from peft_lntune.cli.group import command as make
from peft_lntune.cli.options import OutFile, check_encoding, csv_option, is_given, json_option, plot_option
from peft_lntune.core.choices import FISHER_KINDS, SCOPES

__all__ = ["command"]

_OF_DATA = (
    *("data", "text_columns", "label_column", "label_separator", "regression", "encoding"),
    *("num_samples", "batch_size", "max_length"),
)


def _check(
    density: float | None,
    count: int | None,
    text_columns: tuple[str, ...],
    label_column: str,
    encoding: str,
    out: Path,
    scores: Path | None,
    **_: Any,
) -> None:
    if density is not None and count is not None:
        raise click.UsageError("give --density or --count, not both.")
    if len(text_columns) > 2:
        raise click.UsageError("give --text-column once, or twice for pairs.")
    if label_column in text_columns:
        raise click.UsageError(f"--text-column and --label-column both name {label_column!r}.")
    if scores is not None and scores.absolute() == out.absolute():
        raise click.UsageError(f"--scores and --out both name {out}.")
    check_encoding(encoding)


def _check_used(score: str, taken: Collection[str]) -> None:
    """Refuse options that the score does not use."""
    needs = dict.fromkeys(_OF_DATA, "batches") | {"kind": "kind", "seed": "seed"}
    for name, parameter in needs.items():
        if is_given(name) and parameter not in taken and not (name == "seed" and "batches" in taken):
            option = next(option for option in click.get_current_context().command.params if option.name == name)
            raise click.UsageError(f"--score {score} does not use {option.opts[0]}. Leave it out.")


@make("fisher", "Which entries of the norms matter for a task, as masks.", _check)
@click.option("--model", required=True, help="Folder of the model, or a name on the Hub.")
@click.option(
    "--score",
    default="fisher",
    show_default=True,
    help="Score to choose by: fisher, magnitude, median-distance or random.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Labelled texts, if the score needs them: .csv, .tsv, .jsonl or .parquet.",
)
@click.option(
    "--out",
    type=OutFile(),
    default="masks.safetensors",
    show_default=True,
    help="File for the masks: one bool tensor per parameter.",
)
@click.option(
    "--text-column",
    "text_columns",
    multiple=True,
    metavar="NAME",
    help="Column of texts; give it twice for pairs.  [default: text, sentence, ...]",
)
@click.option(
    "--label-column", default="label", show_default=True, metavar="NAME", help="Column of classes, or of values."
)
@click.option(
    "--label-separator", metavar="TEXT", help="What stands between the classes of a row, as | in toxic|insult."
)
@click.option(
    "--regression/--no-regression",
    default=None,
    help="Whether numbers are values; with no, each label is a class.  [default: by their form]",
)
@click.option("--encoding", default="utf-8-sig", show_default=True, help="Encoding of a text file, such as latin-1.")
@click.option(
    "--density", type=click.FloatRange(0, 1, min_open=True), help="Fraction of the entries to choose.  [default: 0.2]"
)
@click.option("--count", type=click.IntRange(1), help="Number of entries to choose, instead of --density.")
@click.option(
    "--scope",
    type=click.Choice(SCOPES),
    default="global",
    show_default=True,
    help="Choose among all entries, or per tensor or layer.",
)
@click.option(
    "--max-per-norm",
    type=click.IntRange(1),
    metavar="N",
    help="Choose at most N entries of each norm, so that the adapter exports as LoRA of rank N without loss.",
)
@click.option(
    "--kind", type=click.Choice(FISHER_KINDS), default="empirical", show_default=True, help="Where labels come from."
)
@click.option(
    "--num-samples", type=click.IntRange(1), default=1024, show_default=True, help="Rows to look at, drawn at random."
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Does not change the scores.")
@click.option(
    "--max-length", type=click.IntRange(1), default=128, show_default=True, help="Tokens to keep of each text."
)
@click.option("--seed", default=0, show_default=True, help="Seed of drawn rows and labels, and of a random head.")
@click.option("--device", default="cpu", show_default=True, help="Device of the model, such as cuda.")
@click.option("--scores", type=OutFile(), help="Also write the scores to this safetensors file.")
@json_option
@csv_option
@plot_option
def command(
    model: str,
    score: str,
    data: Path | None,
    out: Path,
    text_columns: tuple[str, ...],
    label_column: str,
    label_separator: str | None,
    regression: bool | None,
    encoding: str,
    density: float | None,
    count: int | None,
    seed: int,
    device: str,
    scores: Path | None,
    as_json: bool,
    csv_file: Path | None,
    plot: Path | None,
    **settings: Any,
) -> None:
    """Score every gain and bias of the norms, by Fisher information or another score, and write masks of the best.

    A model without a head for classification gets a randomly initialized head, and the scores then reflect that head.
    To use the masks in Python: peft_model.set_masks(safetensors.torch.load_file("masks.safetensors")).

    \b
    Examples:
      peft-lntune fisher --model ./bert-base --data train.jsonl --density 0.1
      peft-lntune fisher --model ./bert-base --data pairs.csv \\
        --text-column premise --text-column hypothesis
      peft-lntune fisher --model ./bert-base --score magnitude
      peft-lntune fisher --model ./llm --data train.jsonl --max-per-norm 64
    """
    import inspect

    from peft_lntune.analysis import plot_score_map
    from peft_lntune.cli.fisher import find_device, fisher_masks, load_data, save_masks
    from peft_lntune.cli.models import load_model
    from peft_lntune.cli.printing import print_result, write_files
    from peft_lntune.selection import find_score, mask_density

    if density is None and count is None:
        density = 0.2
    settings |= {"score": score, "density": density, "count": count, "seed": seed, "progress": sys.stderr.isatty()}
    taken = inspect.signature(find_score(score)).parameters
    _check_used(score, taken)
    place = find_device(device)
    if "batches" not in taken:
        found = fisher_masks(load_model(model).to(place), **settings)
    elif data is None:
        raise click.UsageError(f"--score {score} needs data. Give labelled texts with --data.")
    else:
        loaded, tokenizer, texts, labels, said = load_data(
            model,
            data,
            text_columns,
            label_column,
            label_separator=label_separator,
            regression=regression,
            encoding=encoding,
            max_length=settings["max_length"],
            seed=seed,
        )
        click.echo(said, err=True)
        found = fisher_masks(loaded.to(place), tokenizer, texts, labels, **settings)
    save_masks(found.masks, out, found.source)
    if scores is not None:
        save_masks(found.scores, scores, found.source)
    write_files(found.table, csv_file, plot, plot_score_map)
    tuned = sum(int(mask.sum()) for mask in found.masks.values())
    by = f"{found.source['samples']:,} samples" if "samples" in found.source else score
    below = f"{tuned:,} entries ({mask_density(found.masks):.1%}) chosen by {by}; the masks are in {out}."
    facts = {"table": found.table, "tuned": tuned, "source": found.source, "masks": out, "scores": scores}
    print_result(as_json, facts, found.table, below)
