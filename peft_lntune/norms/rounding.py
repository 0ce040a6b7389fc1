"""Rounding modes: where a norm with wider parameters rounds, so that it reproduces the base bit for bit.

A norm is `y = xhat * (weight + offset) + bias`. In half precision it matters where a norm rounds: Llama's rounds xhat
and then the product, Gemma's only the product, T5's rounds xhat if its weight is in half precision. So each norm is
called in the first of these modes that gives the base's bits, found by running a small copy once per norm and dtype:

    native       the norm's own forward on the input as it is
    upcast       the norm's own forward on a widened input, tried first where the result must not be rounded yet
    postscale    the norm's own forward with neutral parameters of its own dtype, then the affine part outside
    compensated  upcast, plus the difference between that with unchanged parameters and the base's output
    downcast     the norm's own forward with parameters rounded to its own dtype, where no other mode could be tried
                 or gives the bits: a kernel that takes one dtype only, a forward that cannot be run on a copy, and
                 a norm whose output is not one affine tensor (`NormFacts.by_sample`)

A rule is cached for the forward that ran; a kernel that replaces this forward gets its own rule. While the operations
of this thread are traced or faked, the copy runs in another thread, where they are real, and no rule is cached.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from peft_lntune.core.cache import is_traced
from peft_lntune.core.detour import computes, put_on_copy
from peft_lntune.core.override import forward_with
from peft_lntune.norms import probe
from peft_lntune.norms.names import own_name
from peft_lntune.norms.names import own_parameter as parameter
from peft_lntune.norms.probe import align

__all__ = ["Rule", "by_rule", "neutral", "parameter", "rule_for", "widened"]

_PROBED_ENTRIES = 4096  # enough that a mode which rounds elsewhere cannot agree by chance

Mode = Literal["native", "upcast", "postscale", "compensated", "downcast"]


@dataclass(frozen=True)
class Rule:
    """How to call one norm on one dtype.

    Attributes:
        mode: the rounding mode.
        dtype: dtype of the output; None: not cast.
        wide: dtype of the parameters.
        axis: -1 where the parameters match the input's last dimensions, 1 where they match its channels.
        offset: number that the norm adds to its weight.
        is_norm: whether a run has shown that the module is a norm.
        by_sample: whether only the norm's own forward can compute its output.
        takes_rows: whether the forward, without gradients, takes a weight and a bias per sample in place of its own.
    """

    mode: Mode
    dtype: torch.dtype | None
    wide: torch.dtype
    axis: int = -1
    offset: float = 0.0
    is_norm: bool = False
    by_sample: bool = False
    takes_rows: bool = False


class _Learnt(NamedTuple):
    """A rule and the forward it holds for, as a weak reference, since the forward may hold the norm."""

    forward: Callable[[], object]
    rule: Rule


_Key = tuple[object, ...]
_RULES: WeakKeyDictionary[nn.Module, dict[_Key, _Learnt]] = WeakKeyDictionary()
# By forward, then by signature: of identical norms in a model's layers only one is run.
_ALIKE: WeakKeyDictionary[Any, dict[_Key, Rule]] = WeakKeyDictionary()


@torch.compiler.assume_constant_result
def rule_for(norm: nn.Module, device: torch.device, dtype: torch.dtype, wide: torch.dtype, unrounded: bool) -> Rule:
    """The rule of a norm, found by running a small copy once, then cached.

    Args:
        norm: the module.
        device: device of the inputs.
        dtype: dtype of the inputs.
        wide: dtype of the parameters.
        unrounded: whether the result is processed further before it is rounded.

    Returns:
        The rule for the norm's present forward.
    """
    has_autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    autocast = torch.get_autocast_dtype(device.type) if has_autocast else None
    key = (device.type, dtype, parameter(norm, "weight").dtype, wide, unrounded, autocast)
    forward = computes(norm)
    known = _RULES.get(norm, {}).get(key)
    if known is not None and known.forward() is forward:
        return known.rule
    what = (norm, device, dtype, wide, unrounded)
    if is_traced():
        return _apart(lambda: _learn_quietly(*what), device, autocast)
    signature = probe.signature(norm)
    alike = (signature, key)
    rule = _ALIKE.get(forward, {}).get(alike) if _is_shared(norm, forward) else None
    if rule is None:
        rule = _learn_quietly(*what)
        if probe.is_lasting(signature) and _is_shared(norm, forward):
            _ALIKE.setdefault(forward, {})[alike] = rule
    _RULES.setdefault(norm, {})[key] = _Learnt(_weakly(forward), rule)
    return rule


def _is_shared(norm: nn.Module, forward: object) -> bool:
    """Whether all norms of the class share this forward."""
    return forward is type(norm).forward


def _weakly(forward: object) -> Callable[[], object]:
    try:
        return ref(forward)
    except TypeError:  # the object does not support weak references
        return lambda: forward


def _apart(learn: Callable[[], Rule], device: torch.device, autocast: torch.dtype | None) -> Rule:
    """Learn in a thread of its own: fake tensors, tracing and transforms belong to the thread that entered them."""
    found: list[Rule] = []

    def work() -> None:
        there: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        cast: AbstractContextManager[Any] = nullcontext() if autocast is None else torch.autocast(device.type, autocast)
        with there, cast:
            found.append(learn())

    thread = Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def _learn_quietly(norm: nn.Module, *what: Any) -> Rule:
    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _learn(norm, *what)


def _learn(norm: nn.Module, device: torch.device, dtype: torch.dtype, wide: torch.dtype, unrounded: bool) -> Rule:
    """Try the modes on a small copy, and take the first whose output equals the copy's own bit for bit."""
    facts, parameters = probe.measure(norm), probe.parameters_of(norm)
    if facts is None or "weight" not in parameters:  # it cannot be run here
        return Rule("downcast", None, wide)
    if facts.by_sample:
        return Rule("downcast", None, wide, facts.axis, by_sample=True)
    small = {
        name: probe.sample_input(tuple(value.shape), seed).to(device, value.dtype)
        for seed, (name, value) in enumerate(parameters.items(), start=3)
    }
    downcast = Rule("downcast", None, wide, facts.axis, facts.offset, True)
    copy = probe.blank_copy(norm, small)
    if not put_on_copy(norm, copy):
        return downcast
    copy._buffers.update({name: None if value is None else value.to(device) for name, value in copy._buffers.items()})
    samples = max(16, _PROBED_ENTRIES // math.prod(facts.shape[1:]))
    x = probe.sample_input((samples, *facts.shape[1:])).to(device, dtype)
    try:
        base = probe.run_with(copy, x)
    except Exception:  # the norm does not take this input; its own call will raise
        return downcast
    fewest, best = math.inf, Rule("native", base.dtype, wide, facts.axis, facts.offset, True)
    wider = small["weight"].to(wide), small["bias"].to(wide) if "bias" in small else None
    if device.type == "meta":  # there are no bits to compare
        return best
    modes: list[Mode] = ["native", "upcast", "postscale", "compensated"]
    if unrounded:
        modes[:2] = "upcast", "native"
    warnings.simplefilter("error")  # torch warns when a fused norm gets two dtypes: skip that mode
    for rule in [replace(best, mode=mode) for mode in modes]:

        def candidate(x: Tensor, *gate: Tensor, rule: Rule = rule) -> Tensor:
            return by_rule(copy, rule, copy.forward, wider, x, gate, {})

        try:
            wrong = (probe.run_with(candidate, x) != base).sum().item()
        except Exception:  # a fused forward may refuse two dtypes, or warn of them
            continue
        if wrong < fewest:
            fewest, best = wrong, rule
        if not wrong:
            break
    if not unrounded:
        return best if not fewest else replace(downcast, dtype=base.dtype)
    return replace(best, takes_rows=_takes_rows(copy, best, wider, x))


def _takes_rows(copy: nn.Module, rule: Rule, wider: tuple[Tensor, Tensor | None], x: Tensor) -> bool:
    """Whether the forward gives the same bits with parameters per sample as their product with xhat.

    Fused forwards take one weight for all samples and raise, or use the first sample's.
    """
    if rule.axis != -1 or rule.offset or rule.mode not in ("native", "upcast"):
        return False
    weight, bias = (
        None
        if own is None
        else probe.sample_input((len(x), *(1,) * (x.dim() - own.dim() - 1), *own.shape), seed).to(own)
        for seed, own in enumerate(wider, start=5)
    )
    assert weight is not None
    try:
        xhat = neutral(copy, rule, copy.forward, x, (), {})
        wanted = xhat * weight if bias is None else torch.addcmul(bias, xhat, weight)
        found = by_rule(copy, replace(rule, dtype=None), copy.forward, (weight, bias), x, (), {})
    except Exception:  # whatever a forward raises where it cannot take them
        return False
    return found.dtype == wanted.dtype and torch.equal(found, wanted)


def by_rule(
    norm: nn.Module,
    rule: Rule,
    own: Callable[..., Tensor],
    wider: tuple[Tensor, Tensor | None],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """Compute a norm with other parameters, by the mode and the output dtype of its rule.

    Args:
        norm: the module; its hooks do not run.
        rule: rule of the norm, from `rule_for`.
        own: its forward.
        wider: weight and bias, in the norm's shapes and the rule's dtype `wide`.
        x: the input, `(B, ..., d)`.
        args: further arguments of the forward.
        kwargs: further arguments by name.

    Returns:
        The output, of the shape of `x`.
    """
    weight, bias = wider
    if rule.mode == "compensated":
        # Rounding first, to the spacing of the difference, makes the sum exact where nothing has changed.
        y = by_rule(norm, replace(rule, mode="upcast"), own, wider, x, args, kwargs).to(rule.wide)
        return (y + _difference(norm, rule, own, x, args, kwargs)).to(rule.dtype)
    if rule.mode == "postscale":
        y = neutral(norm, rule, own, x, args, kwargs)
        y = y * align(weight + rule.offset if rule.offset else weight, x, rule.axis)
    else:
        if rule.mode == "downcast":
            weight = weight.to(parameter(norm, "weight").dtype)
            bias = bias if parameter(norm, "bias") is None or bias is None else bias.to(parameter(norm, "bias").dtype)
        entries = {own_name(norm, "weight"): weight}
        if bias is not None and parameter(norm, "bias") is not None:
            entries[own_name(norm, "bias")], bias = bias, None
        y = forward_with(norm, entries, own, x.to(rule.wide) if rule.mode == "upcast" else x, *args, **kwargs)
    y = y if bias is None else y + align(bias, x, rule.axis)
    return y if rule.dtype is None else y.to(rule.dtype)


@torch.no_grad()
def _difference(
    norm: nn.Module,
    rule: Rule,
    own: Callable[..., Tensor],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """The norm's rounding: the difference between its output and the same computed on a widened input."""
    weight, bias = parameter(norm, "weight").to(rule.wide), parameter(norm, "bias")
    wider = weight, None if bias is None else bias.to(rule.wide)
    wide = by_rule(norm, replace(rule, mode="upcast"), own, wider, x, args, kwargs)
    return own(x, *args, **kwargs).to(rule.wide) - wide.to(rule.wide)


def neutral(
    norm: nn.Module,
    rule: Rule,
    own: Callable[..., Tensor],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """Compute a norm with neutral parameters: an effective weight of 1 and a bias of 0.

    Args:
        norm: the module; its hooks do not run.
        rule: rule of the norm, from `rule_for`.
        own: its forward.
        x: the input, `(B, ..., d)`.
        args: further arguments of the forward.
        kwargs: further arguments by name.

    Returns:
        xhat, of the shape of `x`.
    """
    weight, bias = parameter(norm, "weight"), parameter(norm, "bias")
    dtype = weight.dtype if rule.mode in ("postscale", "downcast") else rule.wide
    entries = {own_name(norm, "weight"): torch.full_like(weight, 1.0 - rule.offset, dtype=dtype)}
    if bias is not None:
        entries[own_name(norm, "bias")] = torch.zeros_like(bias, dtype=dtype)
    return forward_with(
        norm, entries, own, x.to(rule.wide) if rule.mode in ("upcast", "compensated") else x, *args, **kwargs
    )


def widened(norm: nn.Module) -> torch.dtype:
    """The wider of float32 and the dtype of a norm's weight."""
    return torch.promote_types(parameter(norm, "weight").dtype, torch.float32)
