"""Facts about a model's attention modules, and the interface by which they call their attention function.

transformers' attention modules look up their function by the name in `self.config._attn_implementation`, in a table
to which other packages may add.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_lntune.architectures.table import Component, contents_by_path
from peft_lntune.core.module_tree import base_modules
from peft_lntune.errors import UnsupportedError

__all__ = [
    "FUNCTIONS",
    "IMPLEMENTATION",
    "AttentionFacts",
    "Interface",
    "find_attention",
    "lies_by_head",
    "survey_attention",
]

IMPLEMENTATION = "lntune_prefix"
"""The name of our function among transformers' attention functions; `plugin/attention.py` registers it."""

# The name of the table of attention functions in modeling files, and the end of the name of the function outside it.
FUNCTIONS, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"

_KEY_LEAVES = ("linear_k", "to_k")  # beside those of the table
_HEAD_DIMS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_KEY_HEADS = ("num_key_value_heads", "kv_heads")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)


class Interface:
    """The attention functions of one modeling file; some files have their own table.

    Args:
        attention: the class of an attention module.

    Attributes:
        functions: the table of functions by name.
        eager: the file's own function, for the name `"eager"`.
    """

    def __init__(self, attention: type[nn.Module]) -> None:
        forward: Any = inspect.unwrap(attention.forward)
        own = next((name for name in forward.__code__.co_names if name.endswith(_EAGER)), _EAGER)
        self._attention = attention
        self.functions: Any = forward.__globals__[FUNCTIONS]
        self.eager: Any = forward.__globals__.get(own)

    def __reduce__(self) -> tuple[Any, ...]:
        return Interface, (self._attention,)  # the table of functions is not copied

    @classmethod
    def of(cls, attention: type[nn.Module]) -> "Interface | None":
        """The interface of a class of modules; None where it does not use transformers' attention interface."""
        code = getattr(inspect.unwrap(attention.forward), "__code__", None)
        return cls(attention) if code is not None and FUNCTIONS in code.co_names else None

    def original(self, implementation: str | None) -> Callable[..., Any]:
        """The function that a config names."""
        if implementation is None or implementation == "eager":
            return self.functions.get("eager", self.eager)
        return self.functions[implementation]


@dataclass(frozen=True)
class AttentionFacts:
    """One attention of a model.

    Attributes:
        name: the module's name in the model.
        role: `"attention"`, or `"cross_attention"` where the keys come from an encoder.
        layer: the first number in the name, PEFT's number of the layer; None without a number.
        heads: H, the number of key heads; fewer than query heads where these share keys.
        head_dim: hd, the width of a key.
    """

    name: str
    role: str
    layer: int | None
    heads: int
    head_dim: int


def find_attention(model: nn.Module) -> dict[str, AttentionFacts]:
    """Find the attention modules of a model that use transformers' attention interface, in module order.

    The model is not run or changed; it may be on meta, quantized or already adapted.

    Args:
        model: any module.

    Returns:
        The facts, by the names of the modules in the base model.

    Raises:
        UnsupportedError: no such module was found, or transformers' table of attention functions lacks ours.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2))
        >>> facts = find_attention(model)["encoder.layer.0.attention.self"]
        >>> facts.heads, facts.head_dim, facts.role
        (2, 4, 'attention')
    """
    modules = base_modules(model)
    found, left_out = survey_attention(modules)
    if not found:
        raise UnsupportedError(_nothing(modules, left_out))
    return found


