"""Compute a norm with other parameters than its own, wider ones, and its own bits where nothing has changed.

A norm is `y = xhat * (weight + offset) + bias`. In half precision it matters where a norm rounds: Llama's rounds xhat
and then the product, Gemma's only the product, T5's rounds xhat if its weight is in half precision. So each norm is
called in the first of these ways that repeats the base's bits, learnt by running a small copy once per norm and dtype:

    own         the norm's own forward on the input as it is
    wide        the norm's own forward on a widened input, tried first where the result must not be rounded yet
    rounded     the norm's own forward with neutral parameters of its own dtype, then the affine part outside
    corrected   as wide, plus what the base's output differs from that with unchanged parameters

Each runs the module's own forward with its parameters shadowed in the instance's `__dict__`, which Python consults
before `nn.Module.__getattr__`. This works in one graph of torch.compile, and where FSDP keeps its own entries there.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_lntune.core import probe
from peft_lntune.core.probe import align
from peft_lntune.errors import UnsupportedError

__all__ = [
    "FAST_PATHS",
    "align",
    "call_hooked",
    "call_with",
    "call_with_rows",
    "fast_path",
    "normalize",
    "output_dtype",
    "shadowed",
]

FastPath = Callable[[Any, Tensor, Tensor, "Tensor | None"], Tensor]
FAST_PATHS: dict[type[nn.Module], FastPath] = {}
_MISSING = object()
_PROBED_ENTRIES = 4096  # enough that a way which rounds elsewhere cannot agree by chance


def fast_path(cls: type[nn.Module]) -> Callable[[FastPath], FastPath]:
    """Register `(norm, x, weight, bias) -> y` for norms of exactly this class.

    A fast path is admitted only when a test shows it bit-equal to the module at zero delta, in every dtype.

    Raises:
        KeyError: the class has a fast path already.
    """

    def register(function: FastPath) -> FastPath:
        if cls in FAST_PATHS:
            raise KeyError(f"{cls.__name__} already has the fast path {FAST_PATHS[cls].__name__}")
        FAST_PATHS[cls] = function
        return function

    return register


@fast_path(nn.LayerNorm)
def layer_norm(norm: nn.LayerNorm, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One fused call: torch takes float32 parameters beside an input in half precision, and rounds once."""
    if weight.dtype != x.dtype and weight.dtype != torch.float32:  # the only pair of dtypes the kernel takes
        return F.layer_norm(x.to(weight.dtype), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def call_with(
    norm: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any, **kwargs: Any
) -> Tensor:
    """Call a norm with these effective parameters in place of its own.

    The module's forward and its hooks run, and the output has the dtype that the module's own call would have given.

    Args:
        norm: the module; afterwards it is as it was, also when its forward raises. Not for two threads at once.
        x: its input, `(B, ..., d)`.
        weight: of the shape of the norm's weight, in float32 or wider; None keeps the norm's own.
        bias: likewise. A norm that has no bias takes one too: it is added before the output is rounded.
        *args: further arguments of the module's forward, such as a gate.
        **kwargs: likewise.

    Returns:
        `xhat * (weight + offset) + bias`, bit-equal to `norm(x)` where the parameters are the norm's own, widened.

    Example:
        >>> norm, x = nn.LayerNorm(4).bfloat16(), torch.randn(2, 4).bfloat16()
        >>> torch.equal(call_with(norm, x, norm.weight.float(), norm.bias.float()), norm(x))
        True
    """
    given = weight if weight is not None else bias
    if given is None:
        return norm(x, *args, **kwargs)
    own_bias = _parameter(norm, "bias")
    weight = _parameter(norm, "weight").to(given.dtype) if weight is None else weight
    bias = own_bias.to(given.dtype) if bias is None and own_bias is not None else bias
    path = FAST_PATHS.get(type(norm))
    if path is not None and not args and not kwargs and _is_plain(norm):
        return path(norm, x, weight, bias)
    outer_bias = bias is not None and own_bias is None
    rule, own, wider = _rule(norm, x.device, x.dtype, weight.dtype, outer_bias), norm.forward, (weight, bias)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _by_rule(norm, rule, own, wider, x, args, kwargs)

    return call_hooked(norm, forward, x, *args, **kwargs)


def call_with_rows(
    norm: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
) -> Tensor:
    """Call a norm with other parameters for each sample; hooks and output dtype as in `call_with`.

    Args:
        norm: the module, as in `call_with`.
        x: its input, `(B, ..., d)`.
        weight: `weight + offset` of each sample, `(B, 1, ..., d)` or whatever broadcasts over `x`; float32 or wider.
        bias: likewise, or None where there is none.
        *args: further arguments of the module's forward, such as a gate.
        **kwargs: likewise.

    Returns:
        `xhat * weight + bias`.

    Example:
        >>> norm, x = nn.LayerNorm(2, bias=False), torch.tensor([[1.0, 3.0], [1.0, 3.0]])
        >>> call_with_rows(norm, x, torch.tensor([[1.0, 1.0], [2.0, 2.0]]), None).round()
        tensor([[-1.,  1.],
                [-2.,  2.]])
    """
    if type(norm) is nn.LayerNorm and not args and not kwargs and _is_plain(norm):
        wide = F.layer_norm(x.to(weight.dtype), norm.normalized_shape, None, None, norm.eps)
        return (wide * weight if bias is None else torch.addcmul(bias, wide, weight)).to(x.dtype)
    rule, own = _rule(norm, x.device, x.dtype, weight.dtype, True), norm.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        xhat = _neutral(norm, rule, own, x, args, kwargs)
        y = xhat * weight if bias is None else torch.addcmul(bias, xhat, weight)
        return y.to(x.dtype if rule.dtype is None else rule.dtype)

    return call_hooked(norm, forward, x, *args, **kwargs)


def normalize(norm: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The normalized input before weight and bias, rounded as the norm itself rounds it, in float32 or wider.

    The norm's output is `(xhat * align(weight + offset, x, axis) + align(bias, x, axis)).to(output_dtype(norm, x))`:
    bit for bit where the norm computes step by step, within its own rounding where it is fused or gated.

    Args:
        norm: the module; its hooks do not run, see `call_hooked`.
        x: its input, `(B, ..., d)`.
        *args: further arguments of the module's forward, such as a gate; what a gate does is part of the result.
        **kwargs: likewise.

    Returns:
        xhat, of the shape of `x`.

    Raises:
        UnsupportedError: the module is no norm.

    Example:
        >>> normalize(nn.LayerNorm(4), torch.tensor([[0.0, 0.0, 2.0, 2.0]])).round()
        tensor([[-1., -1.,  1.,  1.]])
    """
    if type(norm) is nn.LayerNorm and not args and not kwargs:
        wide = torch.promote_types(x.dtype, _wide(norm))
        return F.layer_norm(x.to(wide), norm.normalized_shape, None, None, norm.eps).to(wide)
    rule = _rule(norm, x.device, x.dtype, _wide(norm), True)
    if not rule.is_norm:
        raise UnsupportedError(
            f"normalize expects a norm, whose output is affine in its weight and free of its input's scale; "
            f"{type(norm).__name__} is none. See find_norms(model) for the norms of a model."
        )
    return _neutral(norm, rule, norm.forward, x, args, kwargs).to(rule.wide)


def output_dtype(norm: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype that `norm(x)` would have, here and now (autocast counts), without running the model's module.

    Example:
        >>> output_dtype(nn.LayerNorm(4), torch.ones(2, 4))
        torch.float32
    """
    rule = _rule(norm, x.device, x.dtype, _wide(norm), True)
    return x.dtype if rule.dtype is None else rule.dtype


def call_hooked(norm: nn.Module, forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call a module with another forward, so that the hooks on the module run around it.

    Args:
        norm: the module; afterwards its forward is its own again, also when `forward` raises.
        forward: called in place of the module's, as `forward(x, *args, **kwargs)`.
        x: the input.
        *args: passed on.
        **kwargs: passed on.

    Example:
        >>> call_hooked(nn.LayerNorm(2), lambda x: x + 1, torch.zeros(2))
        tensor([1., 1.])
    """
    return shadowed(norm, {"forward": forward}, norm, x, *args, **kwargs)


def shadowed(
    module: nn.Module, entries: Mapping[str, Any], function: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Call a function while `entries` stand in place of a module's attributes.

    They are put in the instance's `__dict__`, which Python asks first: parameters and methods can be shadowed, and what
    is registered is never touched.

    Args:
        module: afterwards it is as it was, also when `function` raises. Not for two threads at once.
        entries: attributes by name.
        function: called as `function(*args, **kwargs)`; usually the module itself, or its forward.
        *args: passed on.
        **kwargs: passed on.

    Returns:
        What `function` returns.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> shadowed(norm, {"bias": torch.ones(2)}, norm, torch.zeros(1, 2))
        tensor([[1., 1.]], grad_fn=<NativeLayerNormBackward0>)
    """
    state = module.__dict__
    before = {key: state.get(key, _MISSING) for key in entries}
    try:
        state.update(entries)
        return function(*args, **kwargs)
    finally:
        for key, value in before.items():
            if value is _MISSING:
                state.pop(key, None)
            else:
                state[key] = value


def _by_rule(
    norm: nn.Module,
    rule: "_Rule",
    own: Callable[..., Tensor],
    wider: tuple[Tensor, Tensor | None],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """The norm with the parameters `wider`, computed the rule's way by its forward `own`, in the rule's dtype."""
    weight, bias = wider
    if rule.way == "corrected":
        # Rounded before the correction, which has the same spacing: the sum is exact where nothing has changed.
        y = _by_rule(norm, replace(rule, way="wide"), own, wider, x, args, kwargs).to(rule.wide)
        return (y + _correction(norm, rule, own, x, args, kwargs)).to(rule.dtype)
    if rule.way == "rounded":
        y = _neutral(norm, rule, own, x, args, kwargs)
        y = y * align(weight + rule.offset if rule.offset else weight, x, rule.axis)
    else:
        entries = {"weight": weight}
        if bias is not None and _parameter(norm, "bias") is not None:
            entries["bias"], bias = bias, None
        y = shadowed(norm, entries, own, x.to(rule.wide) if rule.way == "wide" else x, *args, **kwargs)
    y = y if bias is None else y + align(bias, x, rule.axis)
    return y if rule.dtype is None else y.to(rule.dtype)


@torch.no_grad()
def _correction(
    norm: nn.Module,
    rule: "_Rule",
    own: Callable[..., Tensor],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """What the norm rounds away on its way, by which its output differs from the same computed wide."""
    weight, bias = _parameter(norm, "weight").to(rule.wide), _parameter(norm, "bias")
    wider = weight, None if bias is None else bias.to(rule.wide)
    wide = _by_rule(norm, replace(rule, way="wide"), own, wider, x, args, kwargs)
    return own(x, *args, **kwargs).to(rule.wide) - wide.to(rule.wide)


def _neutral(
    norm: nn.Module,
    rule: "_Rule",
    own: Callable[..., Tensor],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """The norm's forward `own` with parameters that change nothing."""
    weight, bias = _parameter(norm, "weight"), _parameter(norm, "bias")
    dtype = weight.dtype if rule.way == "rounded" else rule.wide
    entries = {"weight": torch.full_like(weight, 1.0 - rule.offset, dtype=dtype)}
    if bias is not None:
        entries["bias"] = torch.zeros_like(bias, dtype=dtype)
    return shadowed(norm, entries, own, x.to(rule.wide) if rule.way in ("wide", "corrected") else x, *args, **kwargs)


def _is_plain(norm: nn.Module) -> bool:
    """Whether nothing is attached to this module that a call of its function alone would skip."""
    hooks = norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks
    return not any(hooks) and "forward" not in norm.__dict__


def _wide(norm: nn.Module) -> torch.dtype:
    return torch.promote_types(_parameter(norm, "weight").dtype, torch.float32)


def _parameter(norm: nn.Module, name: str) -> Any:
    """A parameter of the norm, or None; typed loosely since torch types every attribute as tensor or module."""
    return getattr(norm, name, None)


@dataclass(frozen=True)
class _Rule:
    """How to call one norm on one dtype: `dtype` is the output's (None: as it comes), `wide` the parameters'."""

    way: str
    dtype: torch.dtype | None
    wide: torch.dtype
    axis: int = -1
    offset: float = 0.0
    is_norm: bool = False


_RULES: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], _Rule]] = WeakKeyDictionary()


@torch.compiler.assume_constant_result
def _rule(norm: nn.Module, device: torch.device, dtype: torch.dtype, wide: torch.dtype, unrounded: bool) -> _Rule:
    """The rule for inputs of `dtype` on `device` and parameters in `wide`; learnt once, then remembered.

    Args:
        unrounded: whether something is still done to the result before it is rounded.
    """
    has_autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    autocast = torch.get_autocast_dtype(device.type) if has_autocast else None
    key = (device.type, dtype, _parameter(norm, "weight").dtype, wide, unrounded, autocast)
    rules = _RULES.setdefault(norm, {})
    if key not in rules:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns when a fused norm gets two dtypes: that way is not taken
            rules[key] = _learn(norm, device, dtype, wide, unrounded)
    return rules[key]


def _learn(norm: nn.Module, device: torch.device, dtype: torch.dtype, wide: torch.dtype, unrounded: bool) -> _Rule:
    """Try the ways on a small copy, and take the first whose output has the bits of the copy's own."""
    facts, parameters = probe.measure(norm), probe.parameters_of(norm)
    if facts is None or "weight" not in parameters:
        return _Rule("own", None, wide)
    small = {
        name: probe.sample_input(tuple(value.shape), seed).to(device, value.dtype)
        for seed, (name, value) in enumerate(parameters.items(), start=3)
    }
    copy = probe.blank_copy(norm, small, own_forward=True)
    copy.to(device)  # its buffers; the parameters are there
    samples = max(16, _PROBED_ENTRIES // math.prod(facts.shape[1:]))
    x = probe.sample_input((samples, *facts.shape[1:])).to(device, dtype)
    try:
        base = probe.run_with(copy, x)
    except Exception:  # the norm does not take this input at all; let its own call say so
        return _Rule("own", None, wide, facts.axis, facts.offset, True)
    fewest, best = math.inf, _Rule("own", base.dtype, wide, facts.axis, facts.offset, True)
    wider = small["weight"].to(wide), small["bias"].to(wide) if "bias" in small else None
    if device.type == "meta":  # there are no bits to compare, and none will be
        return best
    ways = ("wide", "own", "rounded", "corrected") if unrounded else ("own", "wide", "rounded", "corrected")
    for rule in [replace(best, way=way) for way in ways]:

        def by_rule(x: Tensor, *gate: Tensor, rule: _Rule = rule) -> Tensor:
            return _by_rule(copy, rule, copy.forward, wider, x, gate, {})

        try:
            wrong = (probe.run_with(by_rule, x) != base).sum().item()
        except Exception:  # a fused forward may refuse two dtypes, or warn of them
            continue
        if wrong < fewest:
            fewest, best = wrong, rule
        if not wrong:
            break
    return best
