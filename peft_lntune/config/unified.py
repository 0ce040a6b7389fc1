"""Several methods in one adapter: one config, one directory, one switch."""

from dataclasses import dataclass, replace
from typing import Any

from peft import LoraConfig, PeftConfig

from peft_lntune.config.base import LNTuneConfig
from peft_lntune.config.deltas import DeltaConfig
from peft_lntune.config.parts import check_part, parts_of_preset, read_part
from peft_lntune.errors import ConfigError

__all__ = ["UnifiedConfig", "parts_of", "record_mask"]

# What says where and how to tune belongs to a part; here it would do nothing.
_OF_PARTS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "delta_dtype")

# Tasks whose heads PEFT names in the config it was given, and only when the adapter is in the model.
_NAMED_LATE = ("TOKEN_CLS", "QUESTION_ANS")


@dataclass(kw_only=True)
class UnifiedConfig(LNTuneConfig):
    """Norms, bottleneck adapters, prefixes and LoRA as one adapter: trained, saved, switched and loaded together.

    Give either `parts` or `preset`.

    Source: Qi et al. 2022 (arXiv 2211.08682), who found prefix + attention adapter + LN the best of their combinations,
    and that an adapter at the FFN and LN together do worse than alone.

    Args:
        parts: configs: `LNTuningConfig`, `FisherLNConfig`, `ModuleTuningConfig`, `SupermaskConfig`, `BottleneckConfig`,
            `PrefixConfig`, PEFT's `LoraConfig`.
        preset: names joined by `+`: `"ln"`, `"fisher-ln"`, `"lora"`, `"prefix"`, `"mha-adapter"`, `"ffn-adapter"`,
            `"mam"`; such as `"prefix+mha-adapter+ln"`. It is turned into `parts`.
        modules_to_save, save_dtype: see `LNTuneConfig`; for the adapter, not for a part.

    Raises:
        ConfigError: both or neither are given, a part is unknown or no part, or a field that belongs to a part.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2))
        >>> peft_model = get_peft_model(model, UnifiedConfig(preset="mha-adapter+ln"))
        >>> [type(part).__name__ for part in peft_model.peft_config["default"].parts]
        ['BottleneckConfig', 'LNTuningConfig']
    """

    parts: list[Any] | None = None
    preset: str | None = None

    def _check(self) -> None:
        super()._check()
        if (self.parts is None) == (self.preset is None):
            raise ConfigError(
                f"give exactly one of parts and preset, but got parts={self.parts!r} and preset={self.preset!r}. For "
                'example UnifiedConfig(preset="prefix+mha-adapter+ln").'
            )
        for name in _OF_PARTS:
            if (value := getattr(self, name)) is not None:
                raise ConfigError(f"{name}={value!r} belongs to a part of a UnifiedConfig, not to the whole of it.")
        if self.preset is not None:
            self.parts, self.preset = parts_of_preset(self.preset), None
        if not isinstance(self.parts, (list, tuple)) or not self.parts:
            raise ConfigError(f"parts takes a list of at least one config, but got {self.parts!r}.")
        self.parts = [read_part(part) for part in self.parts]
        for part in self.parts:
            check_part(part)

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with each part as it would be saved by itself."""
        stored: dict[str, Any] = super().to_dict()
        return {**stored, "parts": [_listed(part.to_dict()) for part in self.parts or ()]}

    @property
    def deltas(self) -> DeltaConfig | None:
        """The part that tunes deltas; of several the first with a mask or a way to fit one."""
        found = [part for part in self.parts or () if isinstance(part, DeltaConfig)]
        return next((part for part in found if part.chooses_entries), next(iter(found), None))

    @property
    def masks_are_fixed(self) -> bool:
        return any(getattr(part, "masks_are_fixed", False) for part in self.parts or ())

    def with_mask_source(self, source: dict[str, Any] | None) -> "UnifiedConfig":
        """A copy in which `deltas` says how the mask of its adapter was made."""
        deltas = self.deltas
        parts = [deltas.with_mask_source(source) if deltas and part is deltas else part for part in self.parts or ()]
        return replace(self, parts=parts)

    def unmasked(self) -> "UnifiedConfig":
        parts = [part.unmasked() if isinstance(part, LNTuneConfig) else part for part in self.parts or ()]
        return replace(self, manifest=None, parts=parts)

    def effective_parts(self) -> list[PeftConfig]:
        """The parts as configs that can be injected one after the other: with what is said once for all of them."""
        shared = {name: getattr(self, name) for name in ("task_type", "inference_mode", "modules_to_save")}
        found = []
        for part in self.parts or ():
            start = {} if self.init_weights else {_start(part): False}
            own = replace(part, **shared, **start)
            if isinstance(own, LNTuneConfig):
                own.manifest = self.manifest
                if "stored" in self.__dict__:
                    own.__dict__["stored"] = self.__dict__["stored"]
            found.append(own)
        return found


def parts_of(config: PeftConfig) -> list[PeftConfig]:
    """The parts of a config; a plain one is its own only part."""
    return list(config.parts or ()) if isinstance(config, UnifiedConfig) else [config]


def record_mask(configs: dict[str, Any], adapter_name: str, source: dict[str, Any] | None) -> None:
    """Say how the mask of an adapter was made, in a config of its own: users make several adapters from one.

    Args:
        configs: of a model, by adapter name; changed in place.
        adapter_name: the adapter.
        source: what `mask_source` shall be.
    """
    given = configs[adapter_name]
    deltas = given.deltas
    if deltas is None or deltas.mask_source == source:
        return
    if given.modules_to_save is None and given.task_type in _NAMED_LATE:
        given.modules_to_save = []  # what PEFT writes into this list, the copy has too
    configs[adapter_name] = given.with_mask_source(source)
    if "selected" in given.__dict__:  # of an adapter that is in a model, see `inject.prepare`
        configs[adapter_name].__dict__["selected"] = given.__dict__["selected"]


def _start(part: PeftConfig) -> str:
    return "init_lora_weights" if isinstance(part, LoraConfig) else "init_weights"


def _listed(value: Any) -> Any:
    """Plain values as JSON has them, sets as sorted lists."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value
