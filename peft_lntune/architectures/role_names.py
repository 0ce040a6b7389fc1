"""What the names of modules say by themselves: which module is a norm, and which sub-layer another one is.

Modeling files differ in spelling more than in words: `self_attn_layer_norm`, `norm_self_att`, `SelfAttention`, `sa_ln`.
Each pattern below is one word of the field in the spellings in use.
"""

import re
from enum import Enum
from functools import lru_cache

__all__ = ["Word", "below", "is_called_norm", "mentions", "number_of", "says", "sublayer"]

ATTENTION, CROSS, FFN, MIXER = "attention", "cross_attention", "ffn", "mixer"


class Word(Enum):
    """What the name of a module may say of it; `says` asks."""

    NORM = r"norm|(^|_)ln(_|\d|$)"
    PLAIN_NORM = r"^(layer_?|rms_?)?(norm|ln|normalization)(_layer)?(2d)?$"
    """The name says nothing but that this is a norm."""
    TOKENS = r"mixer|temporal|operator|token_mix"
    """Tokens are mixed, and not by what: `operator_norm`."""
    FIRST_LINEAR = r"^(lin|linear|dense|w)_?1$"
    """The first of two linear maps, as in an FFN that has no module of its own."""
    BARE_CONVOLUTION = r"^conv_?\d$"
    """A numbered convolution, which beside attention stands for positions."""
    BRIDGE = r"merger|projector|connector|(^|_)neck$|router|projection$"
    """A module that leads from one body to another, or into experts: its FFN is no block's."""
    QK = r"(^|_)(q|k|qk|query|key|queries|keys)(_|\d|$)|(^|_)kv_"
    """Queries or keys, or what both are made of."""
    VALUE = r"(^|_)(v|value|values)(_|\d|$)"
    EMBEDDING = r"embed|(^|_)emb(_|\d|$)|(^|_)stem(_|$)|patchif|feature_(extract|proj|encod)|subsampl"
    HEAD = r"^(?!.*(multi_?head|att\w*_heads?$))(.*_)?(heads?|cls|classifier|predictions?|pooler)$"
    """A head on top of the body."""
    FIRST = r"(^|_)(input|in|pre|before)(_|$)|(^|_)before|^pre_?(layer|norm|ln|layr)"
    LAST = r"(^|_)(final|last|out|output|f)(_|$)|(^|_)(encoder|decoder)_(layer_?)?norm$|final"
    POST = r"post|after"
    """A norm behind something."""
    SELF = r"self"
    """Self-attention as such."""


_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# Parts of a block that carry a sub-layer's name and are none: `attn_dropout`, `mlp_gate`, `self_attn_layer_scale`.
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
_RECURRENT = re.compile(
    r"^[qkv]_conv_?1d$|^receptance$"
)  # what makes an attention one of states: its name does not say so
_UP = re.compile(r"^(up_proj|gate_up_proj|fc_?1|experts|w1|c_fc|fc_in|dense_h_to_4h)$")
_NUMBER = re.compile(r"^(.*?)_?(\d+)$")


@lru_cache(maxsize=2**14)
def _spelled(name: str) -> str:
    return _CAMEL.sub("_", name).lower()


@lru_cache(maxsize=2**14)
def says(name: str, word: Word) -> bool:
    """Whether the name of a module says something of it.

    Args:
        name: the module's own name, without what is above it.
        word: what it may say.

    Returns:
        Whether it does, in any of the spellings in use.

    Example:
        >>> [says(name, Word.NORM) for name in ("post_attention_layernorm", "ln_1", "attn")]
        [True, True, False]
    """
    return re.search(word.value, _spelled(name)) is not None


def is_called_norm(path: str) -> bool:
    """Whether the last part of a path that is no number is a norm's name.

    Example:
        >>> is_called_norm("h.0.ln_1"), is_called_norm("layer_norm1.0"), is_called_norm("norm1.linear")
        (True, True, False)
    """
    return says(next((part for part in reversed(path.split(".")) if not part.isdigit()), ""), Word.NORM)


@lru_cache(maxsize=2**14)
def mentions(name: str) -> str | None:
    """The sub-layer that the name of a norm speaks of, None where it speaks of none.

    Example:
        >>> mentions("self_attn_layer_norm"), mentions("norm_feed_forward1"), mentions("norm1")
        ('attention', 'ffn', None)
    """
    spelled = _spelled(name)
    found = [role for role, pattern in _WORDS.items() if pattern.search(spelled)]
    if found == [CROSS, FFN]:  # `cross_mlp`: the FFN behind it
        return FFN
    if found:
        return found[0]
    return MIXER if _MIXING.search(spelled) else None


def sublayer(name: str, children: tuple[str, ...]) -> str | None:
    """What sub-layer a module is, told from its name, or from its children where the name leaves it open.

    Args:
        name: the module's own name.
        children: the names of its children.

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
    """The stem of a numbered name, and its number.

    Example:
        >>> number_of("layer_norm2"), number_of("ln_1"), number_of("norm")
        (('layer_norm', 2), ('ln', 1), None)
    """
    found = _NUMBER.match(_spelled(name))
    return None if found is None else (found[1], int(found[2]))


def below(above: str, path: str) -> str:
    """The name of a module from that of one above it, `""` for the model, and its path below that.

    Example:
        >>> below("h.0", "attn"), below("", "attn")
        ('h.0.attn', 'attn')
    """
    return f"{above}.{path}" if above else path
