"""`peft-lntune fisher`: which entries of the norms matter for a task, as masks in a file."""

import inspect
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click
import torch
from click.core import ParameterSource
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from peft_lntune.analysis import Table, plot_score_map, score_map
from peft_lntune.cli.data import (
    NAME_COLUMNS,
    TEXT_COLUMNS,
    Labels,
    class_names,
    count_cut,
    describe_data,
    find_columns,
    find_labels,
    read_labels,
    read_table,
    read_texts,
)
from peft_lntune.cli.models import load_model
from peft_lntune.cli.tables import csv_option, plot_option, show
from peft_lntune.norms.find import find_norms
from peft_lntune.selection import FisherState, find_score, mask_density, select
from peft_lntune.selection.fisher import FISHER_KINDS
from peft_lntune.selection.scores import SCORES
from peft_lntune.selection.select import SCOPES
from peft_lntune.storage.atomic import new_file

__all__ = ["FisherMasks", "command", "fisher_masks", "load_classifier"]

_OF_DATA = (
    *("data", "text_columns", "label_column", "label_separator", "regression", "encoding"),
    *("num_samples", "batch_size", "max_length"),
)


@dataclass(frozen=True, eq=False)
class FisherMasks:
    """The result of `fisher_masks`.

    Attributes:
        scores: score of every entry by parameter name; each of the parameter's shape.
        masks: the chosen entries by parameter name, bool, True for tuned entries.
        table: one row per component, layer and parameter, with `entries`, `mean_score`, `tuned` and `share_tuned`.
        source: how the masks were made, to give to `set_masks(masks, source=...)`.
    """

    scores: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    table: Table
    source: Mapping[str, Any]


def load_classifier(
    model: str,
    labels: Sequence[Any],
    seed: int = 0,
    source: str = "the data",
    regression: bool | None = None,
    names: Sequence[str] = (),
) -> tuple[nn.Module, PreTrainedTokenizerBase, list, Labels]:
    """Load a classifier and its tokenizer, and encode the labels for it.

    A model without a head for classification gets a randomly initialized, seeded head for the classes in the labels.
    The scores then reflect that random head.

    Args:
        model: folder, or a name on the Hub.
        labels: one label per row: a number, the name of a class, or a list of classes.
        seed: seed of a random head.
        source: name of the data, for errors.
        regression: whether numbers are values; None decides by their form.
        names: names of classes that come with the data, in the order of their numbers. They name the classes of a head
            that has none of its own (`LABEL_0`, `LABEL_1`).

    Returns:
        The model, the tokenizer, the labels as numbers, and what kind of labels they are.

    Raises:
        DataError: a label is damaged, or the model's own head does not have it.
    """
    config = AutoConfig.from_pretrained(model)
    headed = any("ForSequenceClassification" in name for name in config.architectures or ())
    known = {str(name): number for name, number in (config.label2id or {}).items()} if headed else {}
    if list(known) == [f"LABEL_{number}" for number in range(len(names))]:
        known = {name: number for number, name in enumerate(names)}
    found = find_labels(labels, source, True if len(known) == 1 else regression, known)
    options = {} if headed else {"num_labels": len(found.names) or 1, "problem_type": found.problem_type}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = AutoModelForSequenceClassification.from_pretrained(model, **options)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if loaded.config.pad_token_id is None:
        loaded.config.pad_token_id = tokenizer.pad_token_id
    return loaded, tokenizer, found.encode(labels, source), found


def fisher_masks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: Sequence[tuple[str, ...]] = (),
    labels: Sequence[int | float] = (),
    *,
    score: str = "fisher",
    density: float | None = 0.2,
    count: int | None = None,
    scope: str = "global",
    kind: str = "empirical",
    num_samples: int = 1024,
    batch_size: int = 32,
    max_length: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> FisherMasks:
    """Score every gain and bias of the norms, and choose the best entries.

    Args:
        model: a classifier, on the device where it should run; any model if the score needs no data.
        tokenizer: tokenizer of the model.
        texts: one tuple per sample, with one text or a pair of texts.
        labels: one per sample: the number of a class, or the value of a regression.
        score: name of a score, such as `"fisher"`. The settings below are passed on if the score takes them.
        density: fraction of the entries to choose; None if `count` is given.
        count: number of entries to choose.
        scope: what `density` or `count` applies to: `"global"`, `"tensor"` or `"layer"`.
        kind: labels of the Fisher information: of the data (`"empirical"`), drawn from the model (`"mc"`), or the
            expectation over classes (`"exact"`).
        num_samples: number of samples to look at, drawn at random if there are more.
        batch_size: batch size of the forward and backward passes; the scores do not depend on it.
        max_length: number of tokens to keep of each text.
        seed: seed of the drawn samples and of the labels that `"mc"` draws.
        progress: show a progress bar if the pass takes long.

    Returns:
        Scores, masks, a table of where the chosen entries are, and how the masks were made.

    Raises:
        ConfigError: a setting is not allowed, or the score is unknown.
        DataError: there are no samples, or a loss is not finite.

    Example:
        >>> masks = fisher_masks(nn.Sequential(nn.LayerNorm(2)), score="random", density=None, count=1).masks
        >>> sum(int(mask.sum()) for mask in masks.values())
        1
    """
    score_function = find_score(score)
    chosen = sorted(random.Random(seed).sample(range(len(texts)), min(num_samples, len(texts))))
    device = next(model.parameters()).device

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(chosen), batch_size):
            rows = chosen[start : start + batch_size]
            columns = [list(column) for column in zip(*(texts[row] for row in rows), strict=True)]
            batch = cast(PreTrainedTokenizerBase, tokenizer)(
                *columns, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            )
            yield {**batch.to(device), "labels": torch.tensor([labels[row] for row in rows], device=device)}

    state = FisherState()
    given = {"batches": batches(), "kind": kind, "seed": seed, "state": state, "progress": progress}
    taken = inspect.signature(score_function).parameters
    scores = score_function(model, **{name: value for name, value in given.items() if name in taken})
    masks = select(scores, density=density, count=count, scope=scope)
    budget = {"density": density} if count is None else {"count": count}
    facts = {"kind": kind, "samples": state.samples, "seed": seed}
    known = {name: value for name, value in facts.items() if {"samples": "state"}.get(name, name) in taken}
    source = {"made": score, **known, **budget, "scope": scope}
    return FisherMasks(scores, masks, _table(model, scores, masks), source)


