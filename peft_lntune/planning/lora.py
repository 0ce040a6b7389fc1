"""PEFT's LoRA as a part of our adapters: its layers are made, found and filled by PEFT's own code."""

from dataclasses import replace

from peft import LoraConfig
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_lntune.architectures.table import lora_targets
from peft_lntune.core.module_tree import base_modules
from peft_lntune.errors import ConfigError

__all__ = [
    "LoraLayer",
    "find_lora_targets",
]


def find_lora_targets(model: nn.Module, config: LoraConfig) -> tuple[LoraConfig, dict[str, int]]:
    """What a LoRA part would do to a model.

    Args:
        model: the model, plain or with adapters.
        config: the part.

    Returns:
        The config with its target modules filled in, by PEFT's list for the model's type or by our table of
        architectures; and for each module that it matches, by name, the number of entries of its two matrices.

    Raises:
        ConfigError: there are no default target modules for this model, none matches, or a match is no linear map.
    """
    try:
        reader = LoraModel.__new__(LoraModel)  # the method reads a table of its class; PEFT's init would inject
        known = reader._prepare_adapter_config(replace(config), LoraModel.get_model_config(model))
    except ValueError as error:
        usual = lora_targets(base_modules(model))
        if usual is None:
            raise ConfigError(
                "neither PEFT nor peft_lntune knows default target modules of LoRA for this model. Name them: "
                'LoraConfig(target_modules=["q_proj", "v_proj"]).'
            ) from error
        known = replace(config, target_modules=list(usual))
    known = tuners_utils._maybe_include_all_linear_layers(known, model)
    modules = base_modules(model)
    found = {n: m for n, m in modules.items() if n and LoraModel._check_target_module_exists(known, n)}
    if not found:
        raise ConfigError(
            f"the LoRA part's target_modules={known.target_modules!r} match no module of this model. Name some that it "
            'has, or use target_modules="all-linear".'
        )
    unfit = [name for name, module in found.items() if not _sides(module)]
    if unfit:
        raise ConfigError(
            f"the LoRA part matches {unfit[0]} ({type(found[unfit[0]]).__name__}), which is no linear map, embedding "
            "or convolution. Name the modules inside it, or leave it out with exclude_modules."
        )
    if all(isinstance(module, Conv1D) for module in found.values()):
        known = replace(known, fan_in_fan_out=True)  # GPT-2's linear maps have their weight the other way round
    return known, {name: _rank(known, name) * _sides(module) for name, module in found.items()}


def _rank(config: LoraConfig, name: str) -> int:
    rank: int = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    return rank


def _sides(module: nn.Module) -> int:
    """Inputs plus outputs of a module, as LoRA's two matrices count them: kernels belong to the inputs."""
    for names in (("in_features", "out_features"), ("num_embeddings", "embedding_dim")):
        sides = [getattr(module, name, None) for name in names]
        if all(isinstance(side, int) for side in sides):
            return sum(side for side in sides if side)
    if isinstance(module, nn.MultiheadAttention):  # queries, keys and values in one, and the output
        return 6 * module.embed_dim
    weight = getattr(module, "weight", None)
    return weight.shape[0] + weight.numel() // weight.shape[0] if isinstance(weight, Tensor) and weight.dim() > 1 else 0
