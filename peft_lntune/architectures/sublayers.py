"""The sub-layers of a model's blocks: the leaf that reads the input of each one, and the leaf that gives its output.

A bottleneck adapter works on a sub-layer, but blocks have no module for a residual sum, and some have none for the FFN.
Every block has two leaves: one whose input is x, the sub-layer's input (after the norm, in pre-norm models), and one
whose output is h, which the block adds to the residual. `table.py` names both.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from peft_lntune.architectures.table import ARCHITECTURES
from peft_lntune.core.module_tree import below

__all__ = ["SUBLAYER_ROLES", "Sublayer", "SublayerRole", "find_sublayers"]

SublayerRole = Literal["attention", "cross_attention", "ffn"]
SUBLAYER_ROLES: tuple[SublayerRole, ...] = get_args(SublayerRole)


@dataclass(frozen=True)
class Sublayer:
    """One sub-layer of a block: `h = sublayer(x)`.

    Attributes:
        role: `"attention"` (over the block's own tokens), `"cross_attention"` (over an encoder's output) or `"ffn"`.
        block: name of the module that contains it.
        entry: name of the leaf whose input is x.
        exit: name of the leaf whose output is h, before dropout.
    """

    role: str
    block: str
    entry: str
    exit: str


def find_sublayers(modules: Iterable[str]) -> list[Sublayer]:
    """Find the sub-layers of a model from the names of its modules.

    Args:
        modules: names of all modules of the base model, from `peft_lntune.core.module_tree.base_modules`.

    Returns:
        The sub-layers, block by block in the order of `modules`, within a block in that of `SUBLAYER_ROLES`. Empty
        where no row of `peft_lntune.architectures.table.ARCHITECTURES` fits the model.

    Example:
        >>> names = ["", "h", "h.0", "h.0.mlp", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
        >>> find_sublayers(names)
        [Sublayer(role='ffn', block='h.0', entry='h.0.mlp.c_fc', exit='h.0.mlp.c_proj')]
    """
    names = dict.fromkeys(modules)
    spans = [span for row in ARCHITECTURES.values() for span in row.sublayers]
    found: list[Sublayer] = []
    for block in names:
        for role in SUBLAYER_ROLES:
            span = next((span for span in spans if span.role == role and span.fits(block, names)), None)
            if span is not None:
                found.append(Sublayer(role, block, below(block, span.entry), below(block, span.exit)))
    return found
