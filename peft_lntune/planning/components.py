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
from peft_lntune.norms.find import Norm
from peft_lntune.planning.facts import ModelFacts

__all__ = ["find_component_parameters"]


def find_component_parameters(
    facts: ModelFacts, components: Iterable[str], tune: tuple[str, ...] = ("weight", "bias")
) -> dict[str, dict[str, ParameterSlice | None]]:
    """The parameters of some components, in the order of the model's modules.

    Args:
        facts: of the model, plain or with adapters.
        components: members of `peft_lntune.architectures.table.Component`, or their values.
        tune: which parameters of the modules.

    Returns:
        For each module by name its parameters, `"weight"` and `"bias"`; with the part that is meant where the module
        holds other components too, else None. Heads on top of the body are never among them.

    Raises:
        UnsupportedError: a chosen weight is tied to that of another module, which would not see the delta; or a chosen
            component is in one matrix with others, in an order that is not known.

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
        if isinstance(tensor := module._parameters.get(_own_name(norms.get(name), parameter)), Tensor)
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


def _own_name(norm: Norm | None, parameter: str) -> str:
    return parameter if norm is None else norm.parameters[parameter]


def _slice(facts: ModelFacts, name: str, parameter: str, held: Contents, wanted: set[str]) -> ParameterSlice:
    """The wanted part of a fused projection."""
    fused, module = held.components, facts.modules[name]
    if held.by_head or lies_by_head(facts.modules.get(name.rpartition(".")[0])):
        asked = ", ".join(sorted(wanted.intersection(fused)))
        raise UnsupportedError(
            f"{name} ({type(module).__name__}) holds {', '.join(fused)} in one matrix, head by head or in an order "
            f"that is not known, so {asked} alone is no part of it that could be tuned. "
            f"Choose all of {', '.join(map(repr, fused))} or none of them."
        )
    tensor = getattr(module, parameter)
    # GPT-2's linear maps have their weight the other way round.
    axis = 1 if tensor.dim() == 2 and hasattr(module, "nf") else 0
    ends = [0, *accumulate(_sizes(facts, name, tensor.shape[axis], fused))]
    ranges = [place for part, place in zip(fused, pairwise(ends), strict=True) if part in wanted]
    return ParameterSlice(axis, tuple(ranges))


def _sizes(facts: ModelFacts, name: str, size: int, fused: tuple[Component, ...]) -> list[int]:
    """How many outputs each part of a fused projection has: keys and values may be fewer than queries."""
    if Component.QUERY not in fused:
        return [size // len(fused)] * len(fused)
    try:
        attention = facts.attention[0].get(name.rpartition(".")[0])
    except UnsupportedError:  # attention of the model's own, which takes no prefix
        attention = None
    key = size // 3 if attention is None else attention.heads * attention.head_dim
    if attention is None and size % 3:
        raise UnsupportedError(
            f"{name} holds {', '.join(fused)} in one matrix of {size} outputs, and how many are keys is not known. "
            "Choose all of them or none."
        )
    return [size - 2 * key, key, key]


def _check_tied(full: str, tensor: Tensor, owned: Mapping[str, tuple[str, str, Any]]) -> None:
    tied = [other for other, (_, _, found) in owned.items() if found is tensor and other != full]
    if tied:
        raise UnsupportedError(
            f"{full} is tied to {tied[0]}: a delta of the one would not reach the other. Load the model with "
            "tie_word_embeddings=False, or leave out this component."
        )
