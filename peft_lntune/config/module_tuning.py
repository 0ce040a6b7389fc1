"""Deltas on chosen modules of every layer: queries, FFNs, embeddings, biases."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peft_lntune.architectures.table import Component, ComponentName
from peft_lntune.config.base import part_kind
from peft_lntune.config.components import check_components
from peft_lntune.config.deltas import DeltaConfig
from peft_lntune.errors import ConfigError

__all__ = ["PRESETS", "ModuleTuningConfig"]

ModulePreset = Literal["bitfit", "l0-close"]

PRESETS: dict[ModulePreset, dict[str, Any]] = {
    "bitfit": {"components": tuple(Component), "tune": "bias"},
    "l0-close": {"components": tuple(part for part in Component if part not in (Component.KEY, Component.EMBEDDING))},
}
"""Named choices: BitFit (arXiv 2106.10199), every bias; L0-close (arXiv 2004.14129), all but keys and embeddings.
L0-close also leaves out some layers. These depend on the model, so give them as `layers_to_exclude`."""


@part_kind
@dataclass(kw_only=True)
class ModuleTuningConfig(DeltaConfig):
    """Fine-tune chosen modules of the model as deltas, in an adapter.

    Training takes the same steps as training these parameters with `requires_grad`. The adapter is saved by itself,
    and can be switched, merged, summed and mixed like any other. A mask (`set_masks`) restricts it to chosen entries,
    such as 5 % of the queries or the n largest weights of the norms.

    Source: Akbar-Tajari et al. 2022 (arXiv 2302.00378); Radiya-Dixit and Wang 2020 (arXiv 2004.14129).

    Args:
        components: one or more of `"query"`, `"key"`, `"value"`, `"attention_output"`, `"ffn_up"`, `"ffn_gate"`,
            `"ffn_down"`, `"norm"`, `"embedding"`, `"pooler"`, for known architectures. If a model holds several in one
            matrix, such as GPT-2's queries, keys and values, only that part of the matrix is tuned.
        preset: `"bitfit"` or `"l0-close"`, instead of `components`. It sets `components` and `tune`, and becomes None.
        layers_to_exclude: index or indices of layers to leave out.
        target_modules: names of modules to tune instead of `components`, of any class with a floating weight.
        tune: `"weight"`, `"bias"`, or `"both"`.

    Further arguments: see `DeltaConfig` and `LNTuneConfig`.

    Raises:
        ConfigError: not exactly one of components, preset and target_modules; or an unknown name.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=9, n_positions=4))
        >>> peft_model = get_peft_model(model, ModuleTuningConfig(components=["query"], tune="bias"))
        >>> [tuple(p.shape) for p in peft_model.parameters() if p.requires_grad]
        [(8,), (8,)]
    """

    components: Sequence[ComponentName | Component] | None = None
    preset: ModulePreset | None = None
    layers_to_exclude: list[int] | int | None = None

    def _check(self) -> None:
        super()._check()
        given = [name for name in ("components", "preset", "target_modules") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"give exactly one of components, preset and target_modules, but got {' and '.join(given) or 'none'}."
            )
        if self.preset is not None:
            self._take_preset()
        check_components(self, Component)

    def _take_preset(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"preset={self.preset!r}: choose one of {', '.join(map(repr, PRESETS))}.")
        chosen = PRESETS[self.preset]
        if self.tune != chosen.get("tune", self.tune) and self.tune != "both":
            raise ConfigError(f"preset={self.preset!r} tunes {chosen['tune']!r}, but tune={self.tune!r} was given.")
        self.components, self.tune, self.preset = list(chosen["components"]), chosen.get("tune", self.tune), None
