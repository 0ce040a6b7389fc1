"""What the names of modules say by themselves: which module is a norm, and which sub-layer another one is.

Modeling files differ in spelling more than in words: `self_attn_layer_norm`, `norm_self_att`, `SelfAttention`, `sa_ln`.
Each pattern below is one word of the field in the spellings in use.
"""

import re
from functools import lru_cache

__all__ = [
    "below",
    "is_bare_convolution",
    "is_bridge",
    "is_called_norm",
    "is_embedding",
    "is_first",
    "is_first_linear",
    "is_head",
    "is_last",
    "is_norm",
    "is_plain_norm_name",
    "is_qk",
    "is_value",
    "mentions",
    "number_of",
    "reads_tokens",
    "says_post",
    "says_self",
    "sublayer",
]

ATTENTION, CROSS, FFN, MIXER = "attention", "cross_attention", "ffn", "mixer"

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)")
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
_TOKENS = re.compile(r"mixer|temporal|operator|token_mix")  # says that tokens are mixed, and not by what
_QUERY = re.compile(r"^(to_)?(w?q|w?qkv|query|q_lin|c_attn|query_key_value|fused_qkv)(_proj|_head|_lin|_a_proj)?$")
_STATE = re.compile(r"conv|^(x_proj|dt_proj|rg_lru|time_decay)$")
_RECURRENT = re.compile(
    r"^[qkv]_conv_?1d$|^receptance$"
)  # what makes an attention one of states: its name does not say so
_UP = re.compile(r"^(up_proj|gate_up_proj|fc_?1|experts|w1|c_fc|fc_in|dense_h_to_4h)$")
_QK = re.compile(r"(^|_)(q|k|qk|query|key|queries|keys)(_|\d|$)|(^|_)kv_")
_BARE_CONV = re.compile(r"^conv_?\d$")
_FIRST_LINEAR = re.compile(r"^(lin|linear|dense|w)_?1$")
_BRIDGE = re.compile(r"merger|projector|connector|(^|_)neck$|router|projection$")
_VALUE = re.compile(r"(^|_)(v|value|values)(_|\d|$)")
_EMBEDDING = re.compile(r"embed|(^|_)emb(_|\d|$)|(^|_)stem(_|$)|patchif|feature_(extract|proj|encod)|subsampl")
_HEAD = re.compile(r"(^|_)(heads?|cls|classifier|predictions?|pooler)$")
_NO_HEAD = re.compile(r"multi_?head|att\w*_heads?$")
_FIRST = re.compile(r"(^|_)(input|in|pre|before)(_|$)|(^|_)before|^pre_?(layer|norm|ln|layr)")
_LAST = re.compile(r"(^|_)(final|last|out|output|f)(_|$)|(^|_)(encoder|decoder)_(layer_?)?norm$|final")
_POST = re.compile(r"post|after")
_PLAIN = re.compile(r"^(layer_?|rms_?)?(norm|ln|normalization)(_layer)?(2d)?$")
_NUMBER = re.compile(r"^(.*?)_?(\d+)$")


@lru_cache(maxsize=2**14)
def _spelled(name: str) -> str:
    return _CAMEL.sub("_", name).lower()


@lru_cache(maxsize=2**14)
def is_norm(name: str) -> bool:
    """Whether a module is called a norm.

    Example:
        >>> is_norm("post_attention_layernorm"), is_norm("ln_1"), is_norm("attn")
        (True, True, False)
    """
    return _NORM.search(_spelled(name)) is not None


def is_called_norm(path: str) -> bool:
    """Whether the last part of a path that is no number is a norm's name.

    Example:
        >>> is_called_norm("h.0.ln_1"), is_called_norm("layer_norm1.0"), is_called_norm("norm1.linear")
        (True, True, False)
    """
    return is_norm(next((part for part in reversed(path.split(".")) if not part.isdigit()), ""))


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
    if told is None and (_TOKENS.search(spelled) or spelled in ("block", "layer")):
        inside = _by_children(children)
        return inside or (MIXER if _TOKENS.search(spelled) else None)
    return told


def _by_children(children: tuple[str, ...]) -> str | None:
    for role, pattern in ((ATTENTION, _QUERY), (MIXER, _STATE), (FFN, _UP)):
        if any(pattern.search(_spelled(child)) for child in children):
            return role
    return None


def is_first_linear(name: str) -> bool:
    """Whether a module is called the first of two linear maps, as in an FFN that has no module of its own."""
    return _FIRST_LINEAR.search(_spelled(name)) is not None


def is_bare_convolution(name: str) -> bool:
    """Whether a module is a numbered convolution, which beside attention stands for positions."""
    return _BARE_CONV.search(_spelled(name)) is not None


def is_bridge(name: str) -> bool:
    """Whether a module leads from one body to another, or into experts: its FFN is no block's."""
    return _BRIDGE.search(_spelled(name)) is not None


def reads_tokens(name: str) -> bool:
    """Whether a norm is called after the token mixer of its block, whatever that is: `operator_norm`."""
    return _TOKENS.search(_spelled(name)) is not None


def is_qk(name: str) -> bool:
    """Whether a norm inside attention is called after queries or keys, or after what both are made of."""
    return _QK.search(_spelled(name)) is not None


def is_value(name: str) -> bool:
    """Whether a norm inside attention is called after values."""
    return _VALUE.search(_spelled(name)) is not None


def is_embedding(name: str) -> bool:
    """Whether a module makes embeddings, or a norm is called after them."""
    return _EMBEDDING.search(_spelled(name)) is not None


def is_head(name: str) -> bool:
    """Whether a module is called a head on top of the body."""
    return _HEAD.search(_spelled(name)) is not None and not _NO_HEAD.search(_spelled(name))


def is_first(name: str) -> bool:
    """Whether a norm says that it comes first."""
    return _FIRST.search(_spelled(name)) is not None


def is_last(name: str) -> bool:
    """Whether a norm says that it comes last."""
    return _LAST.search(_spelled(name)) is not None


def says_post(name: str) -> bool:
    """Whether a norm says that it comes behind something."""
    return _POST.search(_spelled(name)) is not None


def says_self(name: str) -> bool:
    """Whether the name speaks of self-attention as such."""
    return "self" in _spelled(name)


def is_plain_norm_name(name: str) -> bool:
    """Whether a name says nothing but that this is a norm."""
    return _PLAIN.search(_spelled(name)) is not None


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
