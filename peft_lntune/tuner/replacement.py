"""A saved adapter whose values are read into one that the model has: both have to compute the same with them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from peft import PeftConfig

from peft_lntune.config import LNTuneConfig, parts_of
from peft_lntune.errors import ConfigError, UnsupportedError
from peft_lntune.planning.claims import check_architecture

__all__ = ["check_replacement"]

# Fields that say where an adapter sits. Its tensors tell that by their names, but not which of several parts has which.
_PLACES = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layers_to_exclude", "roles"),
    "components",
}
# Fields that say how an adapter was made, is trained, chosen or saved, and those that the shapes of its tensors tell.
_FREE = set(PeftConfig.__dataclass_fields__) | {
    *("modules_to_save", "delta_dtype", "save_dtype", "init_weights", "format_version", "peft_lntune_version"),
    *("manifest", "mask_source", "preset", "density", "fisher", "scope", "num_samples", "seed", "save_scores"),
    *("kind", "reparametrize", "init_lora_weights", "runtime_config", "parts", "initial_sparsity", "initial_score"),
    *("dropout", "lora_dropout"),
    *("tune", "reduction_factor", "bottleneck_size", "num_virtual_tokens", "r", "rank_pattern", "fan_in_fan_out"),
}
_ADVICE = "Load it with its own config, under another name where this one is to stay."


def check_replacement(model: Any, adapter_name: str, saved: LNTuneConfig, where: str = "this adapter") -> None:
    """Raise where a saved adapter means something else by its values than the adapter that they are read into.

    Args:
        model: the model, which has an adapter of this name.
        adapter_name: the adapter in the model.
        saved: the config of the saved one.
        where: what to call the saved one.

    Raises:
        AdapterFileError: it was saved from another architecture.
        ConfigError: it consists of other parts, or a field differs that its tensors do not tell, such as a bottleneck's
            scale or LoRA's alpha.
        UnsupportedError: the adapter in the model is merged.
    """
    check_architecture(saved, model, where)
    mine, its = _sorted_parts(model.peft_config[adapter_name]), _sorted_parts(saved)
    kinds = [_kind(part) for part in mine]
    if kinds != [_kind(part) for part in its]:
        raise ConfigError(
            f"adapter {adapter_name!r} consists of {_kinds(mine)}, and the saved one of {_kinds(its)}. {_ADVICE}"
        )
    for one, other, kind in zip(mine, its, kinds, strict=True):
        free = _FREE if kinds.count(kind) > 1 else _FREE | _PLACES
        fields, others = asdict(one), asdict(other)
        for name in sorted(fields.keys() - free):
            if fields[name] != others[name]:
                raise ConfigError(
                    f"adapter {adapter_name!r} has {name}={fields[name]!r}, and the saved one {others[name]!r}, so its "
                    f"values would mean something else here. {_ADVICE}"
                )
    merged = [name for name, module in model.named_modules() if adapter_name in getattr(module, "merged_adapters", ())]
    if merged:
        raise UnsupportedError(
            f"adapter {adapter_name!r} is merged at {merged[0]}, and unmerging would not restore the base model after "
            "other values came into it. Call unmerge_adapter() first."
        )


def _sorted_parts(config: Any) -> list[Any]:
    """The parts of a config; in which order they were given changes nothing."""
    return sorted(
        parts_of(config), key=lambda part: (_kind(part), [repr(getattr(part, p, 0)) for p in sorted(_PLACES)])
    )


def _kind(part: Any) -> str:
    # A Fisher adapter is an adapter of norms, whose masks are told by its tensors.
    return type(part).__name__.replace("FisherLN", "LNTuning")


def _kinds(parts: Sequence[Any]) -> str:
    return ", ".join(_kind(part) for part in parts)