def survey_attention(modules: Mapping[str, nn.Module]) -> tuple[dict[str, AttentionFacts], dict[str, str]]:
    """Find the attention modules of a model, and those whose sizes of keys are unknown.

    Args:
        modules: the `base_modules` of the model.

    Returns:
        The facts by module name, and for the other attention modules the reason by module name.

    Raises:
        UnsupportedError: transformers' table of attention functions lacks ours.
    """
    found: dict[str, AttentionFacts] = {}
    left_out: dict[str, str] = {}
    for name, module in modules.items():
        interface = Interface.of(type(module))
        if interface is None or not hasattr(module, "config"):
            continue
        if IMPLEMENTATION not in interface.functions:
            raise UnsupportedError(
                "the attention function for prefixes is not among those of transformers: a warning at the import of "
                "peft_lntune says why. Upgrade peft_lntune, or leave the prefix out."
            )
        sizes = _sizes(module)
        if isinstance(sizes, str):
            left_out[name] = sizes
        else:
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            found[name] = AttentionFacts(name, _role(name, module), numbers[0] if numbers else None, *sizes)
    return found, left_out


def _sizes(module: Any) -> tuple[int, int] | str:
    """Number of key heads and head width, or why they are unknown."""
    head_dim = _first(module, _HEAD_DIMS)
    value_dim, key_dim = getattr(module, "v_head_dim", None), getattr(module, "qk_head_dim", head_dim)
    if value_dim is not None and value_dim != key_dim:
        return f"its keys have {key_dim} entries a head and its values {value_dim}"
    known = (path for path, held in contents_by_path().items() if held.components == (Component.KEY,))
    leaves = (getattr(module, path.rpartition(".")[2], None) for path in (*known, *_KEY_LEAVES))
    width = next((w for w in (getattr(leaf, "out_features", None) for leaf in leaves) if isinstance(w, int)), None)
    config = _config_of(module)
    heads = _first(module, _HEADS) or _first(config, _HEADS)
    key_heads = _first(module, _KEY_HEADS) or _first(config, _KEY_HEADS) or heads
    if head_dim is None and width is not None and key_heads:
        head_dim = width // key_heads
    if head_dim is None and heads:
        hidden = _first(module, ("embed_dim", "hidden_size")) or _first(config, ("hidden_size",))
        head_dim = None if hidden is None else hidden // heads
    if head_dim is not None and width is not None:
        key_heads = width // head_dim
    elif heads and (groups := _first(module, ("num_key_value_groups",))):
        key_heads = heads // groups
    if not head_dim or not key_heads:
        return "the number of its key heads, or their width, is not known"
    return key_heads, head_dim


def _config_of(module: Any) -> Any:
    """The config of the module's layer where layers differ, otherwise of the model."""
    layers, index = _read(module.config, "per_layer_config"), getattr(module, "layer_idx", None)
    try:
        return layers[index]
    except Exception:  # configs of other kinds fail in various ways
        return module.config


def _first(owner: Any, names: Sequence[str]) -> int | None:
    found = (_read(owner, name) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


def _read(owner: Any, name: str) -> Any:
    """An attribute; None where it is missing, or where a config raises because its layers differ."""
    try:
        return getattr(owner, name, None)
    except RuntimeError:
        return None


def _role(name: str, module: nn.Module) -> str:
    """The role by the module's own attribute, its name within its layer, or its class."""
    within = re.sub(r".*\.\d+\.", "", name)
    cross = getattr(module, "is_cross_attention", False) or _CROSS.search(f"{within} {type(module).__name__}")
    return "cross_attention" if cross else "attention"


def lies_by_head(attention: nn.Module | None) -> bool:
    """Whether a fused projection holds queries, keys and values head by head, as in GPT-BigCode."""
    return getattr(attention, "multi_query", None) is False


def _nothing(modules: dict[str, nn.Module], left_out: dict[str, str]) -> str:
    instead = "Use norms, LoRA or a bottleneck adapter on this model instead."
    if left_out:
        name, reason = next(iter(left_out.items()))
        return f"no prefix can be put at the attention of this model, such as {name}: {reason}. {instead}"
    names = {type(module).__name__ for module in modules.values()}
    seen = ", ".join(sorted(name for name in names if "attention" in name.lower())[:5]) or "no attention"
    return (
        f"a prefix needs attention that uses transformers' attention interface ({FUNCTIONS}), and no module of this "
        f"model does; seen: {seen}. {instead}"
    )
