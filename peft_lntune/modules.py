"""Which parameters the components of a `ModuleTuningConfig` are in a model."""

from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor, nn

from peft_lntune.analysis.components import find_components
from peft_lntune.attention import find_attention
from peft_lntune.core.delta import Block
from peft_lntune.core.norms import Norm, base_modules, find_norms
from peft_lntune.errors import UnsupportedError

__all__ = ["find_parameters"]

# How `analysis.components` ends the name of each component; before it may stand the stack's name, or "cross-".
_ENDS = {
    "query": "query",
    "key": "key",
    "value": "value",
    "attention_output": "attention output",
    "ffn_up": "FFN up",
    "ffn_gate": "FFN gate",
    "ffn_down": "FFN down",
    "norm": " norm",
    "embedding": "embeddings",
    "pooler": "pooler",
}
# Several components in one matrix: which, in the order of its outputs.
_FUSED = {
    "query, key, value": ("query", "key", "value"),
    "cross-attention key, value": ("key", "value"),
    "FFN gate, up": ("ffn_gate", "ffn_up"),
}


def find_parameters(
    model: nn.Module,
    components: Iterable[str],
    norms: Mapping[str, Norm] | None = None,
    tune: tuple[str, ...] = ("weight", "bias"),
) -> dict[str, dict[str, Block | None]]:
    """The parameters of some components, in the order of the model's modules.

    Args:
        model: the model, plain or with adapters.
        components: names of `peft_lntune.config.components.COMPONENTS`.
        norms: what `find_norms(model)` has found, where that is at hand.
        tune: which parameters of the modules.

    Returns:
        For each module by name its parameters, `"weight"` and `"bias"`; with the part that is meant where the module
        holds other components too, else None. Heads on top of the body are never among them.

    Raises:
        UnsupportedError: a chosen weight is tied to that of another module, which would not see the delta.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=4))
        >>> find_parameters(model, ["key"])["h.0.attn.c_attn"]["weight"]
        Block(axis=1, ranges=((4, 8),))
    """
    wanted = set(components)
    modules = base_modules(model)
    norms = find_norms(model) if norms is None else norms
    owned = {
        f"{name}.{parameter}": (name, parameter, tensor)
        for name, module in modules.items()
        for parameter in tune
        if isinstance(tensor := module._parameters.get(_own_name(norms.get(name), parameter)), Tensor)
    }
    places = find_components(owned, {name: norm.roles for name, norm in norms.items()})
    found: dict[str, dict[str, Block | None]] = {}
    for full, (name, parameter, _) in owned.items():
        fused = next((parts for end, parts in _FUSED.items() if places[full].component.endswith(end)), None)
        if fused is not None:
            if wanted & set(fused):
                block = _block(model, name, modules[name], parameter, fused, wanted)
                found.setdefault(name, {})[parameter] = block
        elif _is_wanted(places[full].component, name in norms, wanted):
            found.setdefault(name, {})[parameter] = None
    for full, (name, parameter, tensor) in owned.items():
        if found.get(name, {}).get(parameter, ()) is None:
            _check_tied(
                full, tensor, {n: place for n, place in owned.items() if place[1] not in found.get(place[0], ())}
            )
    return found


def _own_name(norm: Norm | None, parameter: str) -> str:
    return parameter if norm is None else norm.parameters[parameter]


def _is_wanted(component: str, is_norm: bool, wanted: set[str]) -> bool:
    if component == "head":
        return False
    if is_norm:
        return "norm" in wanted
    return any(component.endswith(_ENDS[name]) for name in wanted - {"norm"})


def _block(
    model: nn.Module, name: str, module: nn.Module, parameter: str, fused: tuple[str, ...], wanted: set[str]
) -> Block | None:
    """The part of a fused projection that is wanted; None where all of it is."""
    if wanted >= set(fused):
        return None
    tensor = getattr(module, parameter)
    # GPT-2's linear maps have their weight the other way round.
    axis = 1 if tensor.dim() == 2 and hasattr(module, "nf") else 0
    ends = [0, *accumulate(_sizes(model, name, tensor.shape[axis], fused))]
    ranges = [place for part, place in zip(fused, pairwise(ends), strict=True) if part in wanted]
    return Block(axis, tuple(ranges))


def _sizes(model: nn.Module, name: str, size: int, fused: tuple[str, ...]) -> list[int]:
    """How many outputs each part of a fused projection has: keys and values may be fewer than queries."""
    if fused[0] != "query":
        return [size // len(fused)] * len(fused)
    facts = find_attention(model).get(name.rpartition(".")[0])
    key = size // 3 if facts is None else facts.heads * facts.head_dim
    return [size - 2 * key, key, key]


def _check_tied(full: str, tensor: Tensor, owned: Mapping[str, tuple[str, str, Any]]) -> None:
    tied = [other for other, (_, _, found) in owned.items() if found is tensor and other != full]
    if tied:
        raise UnsupportedError(
            f"{full} is tied to {tied[0]}: a delta of the one would not reach the other. Load the model with "
            "tie_word_embeddings=False, or leave out this component."
        )
