"""The colour and marker of each method, the same in every plot.

Families have the colours that people with any common colour vision tell apart; members of a family are shades of its
colour. No plot needs the shades to be told apart: a row or the end of a line has the name of its method.
"""

from dataclasses import dataclass

from benchmarks.harness.arms import ALONE

# Most are of Okabe and Ito (2008) and of Tol (2021); all keep their distance for those who see no red, green or blue.
FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "full": ("#000000", "D", ("full",)),
    "head": ("#7f7f7f", "s", ("head",)),
    "norms": (
        "#0072b2",
        "o",
        (
            "ln",
            "ln-weight",
            "ln-bias",
            "ln-attention",
            "ln-ffn",
            "ln-lower",
            "ln-upper",
            "ln-layer",
            "stock-ln",
            "ln-64",
            "ln-bf16",
            "stock-ln-bf16",
        ),
    ),
    "biases": ("#999933", "v", ("bitfit", "beft")),
    "lora": ("#009e73", "^", ("lora", "lora+ln")),
    "factors": ("#a02000", ">", ("ia3", "road")),
    "bottlenecks": ("#d55e00", "X", ("mha-adapter", "ffn-adapter", "mha-adapter+ln", "ffn-adapter+ln")),
    "prefixes": ("#cc79a7", "P", ("prefix", "prefix+ln", "prefix+mha-adapter+ln")),
    "mam": ("#e69f00", "p", ("mam", "mam+ln")),
    "Fisher": ("#332288", "o", ("fisher", "lowest-fisher", "union")),
    "chance": ("#ddcc77", "s", ("random", "random-union", "norm-random", "other-random")),
    "magnitude": ("#882255", "^", ("magnitude", "norm-largest", "norm-smallest", "norm-farthest", "other-largest")),
    "change": ("#117733", "D", ("change",)),
    "zeros": ("#56b4e9", "o", ("supermask", "sampled", "pruned")),
    "components": ("#8a2be2", "h", ALONE),
    "l0": (
        "#402000",
        "d",
        (
            *("l0-close", "l0-no-key", "l0-no-embedding", "l0-no-deepest"),
            *("l0-close-no-deepest", "l0-no-value", "l0-no-lowest"),
        ),
    ),
}
FARTHEST = 0.5  # how far the last shades of a family are on the way to white and to black


@dataclass(frozen=True)
class Look:
    """How a method is drawn.

    Attributes:
        colour: `#rrggbb`, of this method alone.
        marker: as matplotlib names it, of its family.
    """

    colour: str
    marker: str


def _shade(colour: str, number: int, of: int) -> str:
    """Return the family's colour, then by turns one on the way to white and one on the way to black."""
    share, end = FARTHEST * ((number + 1) // 2) / max(of // 2, 2), 255 * (number % 2)
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(part + share * (end - part)):02x}" for part in parts)


LOOKS = {
    method: Look(_shade(colour, number, len(methods)), marker)
    for colour, marker, methods in FAMILIES.values()
    for number, method in enumerate(methods)
}


def find_look(method: str) -> Look:
    """Return how a method is drawn.

    Args:
        method: name of an arm, or `sampled` for the sampled masks of a supermask.

    Raises:
        ValueError: the method has no colour yet.

    Example:
        >>> find_look("ln").colour
        '#0072b2'
    """
    if method not in LOOKS:
        raise ValueError(
            f"{method!r} has no colour. Add the method to one of the families in benchmarks/harness/looks.py."
        )
    return LOOKS[method]
