"""Checks what the config of a saved adapter claims against its weight file, before any module is made."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig

from peft_lntune.config import LNTuneConfig
from peft_lntune.errors import AdapterFileError
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.methods import method_of
from peft_lntune.planning.types import Plan
from peft_lntune.storage.keys import is_ours
from peft_lntune.storage.renaming import is_renamed

__all__ = ["check_architecture", "check_claims", "check_same_architecture", "model_type_of"]

_SLACK = 1 << 20
"""How many more entries a plan may have than the file, because parts are counted a little differently: 4 MB."""


def model_type_of(model: Any) -> str | None:
    """The `model_type` that transformers gives a model or a config; None for any other model."""
    found = getattr(getattr(model, "config", model), "model_type", None)
    return found if isinstance(found, str) and found else None


_RENAMED = (
    "Load it into the model that it was trained on. If the two are one architecture under two names, say so with "
    "key_mapping={}, an argument of PeftModel.from_pretrained and load_adapter."
)


def check_architecture(
    config: PeftConfig,
    model: Any,
    where: str = "this adapter",
    into: str = "this model",
    advice: str = _RENAMED,
) -> None:
    """Refuse an adapter that was saved from another architecture than the given model's.

    A `key_mapping` given to the loader says that the two architectures are the same under other names, so the check
    is then left out.

    Args:
        config: of the saved adapter.
        model: the model to load into, or its config.
        where: what to call the adapter in the message.
        into: what to call the model in the message.
        advice: what to do next, for the message.

    Raises:
        AdapterFileError: the two architectures differ.
    """
    saved = (getattr(config, "manifest", None) or {}).get("model_type")
    if saved and not is_renamed():
        _check_types(saved, model_type_of(model), where, into, "it was saved from", advice)


def check_same_architecture(source: Any, model: Any, where: str) -> None:
    """Refuse an adapter of a model in memory whose architecture is another one than the given model's.

    Two architectures may name their norms alike, and compute something else with them.

    Args:
        source: the base model that has the adapter.
        model: the model that is to have it.
        where: what to call the adapter in the message.

    Raises:
        AdapterFileError: the two architectures differ.
    """
    advice = "Give the adapter of a model of this architecture."
    _check_types(model_type_of(source), model_type_of(model), where, "this model", "it belongs to", advice)


def _check_types(theirs: str | None, own: str | None, where: str, into: str, how: str, advice: str) -> None:
    if theirs and own and theirs != own:
        raise AdapterFileError(
            f"{where} does not fit {into}: {how} a model of type {theirs!r}, and this one is of type {own!r}. {advice}"
        )


def check_claims(config: LNTuneConfig, facts: ModelFacts, planned: Sequence[tuple[PeftConfig, Plan]]) -> None:
    """Refuse a saved adapter whose config asks for more than its weight file holds.

    A config is small, and one number in it can ask for any amount of memory.

    Args:
        config: config of the saved adapter. A config that is not loaded from a file passes.
        facts: facts of the model to load into.
        planned: the parts of the config with their plans, from `plan_parts`.

    Raises:
        AdapterFileError: the adapter is of another architecture, its parts are larger than the file, or the file lacks
            a head.
    """
    shapes = config.stored_shapes
    if shapes is None:
        return
    check_architecture(config, facts.model)
    wanted = sum(method_of(part).stored_entries(part, its) for part, plan in planned for its in plan.parts.values())
    held = sum(shape.numel() for name, shape in shapes.items() if is_ours(name))
    if wanted > held + _SLACK:
        raise AdapterFileError(
            f"the config of this adapter asks for {wanted:,} values in this model, and its weight file holds {held:,}. "
            "It was trained on another model, or its adapter_config.json was changed; get a good copy of both files."
        )
    _check_heads(config, facts, shapes)


def _check_heads(config: LNTuneConfig, facts: ModelFacts, shapes: Mapping[str, torch.Size]) -> None:
    """PEFT copies every module that `modules_to_save` names before it looks for the tensors of the copies."""
    endings = tuple(config.modules_to_save or ())
    heads = tuple(f"{name}." for name in facts.modules if name and name.endswith(endings))
    for name, module in facts.modules.items():
        if not f"{name}.".startswith(heads):
            continue
        tensors = {**module._parameters, **module._buffers}
        saved = (key for key in tensors if tensors[key] is not None and key not in module._non_persistent_buffers_set)
        lacking = [f"{name}.{key}" for key in saved if f"{name}.{key}" not in shapes]
        if lacking:
            raise AdapterFileError(
                f"the weight file lacks {lacking[0]}, a tensor of a module in modules_to_save. It was saved from "
                "another model, or one of the two files was changed; get a good copy of both."
            )
