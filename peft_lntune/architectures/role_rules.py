"""Rules for the role of a norm, from the modules beside it in its block and above it in the model.

A rule gives an answer only where the names are unambiguous. Otherwise the norm has no role: a wrong role would silently
tune another sub-layer than the requested one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from peft_lntune.architectures.role_names import (
    ATTENTION,
    CROSS,
    FFN,
    MIXER,
    Word,
    mentions,
    number_of,
    says,
    sublayer,
)
from peft_lntune.core.module_tree import below

__all__ = ["Tree", "role_in"]

_ORDER = (ATTENTION, CROSS, MIXER, FFN)  # order of sub-layers in a block
_BEHIND = ("merger", "neck")  # bridges after the last block of a body
Roles = tuple[str, ...]


@dataclass(frozen=True)
class Tree:
    """The modules of a model by name.

    Attributes:
        children: for each module with children their names, in the model's order.
        classes: for each module the name of its class; empty where only names are known.
    """

    children: Mapping[str, tuple[str, ...]]
    classes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Iterable[str], classes: Mapping[str, str] | None = None) -> "Tree":
        """Build the tree from the names of all modules.

        Args:
            names: names of all modules, in the model's order.
            classes: for each module the name of its class, or None.

        Returns:
            The tree.
        """
        children: dict[str, dict[str, None]] = {}
        for name in names:
            if name:
                parent, _, child = name.rpartition(".")
                children.setdefault(parent, {})[child] = None
        return cls({name: tuple(found) for name, found in children.items()}, classes or {})

    def sublayer(self, name: str) -> str | None:
        """The kind of sub-layer of a module; for a list of modules, by its name."""
        return sublayer(name.rpartition(".")[2], self.children.get(name, ()))

    def sublayers(self, block: str) -> Roles:
        """The kinds of sub-layers among the children of a module, in the order of a block."""
        children = self.children.get(block, ())
        kinds = {child: kind for child in children if (kind := self.sublayer(below(block, child))) is not None}
        found = set(kinds.values())
        if found & {ATTENTION, CROSS}:
            found = {kind for child, kind in kinds.items() if not says(child, Word.BARE_CONVOLUTION)}
        if found and any(says(child, Word.FIRST_LINEAR) for child in children):
            found.add(FFN)
        return tuple(role for role in _ORDER if role in found)

    def norms(self, block: str) -> Roles:
        """The names of the norms among the children of a module."""
        return tuple(child for child in self.children.get(block, ()) if says(child, Word.NORM))

    @cached_property
    def blocks(self) -> Roles:
        """The entries of lists that have sub-layers, in the model's order; not the bridges between bodies."""
        entries = (name for name in self.children if name.rpartition(".")[2].isdigit())
        bridged = (name for name in entries if not any(says(part, Word.BRIDGE) for part in name.split(".")))
        return tuple(name for name in bridged if self.sublayers(name))

    @cached_property
    def stacks(self) -> frozenset[str]:
        """The modules above blocks: above entries of a list that have sub-layers."""
        found: set[str] = set()
        for name in self.children:
            if name.rpartition(".")[2].isdigit() and self.sublayers(name):
                above = name.rpartition(".")[0]
                while above not in found:
                    found.add(above)
                    above = above.rpartition(".")[0]
        return frozenset(found)


def role_in(tree: Tree, above: str, path: str) -> Roles | None:
    """The role of a norm, as far as one module above it decides.

    Args:
        tree: the model.
        above: name of the module.
        path: the norm's path below it.

    Returns:
        The roles; empty where they are certainly unknown, None where modules further up may decide.
    """
    own, name = above.rpartition(".")[2], _direct(path)
    if says(own, Word.HEAD):
        return ("final",)
    stack = above in tree.stacks
    if says(own, Word.NORM) and not stack:  # modules in a norm belong to the norm
        return None
    if says(_unnumbered(above), Word.BRIDGE) and not says(own, Word.EMBEDDING):
        return ("final",) if own in _BEHIND and above.rpartition(".")[0] in tree.stacks else ()
    siblings = tree.children.get(above.rpartition(".")[0], ())
    if "output" in own and own.replace("output", "intermediate") in siblings:
        return (FFN,)  # models like BERT, where the FFN is two modules, `intermediate` and `output`
    kind = tree.sublayer(above) if own and not own.isdigit() else None
    if stack:
        if kind is None and says(own, Word.EMBEDDING):
            return ("embedding",)
        return None if name is None else _in_stack(tree, above, name)
    kinds = tree.sublayers(above)
    if name is not None and len(kinds) > 1:
        return _in_block(name, kinds, tree.norms(above)) or _behind_one_with_its_own(tree, above, name, kinds)
    if kind is not None:
        return _inside(kind, path.rpartition(".")[2], above, tree)
    if says(own, Word.EMBEDDING):
        return ("embedding",)
    if name is not None and kinds:
        return _beside_one(name, kinds[0], above, tree)
    return None


