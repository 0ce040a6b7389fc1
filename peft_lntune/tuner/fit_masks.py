"""The second step of a `FisherLNConfig`: score the entries on data, and tune only the best."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from peft_lntune.analysis.tables import Table
from peft_lntune.config import FisherLNConfig
from peft_lntune.core.delta import PARAMETERS
from peft_lntune.errors import ConfigError, PeftLNTuneError, UnsupportedError
from peft_lntune.layers.held import deltas_of
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.selection import FisherState, mask_density, select
from peft_lntune.selection.fisher import add_samples, own_share, several_processes
from peft_lntune.selection.losses import Batch, Loss
from peft_lntune.tuner.model import LNTuneModel
from peft_lntune.tuner.state_dict import planned_deltas

__all__ = ["FisherFit", "fit_fisher_masks"]


@dataclass(frozen=True, eq=False)
class FisherFit:
    """The result of `fit_fisher_masks`. Printing it shows where the chosen entries are.

    Attributes:
        scores: Fisher information of every entry, by parameter name; each of the parameter's shape.
        masks: the chosen entries by parameter name, bool, True for tuned entries; each of the parameter's shape.
        samples: number of samples looked at.
        roles: role of the norm by parameter name, for the table; `-` if the module is not a norm.
    """

    scores: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    samples: int
    roles: Mapping[str, str]

    def __str__(self) -> str:
        groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name in self.masks:
            groups[self.roles[name]][name.rpartition(".")[2]].append(name)
        found = {kind for group in groups.values() for kind in group}
        kinds = [*(kind for kind in PARAMETERS if kind in found), *sorted(found.difference(PARAMETERS))]
        rows = [(role, *(self._share(group.get(kind, [])) for kind in kinds)) for role, group in groups.items()]
        table = str(Table(("role", *kinds), rows)).splitlines()
        used = sum(bool(mask.any()) for mask in self.masks.values())
        head = f"{self._share(list(self.masks))} of the entries, in {used} of {len(self.masks)} parameters"
        return "\n".join([f"{head}, chosen by {self.samples:,} samples", *(f"  {line}" for line in table)])

    def _share(self, names: Iterable[str]) -> str:
        masks = {name: self.masks[name] for name in names}
        chosen, size = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
        return f"{chosen:,} of {size:,} ({100 * mask_density(masks):.1f} %)" if masks else "-"


def fit_fisher_masks(
    peft_model: PeftModel,
    batches: Iterable[Batch],
    adapter_name: str = "default",
    *,
    loss: Loss | str | None = None,
    refit: bool = False,
) -> FisherFit:
    """Choose the entries that an adapter with a `FisherLNConfig` tunes, in one pass over batches of its task.

    The deltas become new parameters with one value per chosen entry, so call this before making the optimizer. The
    model is scored as it is, with all active adapters in effect, and is otherwise left unchanged.

    With several processes of `torch.distributed`, call this in all of them, before the model is wrapped, each with its
    own batches, such as those of a prepared `DataLoader`. The processes share the samples and choose the same entries.
    An error in one process raises in all. A process may have no samples.

    Source: ValizadehAslani and Liang 2024 (arXiv 2403.20284).

    Args:
        peft_model: a model from `get_peft_model`; the adapter is active and its deltas are zero.
        batches: dicts of tensors with labels, such as those of a `DataLoader`. Only the first `num_samples` samples
            are used; the config sets that number.
        adapter_name: the adapter.
        loss: a key of `peft_lntune.selection.losses.LOSS_HEADS`, such as `"causal_lm_sum"`, or a function
            `(outputs, batch) -> (B,)`; None: the loss of the model's own head.
        refit: choose again for an adapter that was trained. All entries that its config selects are scored with the
            adapter in effect, and the chosen ones start from zero.

    Returns:
        Scores, masks and a summary to print.

    Raises:
        ConfigError: the adapter is unknown, not active, of another kind, or already trained; the scores are refused; or
            the processes have different configs.
        DataError: there are no batches or no labels, or a loss is not finite.
        UnsupportedError: the adapter is merged, or per-sample gradients cannot be computed. After an error nothing has
            changed.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> model = BertForSequenceClassification(config)
        >>> peft_model = get_peft_model(model, FisherLNConfig(task_type="SEQ_CLS", density=0.25, num_samples=4))
        >>> batch = {"input_ids": torch.randint(9, (4, 5)), "labels": torch.tensor([0, 1, 1, 0])}
        >>> print(str(fit_fisher_masks(peft_model, [batch])).splitlines()[0].partition(",")[0])
        12 of 48 (25.0 %) of the entries
    """
    (config, roles), *others = _in_all_processes(lambda: _prepared(peft_model, adapter_name, refit))
    for number, other in enumerate(others, start=1):
        if other != (config, roles):
            raise ConfigError(
                f"process {number} fits another adapter than process 0: config, model and adapter_name should be the "
                f"same in all processes. {config!r} in process 0, {other[0]!r} in process {number}."
            )
    first, samples = own_share(config.num_samples)
    state = FisherState(first)
    how = config.fisher, roles, loss, config.seed
    _in_all_processes(lambda: add_samples(state, peft_model, batches, *how, num_samples=samples))
    state = state.of_all_processes()
    scores = state.scores()
    masks = select(scores, density=config.density, scope=config.scope, max_per_norm=config.max_per_norm)
    source = {
        "made": "fisher",
        "kind": config.fisher,
        "samples": state.samples,
        "seed": config.seed,
        "density": config.density,
        "scope": config.scope,
    }
    if config.max_per_norm is not None:
        source["max_per_norm"] = config.max_per_norm
    tuner = peft_model.base_model
    if config.mask_source is not None:
        tuner.clear_masks(adapter_name)
    with torch.no_grad():
        for delta in deltas_of(peft_model, adapter_name).values():
            delta.weight.zero_()
    tuner.set_masks(masks, adapter_name, source)
    if state.samples < config.num_samples:
        warnings.warn(
            f"num_samples={config.num_samples}, but the batches held {state.samples}; the masks were made from those.",
            stacklevel=2,
        )
    return FisherFit(scores, masks, state.samples, roles)


T = TypeVar("T")


def _in_all_processes(work: Callable[[], T]) -> list[T]:
    """The result of `work` in each process. If it fails in one process, raise in all."""
    if not several_processes():
        return [work()]
    found, error = None, None
    try:
        found = work()
    except Exception as raised:
        error = raised
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (found, None if error is None else (type(error).__name__, str(error))))
    if error is not None:
        raise error
    for number, (_, failed) in enumerate(told):
        if failed is not None:
            kind = {own.__name__: own for own in PeftLNTuneError.__subclasses__()}.get(failed[0], PeftLNTuneError)
            raise kind(f"process {number} failed ({failed[0]}: {failed[1]}), so no process has fitted masks.")
    return [found for found, _ in told]


def _prepared(peft_model: PeftModel, adapter_name: str, refit: bool) -> tuple[FisherLNConfig, dict[str, str]]:
    """The config of the adapter, and the role of each parameter that it selects."""
    config = _fitting(peft_model, adapter_name, refit)
    parts = planned_deltas(ModelFacts(peft_model.get_base_model()), peft_model.peft_config[adapter_name])
    return config, {f"{name}.{part.own_name(p)}": part.roles for name, part in parts.items() for p in part.entries}


def _fitting(peft_model: PeftModel, adapter_name: str, refit: bool) -> FisherLNConfig:
    """The config of the adapter, checked for whether its masks can be fitted now."""
    tuner = getattr(peft_model, "base_model", None)
    if not isinstance(peft_model, PeftModel) or not isinstance(tuner, LNTuneModel):
        raise ConfigError(
            f"fit_fisher_masks takes a PeftModel with adapters of this package, but got {type(peft_model).__name__}. "
            'Make one with get_peft_model(model, FisherLNConfig(task_type="SEQ_CLS")).'
        )
    whole = peft_model.peft_config.get(adapter_name)
    if whole is None:
        raise ConfigError(f"adapter {adapter_name!r} not found; this model has {list(peft_model.peft_config)}.")
    config = whole.deltas
    if not isinstance(config, FisherLNConfig):
        raise ConfigError(
            f"adapter {adapter_name!r} has a {type(whole).__name__}, and masks are fitted for a FisherLNConfig. "
            "Make the adapter with that, or give masks of your own to peft_model.set_masks."
        )
    if adapter_name not in tuner.active_adapters:
        raise ConfigError(
            f"adapter {adapter_name!r} is not active (active: {', '.join(tuner.active_adapters)}), and the model is "
            f"scored as it is. Call peft_model.set_adapter({adapter_name!r}) first."
        )
    if any(layer.merged for layer in tuner.tuner_layers()):
        raise UnsupportedError("an adapter is merged into the base model; call unmerge_adapter() first.")
    trained = [place for place, delta in deltas_of(peft_model, adapter_name).items() if delta.weight.any()]
    if trained and not refit:
        raise ConfigError(
            f"adapter {adapter_name!r} has been trained: {len(trained)} of its deltas are not zero, such as "
            f"{trained[0]}. Fit masks before training, or pass refit=True to choose again and start from zero."
        )
    return config
