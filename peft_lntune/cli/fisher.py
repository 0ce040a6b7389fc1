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
    count_cut,
    find_columns,
    find_labels,
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
    "data",
    "text_columns",
    "label_column",
    "regression",
    "encoding",
    "num_samples",
    "batch_size",
    "max_length",
)


@dataclass(frozen=True, eq=False)
class FisherMasks:
    """What `fisher_masks` found.

    Attributes:
        scores: Fisher information by parameter.
        masks: the chosen entries, bool, True where tuned.
        table: a row a component, layer and parameter: `entries`, `mean_score`, `tuned` and `share_tuned`.
        source: how the masks were made, as `set_masks(masks, source=...)` records it.
    """

    scores: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    table: Table
    source: Mapping[str, Any]


def load_classifier(
    model: str, labels: Sequence[Any], seed: int = 0, source: str = "the data", regression: bool | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase, list]:
    """A classifier with its tokenizer, and the labels as it takes them.

    A folder without a head for classification gets a fresh one, seeded, with as many classes as there are labels:
    scores are then those of an arbitrary readout.

    Args:
        model: folder, or a name on the Hub.
        labels: as `find_labels` takes them.
        seed: of the fresh head.
        source: where the labels are from, for errors.
        regression: whether numbers are values; None decides by their look.

    Raises:
        DataError: a label that the model's own head does not have.
    """
    config = AutoConfig.from_pretrained(model)
    headed = any("ForSequenceClassification" in name for name in config.architectures or ())
    known = {str(name): number for name, number in (config.label2id or {}).items()} if headed else {}
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
    return loaded, tokenizer, found.encode(labels, source)


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
    """Score every gain and bias, and choose the best.

    Args:
        model: a classifier, on the device where it should run; any model where the score takes no data.
        tokenizer: of the model.
        texts: of each sample one text, or two of a pair.
        labels: class numbers, or values of a regression.
        score: a name that `find_score` knows. What follows is given to a score that takes it.
        density: fraction of the entries to choose; None where `count` is given.
        count: how many entries to choose.
        scope: over what they are meant: `"global"`, `"tensor"` or `"layer"`.
        kind: `"empirical"`, `"mc"` or `"exact"`; see `fisher_scores`.
        num_samples: how many rows to look at, drawn at random where there are more.
        batch_size: of the forward and backward passes; the scores do not depend on it.
        max_length: tokens of a text; longer ones are cut.
        seed: which rows are drawn, and the labels that `"mc"` draws.
        progress: show a bar where the pass takes long.

    Returns:
        Scores, masks, a table of where the chosen entries are, and how they were made.

    Raises:
        ConfigError: a setting is not allowed, or the score is not known.
        DataError: there are no rows, or a loss that is not finite.

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
@click.option("--score", default="fisher", show_default=True, help=f"What is large: {', '.join(SCORES)}.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Labelled texts, where the score needs them: .csv, .tsv, .jsonl or .parquet.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="masks.safetensors",
    show_default=True,
    help="Masks by parameter, bool, with how they were made.",
)
@click.option(
    "--text-column",
    "text_columns",
    multiple=True,
    metavar="NAME",
    help="Twice for pairs.  [default: text, sentence, ...]",
)
@click.option(
    "--label-column", default="label", show_default=True, metavar="NAME", help="Class numbers, names, or values."
)
@click.option(
    "--regression/--no-regression", default=None, help="Whether numbers are values.  [default: by their look]"
)
@click.option("--encoding", default="utf-8-sig", show_default=True, help="Of a text file, such as latin-1.")
@click.option("--density", type=float, help="Fraction of the entries to choose.  [default: 0.2]")
@click.option("--count", type=int, help="How many entries to choose; instead of --density.")
@click.option(
    "--scope", type=click.Choice(SCOPES), default="global", show_default=True, help="Over what they are meant."
)
@click.option(
    "--kind", type=click.Choice(FISHER_KINDS), default="empirical", show_default=True, help="Where labels come from."
)
@click.option(
    "--num-samples", type=click.IntRange(1), default=1024, show_default=True, help="Rows to look at, drawn at random."
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Does not change the scores.")
@click.option("--max-length", type=click.IntRange(1), default=128, show_default=True, help="Tokens of a text.")
@click.option("--seed", default=0, show_default=True, help="Of the drawn rows and labels, and of a fresh head.")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs, such as cuda.")
@click.option(
    "--scores", type=click.Path(path_type=Path, dir_okay=False), help="Write the scores there too, as safetensors."
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
    """Score every gain and bias of the norms, by Fisher information on labelled texts or otherwise, and write masks of
    the best.

    A model without a head for classification gets a fresh one, so the scores are those of an arbitrary readout. In
    Python: peft_model.set_masks(safetensors.torch.load_file("masks.safetensors")).

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
        raise click.UsageError(f"--score {score} looks at data. Give labelled texts with --data.")
    else:
        rows = read_table(data, encoding)
        choices = [text_columns] if text_columns else TEXT_COLUMNS
        *columns, _ = find_columns(
            rows.column_names, [(*names, label_column) for names in choices], str(data), NAME_COLUMNS
        )
        texts = [read_texts(rows[column], column, str(data)) for column in columns]
        loaded, tokenizer, labels = load_classifier(model, rows[label_column][:], seed, str(data), regression)
        cut = count_cut(tokenizer, texts, settings["max_length"])
        click.echo(f"{data}: {len(rows):,} rows with {' and '.join(columns)}, {cut:,} of them cut", err=True)
        found = fisher_masks(loaded.to(device), tokenizer, [*zip(*texts, strict=True)], labels, **settings)
    _save(found.masks, out, found.source)
    if scores is not None:
        _save(found.scores, scores, found.source)
    show(found.table, csv_file, plot, plot_score_map)
    tuned = sum(int(mask.sum()) for mask in found.masks.values())
    by = f"{found.source['samples']:,} samples" if "samples" in found.source else score
    click.echo(f"\n{tuned:,} entries ({mask_density(found.masks):.1%}) chosen by {by}; the masks are in {out}.")


def _check_options(score: str, taken: set[str]) -> None:
    """Raise a `UsageError` where an option is given that the score does not look at."""
    needs = dict.fromkeys(_OF_DATA, "batches") | {"kind": "kind", "seed": "seed"}
    context = click.get_current_context()
    for name, parameter in needs.items():
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and parameter not in taken and not (name == "seed" and "batches" in taken):
            option = next(option for option in context.command.params if option.name == name)
            raise click.UsageError(f"{option.opts[0]} means nothing to --score {score}. Leave it out.")


def _save(tensors: Mapping[str, Tensor], file: Path, source: Mapping[str, Any]) -> None:
    with new_file(file) as made:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, made, {"format": "pt", "mask_source": json.dumps(dict(source))})