def _direct(path: str) -> str | None:
    """The name of the module's own child that is the norm, or that only wraps it: a list, or a norm in a norm."""
    first, *rest = path.split(".")
    if first.isdigit() or not says(first, Word.NORM):
        return None
    return first if all(part.isdigit() or says(part, Word.NORM) for part in rest) else None


def _unnumbered(name: str) -> str:
    """A module's own name; for an entry of a list, the name of the list."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), "")


def _inside(kind: str, name: str, above: str, tree: Tree) -> Roles:
    """The role of a norm within a sub-layer."""
    if kind in (ATTENTION, CROSS):
        if says(name, Word.QK):
            return ("qk",)
        if says(name, Word.VALUE):
            return ()
    return _in_the_body(kind, above)


def _beside_one(name: str, kind: str, above: str, tree: Tree) -> Roles:
    """The role of a norm in a block with sub-layers of one kind."""
    told = mentions(name)
    if kind in (ATTENTION, CROSS) and says(name, Word.QK):
        return ("qk",)
    if told is not None and told != kind and {told, kind} != {ATTENTION, CROSS}:
        return ()
    mixing = [child for child in tree.children[above] if tree.sublayer(below(above, child)) == MIXER]
    if kind == MIXER and len(mixing) == 1 and mixing[0] == "conv" and not says(above, Word.EMBEDDING):
        return ()  # one convolution with a norm may lead to the next stage or to a feature pyramid
    return _in_the_body(kind, above)


def _in_the_body(kind: str, above: str) -> Roles:
    """The role within a sub-layer of this kind; convolutions before the first block compute the embeddings."""
    parts = above.split(".")
    if kind == MIXER and any(says(part, Word.EMBEDDING) for part in parts):
        return ("embedding",)
    if kind in (MIXER, FFN) and not any(part.isdigit() for part in parts):
        return ()
    return (kind,)


def _in_stack(tree: Tree, above: str, name: str) -> Roles:
    """The role of a norm beside a list of blocks."""
    if number_of(name) is not None and tree.sublayers(above):
        return _in_block(name, tree.sublayers(above), tree.norms(above))  # parallel lists of norms and sub-layers
    if name.lower().endswith("after"):
        return ("final",)
    if says(name, Word.EMBEDDING) or says(name, Word.FIRST) or mentions(name) == MIXER:
        return ("embedding",)
    if says(name, Word.LAST) or says(name, Word.POST):
        return ("final",)
    children = tree.children[above]
    plain = [norm for norm in tree.norms(above) if says(norm, Word.PLAIN_NORM)]
    if plain != [name]:
        return ()
    if "pos_conv_embed" in children:
        # Models like wav2vec 2.0 have the same names; only the class tells at which end the norm is.
        kind = tree.classes.get(above)
        return () if kind is None else ("final",) if "Stable" in kind or "Conformer" in kind else ("embedding",)
    carriers = [child for child in children if below(above, child) in tree.stacks]
    lists = [child for child in carriers if any(part.isdigit() for part in tree.children[below(above, child)])]
    if len(carriers) > 1 and "layers" not in lists:
        return ()
    if tree.classes and "embed_tokens" not in children and children.index(name) < children.index(carriers[0]):
        return ()  # registered before the blocks, so it may run before them
    return ("final",)


def _in_block(name: str, kinds: Roles, norms: Roles) -> Roles:
    """The role of a norm in a block with several kinds of sub-layers."""
    if says(name, Word.EMBEDDING):
        return ("embedding",)
    told = mentions(name)
    tokens = [kind for kind in kinds if kind != FFN]
    if says(name, Word.TOKENS):
        return (tokens[0],) if len(tokens) == 1 else ()
    if told == ATTENTION:
        attention = next((kind for kind in tokens if kind in (ATTENTION, CROSS)), None)
        if attention is None:
            return _behind_tokens(name, norms, tokens) if says(name, Word.POST) else ()
        return _behind_tokens(name, norms, [attention]) if says(name, Word.POST) else (attention,)
    if told is not None:
        return (told,) if told in kinds or (told == CROSS and ATTENTION in kinds) else ()
    return _by_place(name, kinds, tokens, norms)


def _behind_tokens(name: str, norms: Roles, tokens: list[str]) -> Roles:
    """`post_attention_layernorm` closes the attention or feeds the FFN after it; its neighbours decide."""
    others = [norm for norm in norms if norm != name]
    before = any(mentions(norm) == ATTENTION and says(norm, Word.FIRST) for norm in others)
    closes: Roles = (tokens[0],) if len(tokens) == 1 else ()
    if says(name, Word.SELF):
        return closes
    if any(says(norm, Word.POST) and says(norm, Word.SELF) for norm in others):
        return (FFN,)
    ffn = [norm for norm in others if mentions(norm) == FFN]
    first = any(says(norm, Word.FIRST) and norm not in ffn for norm in others)
    if any(not says(norm, Word.POST) for norm in ffn):
        return closes
    if ffn:
        return () if first else closes
    if before and len(others) > 1:
        return closes
    return (FFN,) if first else ()


def _behind_one_with_its_own(tree: Tree, above: str, name: str, kinds: Roles) -> Roles:
    """A plain norm belongs to the FFN where the attention beside it contains a norm."""
    if not says(name, Word.PLAIN_NORM) or len(tree.norms(above)) > 1 or len(kinds) != 2 or FFN not in kinds:
        return ()
    holders = set()
    for child in tree.children[above]:
        place = below(above, child)
        inner = [norm for norm in tree.norms(place) if not says(norm, Word.QK)]
        if inner or any(tree.norms(below(place, deeper)) for deeper in tree.children.get(place, ())):
            holders.add(tree.sublayer(place))
    return (FFN,) if len(holders) == 1 and FFN not in holders and None not in holders else ()


def _by_place(name: str, kinds: Roles, tokens: list[str], norms: Roles) -> Roles:
    """The role of a norm whose name gives at most its place in the block: first, second, last."""
    if FFN not in kinds or not tokens:
        return ()
    alone = len(norms) == 1
    numbered = number_of(name)
    if numbered is not None:
        return _by_number(numbered, kinds, norms)
    if says(name, Word.LAST):
        return (FFN,)
    if says(name, Word.FIRST) and not says(name, Word.POST):
        if alone:
            return _parallel(kinds)
        if tokens == [ATTENTION, MIXER] and len(norms) == 2:
            return (ATTENTION, MIXER)  # side by side, before an FFN with the other norm
        return (tokens[0],) if len(tokens) == 1 or tokens[0] == ATTENTION else ()
    if says(name, Word.POST) and not says(name, Word.FIRST):
        if name.lower().replace("after", "before") in {norm.lower() for norm in norms} - {name.lower()}:
            return (FFN,)
        first = [norm for norm in norms if says(norm, Word.FIRST)]
        return (FFN,) if len(norms) == 2 and len(first) == 1 else ()
    if says(name, Word.PLAIN_NORM) and len(kinds) == 2 and len(norms) == 2:
        (other,) = (norm for norm in norms if norm != name)
        its = () if says(other, Word.PLAIN_NORM) else _in_block(other, kinds, norms)
        return tuple(kind for kind in kinds if kind not in its) if len(its) == 1 else ()
    return ()


def _by_number(numbered: tuple[str, int], kinds: Roles, norms: Roles) -> Roles:
    """The role of `norm1`, `norm2`: one for each sub-layer that no other norm is named after."""
    stem, number = numbered
    found = {norm: number_of(norm) for norm in norms}
    alike = sorted(its[1] for its in found.values() if its is not None and its[0] == stem)
    if len(norms) == 1:
        return _parallel(kinds)
    named = {mentions(norm) for norm, its in found.items() if its is None or its[0] != stem}
    left = [kind for kind in kinds if kind not in named]
    return (left[alike.index(number)],) if len(alike) == len(left) else ()


def _parallel(kinds: Roles) -> Roles:
    """The role of a single norm before parallel sub-layers."""
    return kinds if kinds == (ATTENTION, FFN) else ()
