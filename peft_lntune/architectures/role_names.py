"""The meaning of module names by themselves: which module is a norm, and which sub-layer a module is.

Modeling files differ more in spelling than in words: `self_attn_layer_norm`, `norm_self_att`, `SelfAttention`, `sa_ln`.
Each pattern below matches one word of the field in its usual spellings.
"""

import re
from enum import Enum
from functools import lru_cache

__all__ = ["Word", "is_called_norm", "mentions", "number_of", "says", "sublayer"]

ATTENTION, CROSS, FFN, MIXER = "attention", "cross_attention", "ffn", "mixer"


class Word(Enum):
    """Words that the name of a module may contain; `says` tests for one."""

    NORM = r"norm|(^|_)ln(_|\d|$)"
    PLAIN_NORM = r"^(layer_?|rms_?)?(norm|ln|normalization)(_layer)?(2d)?$"
    """The name says only that this is a norm."""
    TOKENS = r"mixer|temporal|operator|token_mix"
    """Tokens are mixed, by an unnamed operation: `operator_norm`."""
    FIRST_LINEAR = r"^(lin|linear|dense|w)_?1$"
    """The first of two linear maps, as in an FFN that has no module of its own."""
    BARE_CONVOLUTION = r"^conv_?\d$"
    """A numbered convolution, which beside attention encodes positions."""
    BRIDGE = r"merger|projector|connector|(^|_)neck$|router|projection$"
    """A module between two bodies, or before experts; its FFN belongs to no block."""
    QK = r"(^|_)(q|k|qk|query|key|queries|keys)(_|\d|$)|(^|_)kv_"
    """Queries or keys, or the latents of both."""
    VALUE = r"(^|_)(v|value|values)(_|\d|$)"
    EMBEDDING = r"embed|(^|_)emb(_|\d|$)|(^|_)stem(_|$)|patchif|feature_(extract|proj|encod)|subsampl"
    HEAD = r"^(?!.*(multi_?head|att\w*_heads?$))(.*_)?(heads?|cls|classifier|predictions?|pooler)$"
    """A head on top of the body."""
    FIRST = r"(^|_)(input|in|pre|before)(_|$)|(^|_)before|^pre_?(layer|norm|ln|layr)"
    LAST = r"(^|_)(final|last|out|output|f)(_|$)|(^|_)(encoder|decoder)_(layer_?)?norm$|final"
    POST = r"post|after"
    """A norm after another module."""
    SELF = r"self"
    """Self-attention as such."""


_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# Parts of a block named after a sub-layer that are not sub-layers: `attn_dropout`, `mlp_gate`, `self_attn_layer_scale`.
_NO_SUBLAYER = re.compile(
    r"norm|(^|_)ln(_|\d|$)|drop|activation|embed|resid|rotary|router|upsample|downsample"
    r"|(^|_)(act|scale|gate|gates|gamma|bias|mask|rope|pos|alpha|lambda|cache)(_|\d|$)"
)
_WORDS = {
    CROSS: re.compile(r"cross|(enc|encoder|src|context)_?(dec|decoder)?_?att|(^|_)ca(_|$)"),
    MIXER: re.compile(r"linear_att|delta_?net"),
    ATTENTION: re.compile(r"attn|attention|attend|(^|_)(att|sa|mha)(_|\d|$)"),
    FFN: re.compile(
        r"mlp|ffn|ffw|feed_?forward|dense_relu_dense|expert|transition|^intermediate$|channel|feature_mix"
        r"|(^|_)(ff|ffs|moe|fc|swiglu)(_|\d|$)"
    ),
}
_MIXING = re.compile(
    r"mamba|ssm|conv|recurrent|lru|fourier|pooling|modulation|time_mix|(^|_)(rnn|gru|lstm|rwkv|s4|mlstm|slstm|xlstm)(_|\d|$)"
)
_QUERY = re.compile(r"^(to_)?(w?q|w?qkv|query|q_lin|c_attn|query_key_value|fused_qkv)(_proj|_head|_lin|_a_proj)?$")
_STATE = re.compile(r"conv|^(x_proj|dt_proj|rg_lru|time_decay)$")
_RECURRENT = re.compile(r"^[qkv]_conv_?1d$|^receptance$")  # children of modules named attention that are recurrent
_UP = re.compile(r"^(up_proj|gate_up_proj|fc_?1|experts|w1|c_fc|fc_in|dense_h_to_4h)$")
_NUMBER = re.compile(r"^(.*?)_?(\d+)$")


@lru_cache(maxsize=2**14)
def _spelled(name: str) -> str:
    return _CAMEL.sub("_", name).lower()


@lru_cache(maxsize=2**14)
def says(name: str, word: Word) -> bool:
    """Whether the name of a module contains a word, in any of its usual spellings.

    Args:
        name: the module's own name, without the path above it.
        word: the word.

    Returns:
        True where it does.

    Example:
        >>> [says(name, Word.NORM) for name in ("post_attention_layernorm", "ln_1", "attn")]
        [True, True, False]
    """
    return re.search(word.value, _spelled(name)) is not None


def is_called_norm(path: str) -> bool:
    """Whether the last part of a path that is not a number is a norm's name.

    Example:
        >>> is_called_norm("h.0.ln_1"), is_called_norm("layer_norm1.0"), is_called_norm("norm1.linear")
        (True, True, False)
    """
    return says(next((part for part in reversed(path.split(".")) if not part.isdigit()), ""), Word.NORM)


@lru_cache(maxsize=2**14)
def mentions(name: str) -> str | None:
    """The sub-layer that the name of a norm mentions, or None.

    Example:
        >>> mentions("self_attn_layer_norm"), mentions("norm_feed_forward1"), mentions("norm1")
        ('attention', 'ffn', None)
    """
    spelled = _spelled(name)
    found = [role for role, pattern in _WORDS.items() if pattern.search(spelled)]
    if found == [CROSS, FFN]:  # `cross_mlp`: the FFN after cross-attention
        return FFN
    if found:
        return found[0]
    return MIXER if _MIXING.search(spelled) else None


def sublayer(name: str, children: tuple[str, ...]) -> str | None:
    """The kind of sub-layer of a module, read from its name, or from its children where the name is ambiguous.

    Args:
        name: the module's own name.
        children: names of its children.

    Returns:
        `"attention"`, `"cross_attention"`, `"mixer"` or `"ffn"`; None where it is not a known sub-layer.

    Example:
        >>> sublayer("self_attn", ()), sublayer("mixer", ("q_proj", "k_proj")), sublayer("attn_dropout", ())
        ('attention', 'attention', None)
    """
    spelled = _spelled(name)
    if _NO_SUBLAYER.search(spelled):
        return None
    told = mentions(name)
    if told == ATTENTION and any(_RECURRENT.search(_spelled(child)) for child in children):
        return MIXER
    if told is None and (says(name, Word.TOKENS) or spelled in ("block", "layer")):
        inside = _by_children(children)
        return inside or (MIXER if says(name, Word.TOKENS) else None)
    return told


def _by_children(children: tuple[str, ...]) -> str | None:
    for role, pattern in ((ATTENTION, _QUERY), (MIXER, _STATE), (FFN, _UP)):
        if any(pattern.search(_spelled(child)) for child in children):
            return role
    return None


def number_of(name: str) -> tuple[str, int] | None:
    """The stem of a numbered name, and its number; None without a number.

    Example:
        >>> number_of("layer_norm2"), number_of("ln_1"), number_of("norm")
        (('layer_norm', 2), ('ln', 1), None)
    """
    found = _NUMBER.match(_spelled(name))
    return None if found is None else (found[1], int(found[2]))
