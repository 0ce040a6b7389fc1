"""The ways to compute a norm with wider parameters, and which of them repeats the base's bits.

A norm is `y = xhat * (weight + offset) + bias`. In half precision it matters where a norm rounds: Llama's rounds xhat
and then the product, Gemma's only the product, T5's rounds xhat if its weight is in half precision. So each norm is
called in the first of these ways that repeats the base's bits, learnt by running a small copy once per norm and dtype:

    own         the norm's own forward on the input as it is
    wide        the norm's own forward on a widened input, tried first where the result must not be rounded yet
    rounded     the norm's own forward with neutral parameters of its own dtype, then the affine part outside
    corrected   as wide, plus what the base's output differs from that with unchanged parameters
    native      the norm's own forward with parameters rounded to its own dtype, where no other way could be tried or
                repeats the bits: a kernel that takes one dtype only, or a forward that cannot be run on a copy;
                 and of a norm whose output is no affine tensor (`Facts.by_sample`)

What is learnt is true of the forward that ran, so a kernel that takes its place is learnt anew. While something traces
or fakes the operations of this thread, the copy runs in another thread, where they are real, and nothing is remembered.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any, NamedTuple
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

_PROBED_ENTRIES = 4096  # enough that a way which rounds elsewhere cannot agree by chance


@dataclass(frozen=True)
class Rule:
    """How to call one norm on one dtype: `dtype` is the output's (None: as it comes), `wide` the parameters'."""

    way: str
    dtype: torch.dtype | None
    wide: torch.dtype
    axis: int = -1
    offset: float = 0.0
    is_norm: bool = False
    by_sample: bool = False


class _Learnt(NamedTuple):
    """A rule, and the forward that it is true of: held weakly, since it may hold the norm."""

    forward: Callable[[], object]
    rule: Rule


_Key = tuple[object, ...]
_RULES: WeakKeyDictionary[nn.Module, dict[_Key, _Learnt]] = WeakKeyDictionary()
# By forward, then by signature: the norms of a model's layers are alike, and one of them is run.
_ALIKE: WeakKeyDictionary[Any, dict[_Key, Rule]] = WeakKeyDictionary()


@torch.compiler.assume_constant_result
def rule_for(norm: nn.Module, device: torch.device, dtype: torch.dtype, wide: torch.dtype, unrounded: bool) -> Rule:
    """The rule for inputs of `dtype` on `device` and parameters in `wide`; learnt once, then remembered.

    Args:
        unrounded: whether something is still done to the result before it is rounded.
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
    """Whether this forward is one of all norms of a class, and of nothing that belongs to one of them."""
    return forward is type(norm).forward


def _weakly(forward: object) -> Callable[[], object]:
    try:
        return ref(forward)
    except TypeError:  # an object without weak references
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
    """Try the ways on a small copy, and take the first whose output has the bits of the copy's own."""
    facts, parameters = probe.measure(norm), probe.parameters_of(norm)
    if facts is None or "weight" not in parameters:  # it cannot be run here
        return Rule("native", None, wide)
    if facts.by_sample:
        return Rule("native", None, wide, facts.axis, by_sample=True)
    small = {
        name: probe.sample_input(tuple(value.shape), seed).to(device, value.dtype)
        for seed, (name, value) in enumerate(parameters.items(), start=3)
    }
    native = Rule("native", None, wide, facts.axis, facts.offset, True)
    copy = probe.blank_copy(norm, small)
    if not put_on_copy(norm, copy):
        return native
    copy._buffers.update({name: None if value is None else value.to(device) for name, value in copy._buffers.items()})
    samples = max(16, _PROBED_ENTRIES // math.prod(facts.shape[1:]))
    x = probe.sample_input((samples, *facts.shape[1:])).to(device, dtype)
    try:
        base = probe.run_with(copy, x)
    except Exception:  # the norm does not take this input at all; let its own call say so
        return native
    fewest, best = math.inf, Rule("own", base.dtype, wide, facts.axis, facts.offset, True)
    wider = small["weight"].to(wide), small["bias"].to(wide) if "bias" in small else None
    if device.type == "meta":  # there are no bits to compare, and none will be
        return best
    ways = ("wide", "own", "rounded", "corrected") if unrounded else ("own", "wide", "rounded", "corrected")
    warnings.simplefilter("error")  # torch warns when a fused norm gets two dtypes: that way is not taken
    for rule in [replace(best, way=way) for way in ways]:

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
    return best if unrounded or not fewest else replace(native, dtype=base.dtype)


def by_rule(
    norm: nn.Module,
    rule: Rule,
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
        y = by_rule(norm, replace(rule, way="wide"), own, wider, x, args, kwargs).to(rule.wide)
        return (y + _correction(norm, rule, own, x, args, kwargs)).to(rule.dtype)
    if rule.way == "rounded":
        y = neutral(norm, rule, own, x, args, kwargs)
        y = y * align(weight + rule.offset if rule.offset else weight, x, rule.axis)
    else:
        if rule.way == "native":
            weight = weight.to(parameter(norm, "weight").dtype)
            bias = bias if parameter(norm, "bias") is None or bias is None else bias.to(parameter(norm, "bias").dtype)
        entries = {own_name(norm, "weight"): weight}
        if bias is not None and parameter(norm, "bias") is not None:
            entries[own_name(norm, "bias")], bias = bias, None
        y = forward_with(norm, entries, own, x.to(rule.wide) if rule.way == "wide" else x, *args, **kwargs)
    y = y if bias is None else y + align(bias, x, rule.axis)
    return y if rule.dtype is None else y.to(rule.dtype)


@torch.no_grad()
def _correction(
    norm: nn.Module,
    rule: Rule,
    own: Callable[..., Tensor],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """What the norm rounds away on its way, by which its output differs from the same computed wide."""
    weight, bias = parameter(norm, "weight").to(rule.wide), parameter(norm, "bias")
    wider = weight, None if bias is None else bias.to(rule.wide)
    wide = by_rule(norm, replace(rule, way="wide"), own, wider, x, args, kwargs)
    return own(x, *args, **kwargs).to(rule.wide) - wide.to(rule.wide)


def neutral(
    norm: nn.Module,
    rule: Rule,
    own: Callable[..., Tensor],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """The norm's forward `own` with parameters that change nothing."""
    weight, bias = parameter(norm, "weight"), parameter(norm, "bias")
    dtype = weight.dtype if rule.way in ("rounded", "native") else rule.wide
    entries = {own_name(norm, "weight"): torch.full_like(weight, 1.0 - rule.offset, dtype=dtype)}
    if bias is not None:
        entries[own_name(norm, "bias")] = torch.zeros_like(bias, dtype=dtype)
    return forward_with(
        norm, entries, own, x.to(rule.wide) if rule.way in ("wide", "corrected") else x, *args, **kwargs
    )


def widened(norm: nn.Module) -> torch.dtype:
    return torch.promote_types(parameter(norm, "weight").dtype, torch.float32)
