"""Masks over the weights of components, or of named modules."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.config import SupermaskConfig
from peft_lntune.core.delta import ParameterSlice
from peft_lntune.errors import NoMatchError, UnsupportedError
from peft_lntune.layers import ModuleLayer
from peft_lntune.layers.held import supermasks_of
from peft_lntune.planning.components import find_component_parameters
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.methods.method import Counts
from peft_lntune.planning.methods.replacing import ReplacingMethod
from peft_lntune.planning.targets import is_chosen, is_saved
from peft_lntune.planning.types import Plan, PlannedModule
from peft_lntune.storage.packing import ROOT, pack_scores, unpack_scores

__all__ = ["Supermasks", "with_scores"]


class Supermasks(ReplacingMethod):
    """A mask over each chosen weight."""

    name = "supermask"
    no_sum = (
        "has supermasks, and a weighted sum of masks is not a mask. Make several active instead, which keeps what all "
        "of them keep: peft_model.base_model.set_adapter({names!r})."
    )

    def plan(self, facts: ModelFacts, config: SupermaskConfig, counts: Counts = None) -> Plan:
        """Plan a mask over each chosen weight.

        Args:
            facts: facts of the model.
            config: says which components, modules and layers.
            counts: not used; every entry of a chosen weight has a score.

        Returns:
            The plan. Its `bytes` are those of the saved bits.

        Raises:
            NoMatchError: no weight is chosen.
            UnsupportedError: a chosen module is a norm, or has no floating weight.
        """
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
            names = config.components
            chosen = f"components={names!r}" if names else f"target_modules={config.target_modules}"
            raise NoMatchError(
                f"{chosen} selects no weight in the chosen layers of this model. `parameter_change` lists the "
                "components of a model; or name modules in target_modules."
            )
        return Plan(parts)

    def stored_entries(self, config: SupermaskConfig, part: PlannedModule) -> int:
        """Count the bytes of a saved mask: eight bits are one element of a file.

        Args:
            config: the config.
            part: a module of its plan.

        Returns:
            The number of elements.
        """
        return -(-super().stored_entries(config, part) // 8)

    def update(self, layer: ModuleLayer, adapter_name: str, config: Any, part: PlannedModule, stored: bool) -> None:
        """Add a supermask to a layer.

        Args:
            layer: the layer around the module.
            adapter_name: the new adapter.
            config: a `SupermaskConfig`.
            part: the plan of the module.
            stored: whether the values come from a file.
        """
        layer.add_supermask(adapter_name, config, part.blocks.get("weight"), stored)

    def to_file(self, tensors: dict[str, Tensor], config: SupermaskConfig) -> dict[str, Tensor]:
        """Pack scores into bits; the scores are kept as well if `save_scores` is set.

        Args:
            tensors: tensors by name, without the adapter's name.
            config: the supermask part of the adapter.

        Returns:
            A new dict.
        """
        return pack_scores(tensors, config.save_scores)

    def from_file(self, model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert saved masks to scores if the adapter is trained, else to bits.

        Args:
            model: the model with the adapter.
            adapter_name: the adapter.
            tensors: the state dict of the file.

        Returns:
            A new dict.

        Raises:
            AdapterFileError: the bits do not fit this model.
        """
        shapes = {
            name.removeprefix(ROOT): (mask.part_shape, None if mask.weight is None else mask.score)
            for name, mask in supermasks_of(model, adapter_name).items()
        }
        return with_scores(tensors, shapes, adapter_name)

    def mask_shapes(self, facts: ModelFacts, config: SupermaskConfig, plan: Plan, trained: bool) -> dict[str, Any]:
        """List the supermasks that an adapter would have in a model, before it is injected.

        Args:
            facts: facts of the model.
            config: the config.
            plan: the plan of that config.
            trained: whether the adapter will be trained.

        Returns:
            For each module, the shape of the mask and the score that a saved bit becomes (None if not trained).
        """
        shapes: dict[str, tuple[torch.Size, float | None]] = {}
        for name, part in plan.parts.items():
            weight: Any = facts.modules[name].weight
            block = part.blocks.get("weight")
            shape = weight.shape if block is None else block.shape_in(weight.shape)
            shapes[name] = shape, config.initial_score if trained else None
        return shapes


def with_scores(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[torch.Size, float | None]], adapter_name: str
) -> dict[str, Tensor]:
    """Convert saved supermasks to scores if they are trained, else to bits; warn if scores were not saved.

    Args:
        tensors: the state dict of the file.
        shapes: for each module, the shape of its mask and the score that a saved bit becomes (None if not trained).
        adapter_name: the adapter, for messages.

    Returns:
        A new dict.

    Raises:
        AdapterFileError: the bits do not fit this model.
    """
    found, made = unpack_scores(tensors, shapes, f"the saved adapter for {adapter_name!r}")
    if made:
        warnings.warn(
            f"adapter {adapter_name!r} is loaded to be trained, but {len(made)} of its supermasks were saved as bits "
            "alone, so their scores start again at plus or minus initial_score. To continue training without a break, "
            "save with SupermaskConfig(save_scores=True).",
            stacklevel=3,
        )
    return found
