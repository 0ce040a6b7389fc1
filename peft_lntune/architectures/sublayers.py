"""The sub-layers of a model's blocks: through which leaf each one reads its input, and through which it answers.

A bottleneck adapter works on a sub-layer, but a block has no module for a residual sum, and some have none for the FFN.
What every block has are two leaves: one whose input is x, the sub-layer's input (behind the norm, where the norm comes
first), and one whose output is h, what the block adds to the residual. `table.py` names the two.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from peft_lntune.architectures.role_names import ATTENTION, CROSS, FFN, below
from peft_lntune.architectures.table import ARCHITECTURES

__all__ = ["SUBLAYER_ROLES", "Sublayer", "find_sublayers"]

SUBLAYER_ROLES = (ATTENTION, CROSS, FFN)


@dataclass(frozen=True)
class Sublayer:
    """One sub-layer of a block: `h = sublayer(x)`.

    Attributes:
        role: `"attention"` (over the block's own tokens), `"cross_attention"` (over an encoder's output) or `"ffn"`.
        block: name of the module that it was found in.
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
        modules: the names of all modules, as `peft_lntune.core.module_tree.base_modules` gives them: an adapted
            model's are those it had before.

    Returns:
        The sub-layers, block by block in the order of `modules`, in a block by `SUBLAYER_ROLES`. Empty where no row of
        `peft_lntune.architectures.table.ARCHITECTURES` knows the model.

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
