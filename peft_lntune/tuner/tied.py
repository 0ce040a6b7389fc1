"""Parameters that several modules share: an adapter that tunes all of them has one delta, and merges it once.

An adapter that tunes only some of the modules works on these alone, as LoRA does on one of two tied weights. Merging
writes into the parameter itself, which the others would see; so it is refused, and names them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from peft_lntune.core.module_tree import base_modules
from peft_lntune.core.shared import tied_parameters
from peft_lntune.errors import UnsupportedError
from peft_lntune.layers import ReplacementLayer
from peft_lntune.planning.types import PlannedModule

__all__ = ["check_tied", "ties_of"]


def ties_of(
    parts: Mapping[str, PlannedModule], tied: Mapping[tuple[str, str], Sequence[tuple[str, str]]]
) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Which of the parameters that are to be tuned are one.

    Args:
        parts: the modules that layers will be put around, by name.
        tied: the `tied_parameters` of the model.

    Returns:
        For a tuned parameter, by module and `"weight"` or `"bias"`, the others that it is tied to, in the same form.

    Raises:
        UnsupportedError: the parts want different things of one parameter.
    """
    tuned = {
        (name, part.own_name(parameter)): (part, parameter)
        for name, part in (parts.items() if tied else ())
        for parameter in part.entries
    }
    found = {}
    for place, (part, parameter) in tuned.items():
        others = [tuned[other] for other in tied.get(place, ()) if other in tuned]
        for other, its in others:
            same = part.method == other.method and part.blocks.get(parameter) == other.blocks.get(its)
            if not same or part.entries[parameter] != other.entries[its]:
                raise UnsupportedError(
                    f"{'.'.join(place)} and {other.name}.{other.own_name(its)} are one parameter, and this config "
                    "tunes them differently. Let it tune both in the same way, or only one of them."
                )
        if others:
            found[part.name, parameter] = [(other.name, its) for other, its in others]
    return found


def check_tied(model: nn.Module, adapter_names: Sequence[str] | None) -> None:
    """Raise where merging these adapters (None: the active ones) would also change modules that they do not tune.

    Args:
        model: the model.
        adapter_names: the adapters; None for the active ones.

    Raises:
        UnsupportedError: a tuned parameter is tied to one that the adapter does not tune. Nothing has changed.
    """
    modules = base_modules(model)
    tied = tied_parameters(modules)
    if not tied:
        return
    layers = {id(m.get_base_layer()): m for m in model.modules() if isinstance(m, ReplacementLayer)}
    for name, module in modules.items():
        layer: Any = layers.get(id(module))
        for adapter in () if layer is None else layer.added(adapter_names):
            for parameter in layer.tunes(adapter):
                own = layer.own_name(parameter)
                covered = layer.tied_to(parameter, adapter)
                left = [o for o, _ in tied.get((name, own), ()) if layers.get(id(modules[o])) not in covered]
                if left:
                    raise UnsupportedError(
                        f"adapter {adapter!r} tunes {name}.{own}, which is tied to the parameter of {', '.join(left)}, "
                        "and does not tune it there: merging would change both. Keep the adapter unmerged; or let it "
                        "tune both; or untie them before (of a language model, load with tie_word_embeddings=False)."
                    )
