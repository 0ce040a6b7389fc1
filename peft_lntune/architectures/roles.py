"""The roles of norms: the sub-layer that each one serves, read from the structure around it.

A role is the sub-layer that a norm feeds (pre-norm) or closes (post-norm). The same name has different meanings in
different blocks: `post_attention_layernorm` feeds the FFN in Llama and closes the attention in Gemma 2. The names of
neighbouring modules decide. `role_rules.py` has general rules for names; `table.py` has the structures that these rules
do not cover or would misread.
"""

from collections.abc import Iterable, Mapping

from peft_lntune.architectures.role_rules import Tree, role_in
from peft_lntune.architectures.table import ARCHITECTURES
from peft_lntune.core.choices import ROLES

__all__ = ["ROLES", "find_roles"]


def find_roles(modules: Iterable[str] | Mapping[str, object], norms: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Find the roles of norms from the names of the modules around them.

    Args:
        modules: names of all modules of the model; or the modules by name, whose classes decide the few cases in which
            names are ambiguous.
        norms: names of its norms, among `modules`.

    Returns:
        The roles of each norm, in the order of `ROLES`; empty where unknown.

    Example:
        >>> names = ["", "h", "h.0", "h.0.ln_1", "h.0.attn", "h.0.mlp", "ln_f"]
        >>> find_roles(names, ["h.0.ln_1", "ln_f"])
        {'h.0.ln_1': ('attention', 'ffn'), 'ln_f': ('final',)}
    """
    classes = {n: type(module).__name__ for n, module in modules.items()} if isinstance(modules, Mapping) else None
    names = dict.fromkeys(modules)
    tree = Tree.of(names, classes)
    places = [place for row in ARCHITECTURES.values() for place in row.norms]

    def roles_of(norm: str) -> tuple[str, ...]:
        """The roles by the nearest fitting row of the table above the norm, otherwise by the nearest rule."""
        parts = norm.split(".") if norm else []
        above = [(".".join(parts[:i]), ".".join(parts[i:])) for i in range(len(parts) - 1, -1, -1)]
        for module, path in above:
            for place in places:
                if path in place.roles and place.fits(module, names):
                    return place.roles[path]
        told = (role_in(tree, module, path) for module, path in above)
        return next((roles for roles in told if roles is not None), ())

    return {norm: roles_of(norm) for norm in norms}