def _table(model: nn.Module, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Table:
    norms = find_norms(model)
    means, tuned, shares = (score_map(scores, norms), score_map(masks, norms, how="sum"), score_map(masks, norms))
    rows = [
        (*mean, int(number), share)
        for mean, number, share in zip(
            means.rows, tuned.column("entries_tuned"), shares.column("share_tuned"), strict=True
        )
    ]
    return Table((*means.columns, "tuned", "share_tuned"), rows)


@click.command("fisher", short_help="Which entries of the norms matter for a task, as masks.")
@click.option("--model", required=True, help="Folder of the model, or a name on the Hub.")
@click.option("--score", default="fisher", show_default=True, help=f"Score to choose by: {', '.join(SCORES)}.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Labelled texts, if the score needs them: .csv, .tsv, .jsonl or .parquet.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
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
@click.option("--density", type=float, help="Fraction of the entries to choose.  [default: 0.2]")
@click.option("--count", type=int, help="Number of entries to choose, instead of --density.")
@click.option(
    "--scope",
    type=click.Choice(SCOPES),
    default="global",
    show_default=True,
    help="Choose among all entries, or per tensor or layer.",
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
@click.option(
    "--scores", type=click.Path(path_type=Path, dir_okay=False), help="Also write the scores to this safetensors file."
)
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
      peft-lntune fisher --model ./bert-base --data pairs.csv --text-column premise --text-column hypothesis
      peft-lntune fisher --model ./bert-base --score magnitude
    """
    if density is not None and count is not None:
        raise click.UsageError("give --density or --count, not both.")
    if len(text_columns) > 2:
        raise click.UsageError("give --text-column once, or twice for pairs.")
    if density is None and count is None:
        density = 0.2
    settings |= {"score": score, "density": density, "count": count, "seed": seed}
    taken = inspect.signature(find_score(score)).parameters
    _check_options(score, set(taken))
    if "batches" not in taken:
        found = fisher_masks(load_model(model).to(device), **settings)
    elif data is None:
        raise click.UsageError(f"--score {score} needs data. Give labelled texts with --data.")
    else:
        rows = read_table(data, encoding)
        choices = [text_columns] if text_columns else TEXT_COLUMNS
        *columns, _ = find_columns(
            rows.column_names, [(*names, label_column) for names in choices], str(data), NAME_COLUMNS
        )
        texts = [read_texts(rows[column], column, str(data)) for column in columns]
        raw, names = read_labels(rows, [label_column], str(data), label_separator), class_names(rows, label_column)
        loaded, tokenizer, labels, kind = load_classifier(model, raw, seed, str(data), regression, names)
        cut = count_cut(tokenizer, texts, settings["max_length"])
        counted = f"{len(rows):,} rows of {data}"
        click.echo(describe_data(counted, columns, cut, settings["max_length"], kind.describe(labels)), err=True)
        found = fisher_masks(loaded.to(device), tokenizer, [*zip(*texts, strict=True)], labels, **settings)
    _save(found.masks, out, found.source)
    if scores is not None:
        _save(found.scores, scores, found.source)
    show(found.table, csv_file, plot, plot_score_map)
    tuned = sum(int(mask.sum()) for mask in found.masks.values())
    by = f"{found.source['samples']:,} samples" if "samples" in found.source else score
    click.echo(f"\n{tuned:,} entries ({mask_density(found.masks):.1%}) chosen by {by}; the masks are in {out}.")


def _check_options(score: str, taken: set[str]) -> None:
    """Raise a `UsageError` if an option is given that the score does not use."""
    needs = dict.fromkeys(_OF_DATA, "batches") | {"kind": "kind", "seed": "seed"}
    context = click.get_current_context()
    for name, parameter in needs.items():
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and parameter not in taken and not (name == "seed" and "batches" in taken):
            option = next(option for option in context.command.params if option.name == name)
            raise click.UsageError(f"--score {score} does not use {option.opts[0]}. Leave it out.")


def _save(tensors: Mapping[str, Tensor], file: Path, source: Mapping[str, Any]) -> None:
    with new_file(file) as made:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, made, {"format": "pt", "mask_source": json.dumps(dict(source))})
