"""Which entries of the norms matter for a task, as masks in a file."""

import inspect
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from peft_lntune.analysis import Table, score_map
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
from peft_lntune.cli.models import check_weights, load_tokenizer, read_model_config
from peft_lntune.errors import ConfigError
from peft_lntune.norms.find import find_norms
from peft_lntune.selection import FisherState, find_score, select
from peft_lntune.storage.atomic import new_file

__all__ = ["FisherMasks", "find_device", "fisher_masks", "load_classifier", "load_data", "save_masks"]


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
        ConfigError: there is no such model, or it lacks weights outside of its head, or a tokenizer.
    """
    loaded, tokenizer, encoded, found, _ = _load_classifier(model, labels, seed, source, regression, names)
    return loaded, tokenizer, encoded, found


def _load_classifier(
    model: str, labels: Sequence[Any], seed: int, source: str, regression: bool | None, names: Sequence[str]
) -> tuple[nn.Module, PreTrainedTokenizerBase, list, Labels, list[str]]:
    """As `load_classifier`, with the names of the parameters that are random."""
    config = read_model_config(model)
    headed = any("ForSequenceClassification" in name for name in config.architectures or ())
    known = {str(name): number for name, number in (config.label2id or {}).items()} if headed else {}
    if list(known) == [f"LABEL_{number}" for number in range(len(names))]:
        known = {name: number for number, name in enumerate(names)}
    found = find_labels(labels, source, True if len(known) == 1 else regression, known)
    encoded = found.encode(labels, source)
    tokenizer = load_tokenizer(model)
    options = {} if headed else {"num_labels": len(found.names) or 1, "problem_type": found.problem_type}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded, info = AutoModelForSequenceClassification.from_pretrained(model, output_loading_info=True, **options)
    body = f"{loaded.base_model_prefix}."
    missing = sorted(info["missing_keys"])
    # A pooler is read by the head alone, and models without a head are often saved without it.
    check_weights(model, [name for name in missing if headed or (name.startswith(body) and ".pooler." not in name)])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if loaded.config.pad_token_id is None:
        loaded.config.pad_token_id = tokenizer.pad_token_id
    return loaded, tokenizer, encoded, found, missing


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
    max_per_norm: int | None = None,
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
        max_per_norm: choose at most this many entries of each norm, weight and bias together. None: no limit.
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
    masks = select(scores, density=density, count=count, scope=scope, max_per_norm=max_per_norm)
    budget = {"density": density} if count is None else {"count": count}
    facts = {"kind": kind, "samples": state.samples, "seed": seed}
    known = {name: value for name, value in facts.items() if {"samples": "state"}.get(name, name) in taken}
    source = {"made": score, **known, **budget, "scope": scope}
    if max_per_norm is not None:
        source["max_per_norm"] = max_per_norm
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


def find_device(name: str) -> torch.device:
    """Check the name of a device before a model is read.

    Args:
        name: such as `"cpu"`, `"cuda"` or `"cuda:1"`.

    Returns:
        The device.

    Raises:
        ConfigError: the name is not known, or this machine does not have the device.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device).add_(1)
    except Exception as error:  # torch raises RuntimeError, AssertionError or NotImplementedError, by device
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(f"device {name!r} cannot be used: {reason}. Give another one, such as cpu.") from error
    return device


def load_data(
    model: str,
    data: Path,
    text_columns: Sequence[str],
    label_column: str,
    *,
    label_separator: str | None = None,
    regression: bool | None = None,
    encoding: str = "utf-8-sig",
    max_length: int = 128,
    seed: int = 0,
) -> tuple[nn.Module, PreTrainedTokenizerBase, list[tuple[str, ...]], list, str]:
    """Read labelled texts, and load a classifier for them. The texts are checked before the model is read.

    Args:
        model: folder, or a name on the Hub.
        data: file of texts and labels, as for `read_table`.
        text_columns: one column of texts, or two for pairs; none: those in `TEXT_COLUMNS`.
        label_column: column of labels.
        label_separator: what stands between the classes of a row, if a row can have several.
        regression: whether numbers are values; None decides by their form.
        encoding: of a text file.
        max_length: number of tokens that are kept of each text.
        seed: seed of a random head.

    Returns:
        The model, its tokenizer, a tuple of texts per row, a label per row, and lines that say what was read.

    Raises:
        DataError: the file, a column, a text or a label is missing or damaged, or does not fit the model's head.
    """
    rows = read_table(data, encoding)
    choices = [tuple(text_columns)] if text_columns else TEXT_COLUMNS
    *columns, _ = find_columns(
        rows.column_names, [(*names, label_column) for names in choices], str(data), NAME_COLUMNS
    )
    texts = [read_texts(rows[column], column, str(data)) for column in columns]
    raw, names = read_labels(rows, [label_column], str(data), label_separator), class_names(rows, label_column)
    loaded, tokenizer, labels, kind, missing = _load_classifier(model, raw, seed, str(data), regression, names)
    cut = count_cut(tokenizer, texts, max_length)
    said = describe_data(f"{len(rows):,} rows of {data}", columns, cut, max_length, kind.describe(labels))
    if missing:
        said += f"\n{model} has no weights for {', '.join(missing)}: random, with seed {seed}"
    return loaded, tokenizer, [*zip(*texts, strict=True)], labels, said


def save_masks(tensors: Mapping[str, Tensor], file: Path, source: Mapping[str, Any]) -> None:
    """Write masks or scores as safetensors. The file appears whole or not at all.

    Args:
        tensors: by parameter name.
        file: the file.
        source: how they were made, for the metadata.
    """
    with new_file(file) as made:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, made, {"format": "pt", "mask_source": json.dumps(dict(source))})
