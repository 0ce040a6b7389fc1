"""Masks over the weights of components, or of modules that are named."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from peft_lntune.config import SupermaskConfig
from peft_lntune.core.delta import ParameterSlice
from peft_lntune.errors import NoMatchError, UnsupportedError
from peft_lntune.layers import ModuleLayer
from peft_lntune.layers.held import supermasks_of
from peft_lntune.planning.components import find_component_parameters
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.methods.method import Counts, WeightedSum
from peft_lntune.planning.methods.replacing import ReplacingMethod
from peft_lntune.planning.targets import is_chosen, is_saved
from peft_lntune.planning.types import Plan, PlannedModule
from peft_lntune.storage.packing import ROOT, pack_scores, unpack_scores

__all__ = ["Supermasks", "with_scores"]


class Supermasks(ReplacingMethod):
    """A mask over each chosen weight."""

    name = "supermask"

    def plan(self, facts: ModelFacts, config: SupermaskConfig, counts: Counts = None) -> Plan:
        places: dict[str, dict[str, ParameterSlice | None]]
        if config.components is not None:
            places = find_component_parameters(facts, config.components, config.parameters)
        else:
            places = {name: {"weight": None} for name in facts.modules if name}
        parts: dict[str, PlannedModule] = {}
        for name, found in places.items():
            if not is_chosen(config, name) or is_saved(config, name):
                continue
            if name in facts.norms:
                raise UnsupportedError(
                    f"{name} is named in target_modules, and a supermask is for matrices: it would switch off whole "
                    "features of a norm. Tune norms with LNTuningConfig, as another part or another adapter."
                )
            part = self.select(config, name, facts.modules[name], only=found)
            ((_, size),) = part.entries.values()
            parts[name] = replace(part, bytes=-(-size // 8))
        if not parts:
            given = config.components, config.target_modules
            chosen = f"components={given[0]!r}" if given[0] else f"target_modules={given[1]}"
            raise NoMatchError(
                f"{chosen} selects no weight in the chosen layers of this model. `parameter_change` names the "
                "components it has; or name modules in target_modules."
            )
        return Plan(parts)

    def stored_entries(self, config: SupermaskConfig, part: PlannedModule) -> int:
        return -(-super().stored_entries(config, part) // 8)  # eight bits are one element

    def update(self, layer: ModuleLayer, adapter_name: str, config: Any, part: PlannedModule, stored: bool) -> None:
        layer.add_supermask(adapter_name, config, part.blocks.get("weight"), stored)

    def to_file(self, tensors: dict[str, Tensor], config: SupermaskConfig) -> dict[str, Tensor]:
        return pack_scores(tensors, config.save_scores)

    def from_file(self, model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with scores where this adapter's supermasks are trained, and bits where they are not."""
        shapes = {
            name.removeprefix(ROOT): (mask.part_shape, None if mask.weight is None else mask.score)
            for name, mask in supermasks_of(model, adapter_name).items()
        }
        return with_scores(tensors, shapes, adapter_name)

    def mask_shapes(self, facts: ModelFacts, config: SupermaskConfig, plan: Plan, trained: bool) -> dict[str, Any]:
        shapes: dict[str, tuple[torch.Size, float | None]] = {}
        for name, part in plan.parts.items():
            weight: Any = facts.modules[name].weight
            block = part.blocks.get("weight")
            shape = weight.shape if block is None else block.shape_in(weight.shape)
            shapes[name] = shape, config.initial_score if trained else None
        return shapes

    def sum_parts(self, facts: ModelFacts, parts: Mapping[str, Sequence[Any]], wanted: WeightedSum) -> list[PeftConfig]:
        name, instead = next(iter(parts)), f"peft_model.base_model.set_adapter({list(wanted.totals)!r})"
        raise UnsupportedError(
            f"adapter {name!r} has supermasks, and a weighted sum of masks is no mask. Make several active instead, "
            f"which keeps what all of them keep: {instead}."
        )


def with_scores(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[torch.Size, float | None]], adapter_name: str
) -> dict[str, Tensor]:
    """The tensors of a file with what each supermask is made for; see `unpack_scores`.

    Args:
        tensors: the state dict of the file.
        shapes: the shape of each supermask, by module; and where it is trained, the score that a bit starts from.
        adapter_name: for messages.

    Returns:
        A new dict.

    Raises:
        AdapterFileError: the bits are not those of this model.
    """
    found, made = unpack_scores(tensors, shapes, f"the saved adapter for {adapter_name!r}")
    if made:
        warnings.warn(
            f"adapter {adapter_name!r} is loaded to be trained, but {len(made)} of its supermasks were saved as bits "
            "alone: all their scores start anew, at plus or minus initial_score. To go on as if training had not "
            "stopped, save with SupermaskConfig(save_scores=True).",
            stacklevel=3,
        )
    return found
