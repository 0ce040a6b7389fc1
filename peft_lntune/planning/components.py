"""Which parameters the components of a `ModuleTuningConfig` are in a model."""

from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

from peft_lntune.architectures.attention import lies_by_head
from peft_lntune.architectures.components import HEAD, find_contents
from peft_lntune.architectures.table import Component, Contents
from peft_lntune.core.delta import ParameterSlice
from peft_lntune.errors import UnsupportedError
from peft_lntune.planning.facts import ModelFacts

__all__ = ["find_component_parameters"]


def find_component_parameters(
    facts: ModelFacts, components: Iterable[str], tune: tuple[str, ...] = ("weight", "bias")
) -> dict[str, dict[str, ParameterSlice | None]]:
    """Find the parameters of the given components, in the order of the model's modules.

    Args:
        facts: facts of the model, plain or with adapters.
        components: members of `peft_lntune.architectures.table.Component`, or their values.
        tune: which parameters of the modules to look for.

    Returns:
        For each module by name, its parameters (`"weight"`, `"bias"`). A value is the slice that belongs to the
        components if the parameter holds other components too, else None. Heads on top of the body are left out.

    Raises:
        UnsupportedError: a chosen weight is tied to the weight of another module, which would not see the delta; or a
            chosen component shares a matrix with others in an unknown order.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=4))
        >>> find_component_parameters(ModelFacts(model), ["key"])["h.0.attn.c_attn"]["weight"]
        ParameterSlice(axis=1, ranges=((4, 8),))
    """
    wanted = set(components)
    modules, norms = facts.modules, facts.norms
    owned = {
        f"{name}.{parameter}": (name, parameter, tensor)
        for name, module in modules.items()
        for parameter in tune
        for own in [norms[name].parameters[parameter] if name in norms else parameter]
        if isinstance(tensor := module._parameters.get(own), Tensor)
    }
    contents = find_contents(owned, {name: norm.roles for name, norm in norms.items()})
    found: dict[str, dict[str, ParameterSlice | None]] = {}
    for full, (name, parameter, _) in owned.items():
        held = contents[full]
        parts = (Component.NORM,) if name in norms and held != HEAD else held.components
        if wanted.isdisjoint(parts):
            continue
        whole = wanted.issuperset(parts)
        part = None if whole else _slice(facts, name, parameter, held, wanted)
        found.setdefault(name, {})[parameter] = part
    for full, (name, parameter, tensor) in owned.items():
        if found.get(name, {}).get(parameter, ()) is None:
            _check_tied(
                full, tensor, {n: place for n, place in owned.items() if place[1] not in found.get(place[0], ())}
            )
    return found


def _slice(facts: ModelFacts, name: str, parameter: str, held: Contents, wanted: set[str]) -> ParameterSlice:
    """The wanted part of a fused projection."""
    fused, module = held.components, facts.modules[name]
    if held.by_head or lies_by_head(facts.modules.get(name.rpartition(".")[0])):
        asked = ", ".join(sorted(wanted.intersection(fused)))
        raise UnsupportedError(
            f"{name} ({type(module).__name__}) holds {', '.join(fused)} in one matrix, head by head or in an order "
            f"that is not known, so {asked} alone cannot be tuned. "
            f"Choose all of {', '.join(map(repr, fused))} or none of them."
        )
    tensor = getattr(module, parameter)
    # The weights of GPT-2's linear maps are transposed.
    axis = 1 if tensor.dim() == 2 and hasattr(module, "nf") else 0
    ends = [0, *accumulate(_sizes(facts, name, tensor.shape[axis], fused))]
    ranges = [place for part, place in zip(fused, pairwise(ends), strict=True) if part in wanted]
    return ParameterSlice(axis, tuple(ranges))


def _sizes(facts: ModelFacts, name: str, size: int, fused: tuple[Component, ...]) -> list[int]:
    """Number of outputs of each part of a fused projection. Keys and values may be fewer than queries."""
    if Component.QUERY not in fused:
        return [size // len(fused)] * len(fused)
    try:
        attention = facts.attention[0].get(name.rpartition(".")[0])
    except UnsupportedError:  # the model has its own kind of attention
        attention = None
    key = size // 3 if attention is None else attention.heads * attention.head_dim
    if attention is None and size % 3:
        raise UnsupportedError(
            f"{name} holds {', '.join(fused)} in one matrix of {size} outputs, and the number of keys is not known. "
            "Choose all of them or none."
        )
    return [size - 2 * key, key, key]


def _check_tied(full: str, tensor: Tensor, owned: Mapping[str, tuple[str, str, Any]]) -> None:
    tied = [other for other, (_, _, found) in owned.items() if found is tensor and other != full]
    if tied:
        raise UnsupportedError(
            f"{full} is tied to {tied[0]}, and a delta on one would not reach the other. Load the model with "
            "tie_word_embeddings=False, or leave out this component."
        )
