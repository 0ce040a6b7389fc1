"""LN adapters in a `PeftMixedModel`, beside LoRA, LoHa, LoKr and the others.

PEFT's mixed tuner dispatches on closed tuples of classes; these are extended, and its methods learn one more case.
PEFT cannot save mixed models: for one saved adapter use a combined config.
"""

from collections.abc import Callable
from typing import Any, Union

from peft import mapping
from peft.tuners import mixed as package
from peft.tuners.mixed import model as module
from peft.utils import PeftType

from peft_lntune.config import LNTuneConfig, UnifiedConfig
from peft_lntune.config.base import PEFT_TYPE
from peft_lntune.errors import UnsupportedError
from peft_lntune.layers import ReplacementLayer
from peft_lntune.layers.padded import stop_keeping_padded
from peft_lntune.planning.methods import Spot
from peft_lntune.tuner.inject import injecting, is_target, prepare
from peft_lntune.tuner.merge import everywhere, merge_layers, take_out_layers, unmerge_layers
from peft_lntune.tuner.model import LNTuneModel

__all__ = ["join_mixed_models"]

_CASES = (
    "inject_adapter",
    "_create_and_replace",
    "_prepare_adapter_config",
    "_check_target_module_exists",
    "_unload_and_optionally_merge",
    "merge_adapter",
    "unmerge_adapter",
)


def join_mixed_models() -> None:
    """Let `get_peft_model(..., mixed=True)` take LN configs. Idempotent."""
    peft_type = PeftType(PEFT_TYPE)
    tuner = module.MixedModel
    if peft_type in module.COMPATIBLE_TUNER_TYPES:
        return
    # Everything is looked up before anything is changed.
    types, prefixes, configs, layers = module.COMPATIBLE_TUNER_TYPES, module.PREFIXES, module.Configs, module.Layers
    originals = {name: getattr(tuner, name) for name in _CASES}
    _ = package.COMPATIBLE_TUNER_TYPES, mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    package.COMPATIBLE_TUNER_TYPES = module.COMPATIBLE_TUNER_TYPES = (*types, peft_type)
    mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING[peft_type] = LNTuneModel  # from_pretrained asks whether it is there
    module.PREFIXES = [*prefixes, LNTuneModel.prefix]
    module.Configs = Union[(configs, LNTuneConfig)]  # noqa: UP007  # PEFT reads its __args__
    module.Layers = (*layers, ReplacementLayer)
    for name, case in _cases(originals).items():
        setattr(tuner, name, case)


def _cases(originals: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    """The methods of PEFT's mixed tuner, each with our case before its own."""

    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kw: Any) -> None:
        config = self.peft_config[adapter_name]
        if isinstance(config, UnifiedConfig):
            raise UnsupportedError(
                "a UnifiedConfig is several adapters in one, and a PeftMixedModel injects one at a time. Use it in a "
                "PeftModel (mixed=False), with LoRA as one of its parts; then it can be saved, too."
            )
        if not isinstance(config, LNTuneConfig):
            return originals["inject_adapter"](self, model, adapter_name, *args, **kw)
        ((_, injection),) = prepare(self.peft_config, adapter_name, model)
        with injecting(self, injection):
            return originals["inject_adapter"](self, model, adapter_name, *args, **kw)

    def _create_and_replace(
        self: Any, config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, **kw: Any
    ) -> None:
        if not isinstance(config, LNTuneConfig):
            return originals["_create_and_replace"](self, config, adapter_name, target, target_name, parent, **kw)
        spot = Spot(target, target_name, parent, kw["current_key"])
        return self._injection.method.put(self, self._injection, config, adapter_name, spot)

    def _prepare_adapter_config(peft_config: Any, model_config: Any) -> Any:
        if isinstance(peft_config, LNTuneConfig):
            return peft_config
        return originals["_prepare_adapter_config"](peft_config, model_config)

    def _check_target_module_exists(self: Any, peft_config: Any, key: str) -> Any:
        if isinstance(peft_config, LNTuneConfig):
            return is_target(self._injection, peft_config, key)
        return originals["_check_target_module_exists"](peft_config, key)

    def _unload_and_optionally_merge(
        self: Any, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> Any:
        with everywhere(self.model):
            take_out_layers(self.model, merge, safe_merge, adapter_names)
            model = originals["_unload_and_optionally_merge"](self, merge, progressbar, safe_merge, adapter_names)
        stop_keeping_padded(model)
        return model

    def merge_adapter(self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge_allowed()
        merge_layers(self.model, adapter_names, safe_merge)

    def unmerge_adapter(self: Any) -> None:
        unmerge_layers(self.model)

    return {
        "inject_adapter": inject_adapter,
        "merge_adapter": merge_adapter,
        "unmerge_adapter": unmerge_adapter,
        "_unload_and_optionally_merge": _unload_and_optionally_merge,
        "_create_and_replace": _create_and_replace,
        "_prepare_adapter_config": staticmethod(_prepare_adapter_config),
        "_check_target_module_exists": _check_target_module_exists,
    }
