"""Checks before the values of a saved adapter are read into an adapter that the model already has."""

from dataclasses import asdict
from typing import Any

from peft import PeftConfig

from peft_lntune.config import LNTuneConfig, parts_of
from peft_lntune.errors import ConfigError, UnsupportedError
from peft_lntune.planning.claims import check_architecture

__all__ = ["check_replacement"]

# Fields that say where an adapter sits. The names of its tensors tell that too, except if several parts are alike.
_PLACES = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layers_to_exclude", "roles"),
    "components",
}
# Fields that say how an adapter was made, trained, masked or saved, and fields that the shapes of its tensors tell.
_FREE = set(PeftConfig.__dataclass_fields__) | {
    *("modules_to_save", "delta_dtype", "save_dtype", "init_weights", "format_version", "peft_lntune_version"),
    *("manifest", "mask_source", "preset", "density", "fisher", "scope"),
    *("max_per_norm", "num_samples", "seed", "save_scores"),
    *("kind", "reparametrize", "init_lora_weights", "runtime_config", "parts", "initial_sparsity", "initial_score"),
    *("dropout", "lora_dropout"),
    *("tune", "reduction_factor", "bottleneck_size", "num_virtual_tokens", "r", "rank_pattern", "fan_in_fan_out"),
}
_ADVICE = "Load it with its own config, under another name to keep this one."


def check_replacement(model: Any, adapter_name: str, saved: LNTuneConfig, where: str = "this adapter") -> None:
    """Refuse a saved adapter whose values would compute something else in the adapter of the model.

    Args:
        model: a model with an adapter of this name.
        adapter_name: the adapter in the model.
        saved: config of the saved adapter.
        where: what to call the saved adapter in messages.

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
            f"adapter {adapter_name!r} consists of {', '.join(kinds)}, and the saved one of "
            f"{', '.join(map(_kind, its))}. {_ADVICE}"
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
            f"adapter {adapter_name!r} is merged at {merged[0]}, and with other values in it unmerging would not "
            "restore the base model. Call unmerge_adapter() first."
        )


def _sorted_parts(config: Any) -> list[Any]:
    """The parts of a config in a fixed order, because the given order does not matter."""
    return sorted(
        parts_of(config), key=lambda part: (_kind(part), [repr(getattr(part, p, 0)) for p in sorted(_PLACES)])
    )


def _kind(part: Any) -> str:
    # A Fisher adapter computes the same as an adapter of LN-tuning; its tensors tell the masks.
    return type(part).__name__.replace("FisherLN", "LNTuning")
