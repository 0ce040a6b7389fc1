"""Run a small copy of a module to learn what it computes.

Whether a module is a norm depends on what it does, not on its name or class, so it is run. The copy has fresh small
parameters on the CPU and none of the module's hooks. So meta, offloaded and quantized models can be examined, and
neither the model nor the random state changes. A module that cannot run on a CPU is examined on its own device.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peft_lntune.core.delta import PARAMETERS
from peft_lntune.norms.names import own_name

__all__ = [
    "SHAPE",
    "NormFacts",
    "align",
    "blank_copy",
    "examine",
    "is_lasting",
    "measure",
    "parameters_of",
    "run_with",
    "sample_input",
    "signature",
    "summed",
]

_SCALE = 4.0  # inputs have variance 16: no usual eps matters, and tanh and softmax do not saturate
_HOOKS = tuple(key for key in nn.Module().__dict__ if key.endswith(("_hooks", "_hooks_with_kwargs", "_always_called")))
_FOREIGN = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.Size, torch.device)


@dataclass(frozen=True)
class NormFacts:
    """Facts found by running a norm, which computes `y = xhat * (weight + offset) + bias`.

    Attributes:
        axis: -1 where the parameters match the last dimensions of the input, 1 where they match its channels.
        offset: number that the module adds to its weight, 1.0 for zero-centred norms such as Gemma's, 0.0 for others.
        shape: an input shape the module accepts; its first dimension counts samples and may be changed.
        by_sample: whether the module does more: an activation after the norm, a gate that also multiplies the bias, or
            outputs in a tuple. Then only its own forward can compute the output; `offset` is 0.0.
    """

    axis: int
    offset: float
    shape: tuple[int, ...]
    by_sample: bool = False


SHAPE = "its output has another shape than its input"
_CONSTANT = "its output does not depend on its input"
_AFFINE = "its output is not affine in its weight and bias"
_FAR = 64.0  # here ReLU, GELU and SiLU are the identity; tanh is not


class _NotANormError(Exception):
    """The module ran, and did not behave as a norm."""


def align(parameter: Tensor, x: Tensor, axis: int = -1, *, rows: bool = False) -> Tensor:
    """View a norm's parameter so that it broadcasts against the norm's input.

    Args:
        parameter: weight or bias, such as `(d,)` or `(heads, d)`; with `rows`, `(B, d)` or `(B, heads, d)`.
        x: the norm's input, `(B, ..., d)` for `axis=-1` or `(B, d, ...)` for `axis=1`.
        axis: -1 where the parameters match the last dimensions of the input, 1 where they match its channels.
        rows: whether `parameter` holds one row per sample.

    Returns:
        A view of `parameter` that broadcasts against `x`.

    Example:
        >>> align(torch.ones(2, 4), torch.ones(2, 3, 4), rows=True).shape
        torch.Size([2, 1, 4])
        >>> align(torch.ones(4), torch.ones(2, 4, 5, 5), axis=1).shape
        torch.Size([4, 1, 1])
    """
    lead, own = (parameter.shape[:1], parameter.shape[1:]) if rows else ((), parameter.shape)
    own = own[max(0, len(own) - x.dim() + 1) :]  # the first dimension of a weight `(1, C, 1, 1)` is that of the samples
    if axis == 1:
        return parameter.reshape(*lead, *own, *(1,) * (x.dim() - 1 - len(own)))
    return parameter.reshape(*lead, *(1,) * (x.dim() - 1 - len(own)), *own) if rows else parameter


def summed(values: Tensor, shape: tuple[int, ...], axis: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """Sum over all dimensions along which a parameter is broadcast, except the samples: the transpose of `align`.

    Args:
        values: of the shape of the norm's input, `(B, ...)`.
        shape: shape of the parameter.
        axis: -1 where the parameter matches the last dimensions of the input, 1 where it matches its channels.
        dtype: dtype of the sum; None: that of `values`.

    Returns:
        The sums, `(B, *shape)`.

    Example:
        >>> summed(torch.ones(2, 3, 4), (4,)).shape, summed(torch.ones(2, 4, 5), (4,), axis=1)[0].tolist()
        (torch.Size([2, 4]), [5.0, 5.0, 5.0, 5.0])
    """
    own = shape[max(0, len(shape) - values.dim() + 1) :]
    more = (1,) * (values.dim() - 1 - len(own))
    laid = (*own, *more) if axis == 1 else (*more, *own)
    over = tuple(place for place, size in enumerate(laid, start=1) if size == 1)
    found = values.sum(over, dtype=dtype) if over else values.to(dtype or values.dtype)
    return found.reshape(values.shape[0], *shape)


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that a leaf's forward sees, its weight and bias under these two names.

    They are read as attributes: under FSDP the forward sees whole tensors, while the registered parameters are shards.
    """
    names = {own_name(module, parameter): parameter for parameter in PARAMETERS}
    found = {role: getattr(module, name, None) for name, role in names.items()}
    found |= {name: getattr(module, name, None) for name in module._parameters if name not in names}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def blank_copy(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Copy a leaf module without its tensors and hooks, and give the copy other parameters.

    Args:
        module: the module to copy; nothing of it changes.
        parameters: the copy's parameters, named as by `parameters_of`; other parameters of the module become None.

    Returns:
        The copy, with the forward of its class, in evaluation mode. Buffers are copied to the CPU; buffers on meta
        become ones.
    """
    parameters = {own_name(module, name) if name in PARAMETERS else name: p for name, p in parameters.items()}
    copy = type(module).__new__(type(module))
    # A tensor that FSDP put into the instance would shadow the fresh parameter; a plain `self.bias = None` stays.
    state = {k: v for k, v in module.__dict__.items() if k not in _FOREIGN and not (k in parameters and v is not None)}
    # A forward that appends to a list of its own must not reach the model's list.
    state = {key: value.copy() if isinstance(value, (dict, list, set)) else value for key, value in state.items()}
    state |= {key: type(state[key])() for key in _HOOKS if key in state}
    state["_parameters"] = {**dict.fromkeys(module._parameters), **parameters}
    state["_buffers"] = {key: _fresh_buffer(value) for key, value in module._buffers.items()}
    state["training"] = False
    # Children are activations or dropout, which may be in training mode in the module.
    state["_modules"] = {key: child and deepcopy(child).eval() for key, child in module._modules.items()}
    copy.__dict__.update(state)
    return copy


def _fresh_buffer(buffer: Tensor | None) -> Tensor | None:
    if buffer is None or not buffer.is_meta:
        return None if buffer is None else buffer.detach().to("cpu", copy=True)
    return torch.ones(buffer.shape, dtype=buffer.dtype, device="cpu")


def run_with(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Call a norm on an input, with a gate as second argument where it does not run without one.

    Args:
        function: a copy of a norm, or a function in its place.
        x: the input.

    Returns:
        The output, of the shape of `x`.

    Raises:
        TypeError: the result is not a floating-point tensor of the shape of `x`.
    """
    try:
        y = function(x)
    except Exception as error:  # the signature requires a gate, or the forward fails on None in its place
        try:
            y = function(x, _gate(x))
        except Exception:
            raise error from None
    if not _is_like(y, x):
        raise TypeError("the module does not map a tensor to one of the same shape")
    return y


def _gate(x: Tensor) -> Tensor:
    # Not ones, which would hide that a norm multiplies its bias by the gate.
    return sample_input(tuple(x.shape), seed=7).to(x) / _SCALE


def _is_like(y: Any, x: Tensor) -> bool:
    return isinstance(y, Tensor) and y.shape == x.shape and y.is_floating_point()


def sample_input(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random float32 input on the CPU, which leaves the global random state alone.

    Args:
        shape: shape of the input.
        seed: the same seed gives the same input.

    Returns:
        Normal values with variance 16.
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float32) * _SCALE


class _Id(int):
    """The identity of an object, distinguishable from a plain number."""

    def __new__(cls, value: object) -> "_Id":
        return super().__new__(cls, id(value))


def signature(module: nn.Module) -> tuple[object, ...]:
    """A key of everything that decides how a leaf computes, except the values of its tensors.

    Modules with equal signatures need only one run. Objects that are not plain values count by identity; such
    signatures, which `is_lasting` detects, may be compared only while the model lives.
    """
    plain = tuple(
        (key, value if isinstance(value, _PLAIN) else repr(value) if isinstance(value, (tuple, list)) else _Id(value))
        for key, value in sorted(module.__dict__.items())
        if not key.startswith("_") and key not in ("training", "forward")
    )
    shapes = tuple((key, None if value is None else tuple(value.shape)) for key, value in module._parameters.items())
    children = tuple((key, _Id(child)) for key, child in module._modules.items())
    return type(module), shapes, plain, children


def is_lasting(signature: tuple[object, ...]) -> bool:
    """Whether a signature contains no identities, so that it may be cached beyond the life of its module."""
    _, _, plain, children = signature
    return not any(isinstance(value, _Id) for part in (plain, children) for _, value in cast(Any, part))


def measure(module: nn.Module) -> NormFacts | None:
    """Run a module to find out how its output depends on its parameters; None where it is not a norm."""
    facts = examine(module)
    return facts if isinstance(facts, NormFacts) else None


def examine(module: nn.Module) -> NormFacts | str:
    """Run a module to find out how its output depends on its parameters, or why it is not a norm.

    A norm's output is affine in weight and bias entry by entry, does not change when the sample is scaled or another
    sample changes, and mixes the entries of a sample. The last point excludes `sign` and clipping.

    Args:
        module: a leaf with small parameters (a weight and possibly a bias) or without parameters.

    Returns:
        Its `NormFacts`, or the reason in words; a reason that begins with "raised" means that it could not be run.

    Example:
        >>> examine(nn.LayerNorm(4)).offset, examine(nn.PReLU(4))
        (0.0, "its output changes with its input's scale")
    """
    cpu = torch.device("cpu")
    found = _examine_on(module, cpu)
    home = next((p.device for p in parameters_of(module).values() if not p.is_meta), cpu)
    if isinstance(found, _Raised) and home != cpu:
        found = _examine_on(module, home)
    if isinstance(found, _Raised):
        where = "the CPU" if home == cpu else str(home)
        return f"raised {found.kind} on {where}: {found.said}".removesuffix(": ")
    return found


class _Raised(NamedTuple):
    """What a forward raised, in words: the exception itself holds frames, and they would keep the module alive."""

    kind: str
    said: str


def _examine_on(module: nn.Module, device: torch.device) -> NormFacts | str | _Raised:
    reasons: list[str] = []
    raised: _Raised | None = None
    others = [] if device.type == "cpu" else [device]
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=others, device_type=device.type if others else "cuda"),
        torch.autocast(device.type, enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for axis, shape in _trials(module):
            try:
                return _measure_at(module, axis, shape, device)
            except _NotANormError as reason:
                reasons.append(str(reason))
            except Exception as error:  # unknown forwards may raise anything: it is not a norm for this shape
                (first, *_) = str(error).strip().splitlines() or [""]
                raised = raised or _Raised(type(error).__name__, first[:120])
    telling = [reason for reason in reasons if reason not in (SHAPE, _CONSTANT)]
    return next(iter(telling + reasons), raised or SHAPE)


def _trials(module: nn.Module) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Input shapes to try, each with the axis along which the parameters would lie."""
    weight = parameters_of(module).get("weight")
    if weight is not None:
        own = tuple(weight.shape)
    else:
        channels = getattr(module, "num_channels", None)
        own = (channels,) if isinstance(channels, int) else tuple(getattr(module, "normalized_shape", (8,)))
    # No other dimension may equal the weight's, or two axes could be confused.
    free = [n for n in (3, 5, 7, 11, 13, 17) if n not in own]
    if own in ((), (1,)):  # one factor for all, as in ScaleNorm
        yield -1, (2, free[0], 8)
    if 1 in own and len(own) > 1:  # a weight that is broadcast, such as `(1, C, 1, 1)` or `(C, 1, 1)`
        sizes = iter(free)
        filled = tuple(next(sizes) if size == 1 else size for size in own)
        if own[0] == 1:
            yield -1, (2, *filled[1:])
        yield -1, (2, *filled)
    yield -1, (2, free[0], *own)
    if len(own) == 1:
        for more in (1, 2, 3):
            yield 1, (2, *own, *free[:more])
    yield -1, (6, *own)


def _measure_at(module: nn.Module, axis: int, shape: tuple[int, ...], device: torch.device) -> NormFacts:
    own = parameters_of(module)
    weight, bias = own.get("weight"), own.get("bias")
    x, seeds = sample_input(shape).to(device), torch.Generator().manual_seed(1)
    tuples: set[bool] = set()

    def run(x: Tensor, w: float | Tensor, b: float | Tensor, gated: bool) -> Tensor:
        values = {"weight": w, "bias": b}
        fresh = {n: torch.zeros(p.shape, dtype=torch.float32, device=device) + values[n] for n, p in own.items()}
        copy = blank_copy(module, fresh)
        copy._buffers.update({key: None if b is None else b.to(device) for key, b in copy._buffers.items()})
        y: Any = copy(x, _gate(x)) if gated else copy(x)
        if isinstance(y, (tuple, list)) and y:
            tuples.add(gated)
            y = y[0]
        if not _is_like(y, x):
            raise _NotANormError(SHAPE)
        if not torch.isfinite(y).all():
            raise _NotANormError("its output is not finite")
        return y.float()

    calls = _calls(run, x)
    gated = calls[0]
    facts, of_bias = None, True
    for start in (0.0, _FAR) if bias is not None else (0.0,):

        def moved(x: Tensor, w: float | Tensor, b: float | Tensor, start: float = start) -> Tensor:
            return run(x, w, b + start, gated) - start

        found = _affine(moved, x, own, axis, seeds) if weight is not None else (0.0, True)
        if found is not None and (found[1] or gated):
            _check_normalized(partial(moved, w=1.0, b=0.0), x)
            of_bias = found[1]
            facts = NormFacts(axis, found[0], shape, by_sample=start != 0.0 or not of_bias or gated in tuples)
            break
    if facts is None:
        # A plain scale or an activation fails this check whatever it does with its parameters, with a better reason.
        _check_normalized(partial(run, w=1.0, b=0.0, gated=gated), x)
        raise _NotANormError(_AFFINE)
    for other in calls[1:]:
        try:
            found = _affine(partial(run, gated=other), x, own, axis, seeds)
        except _NotANormError:
            found = None
        if found is None or found[1] is False or abs(found[0] - facts.offset) > 1e-4 or other in tuples:
            facts = replace(facts, by_sample=True)
    return replace(facts, offset=0.0) if facts.by_sample else facts


_Run = Callable[[Tensor, "float | Tensor", "float | Tensor"], Tensor]


def _calls(run: Callable[..., Tensor], x: Tensor) -> list[bool]:
    """How a module may be called: without a second argument (False), with one that could be a gate (True), or both."""
    found: list[bool] = []
    raised: list[Exception] = []
    for gated in (False, True):
        try:
            run(x, 1.0, 0.0, gated)
        except Exception as error:
            raised.append(error)
        else:
            found.append(gated)
    if not found:
        raise raised[0]
    raised.clear()  # an exception holds its frames, and they would keep the module alive until garbage is collected
    return found


def _affine(
    run: _Run, x: Tensor, own: Mapping[str, Tensor], axis: int, seeds: torch.Generator
) -> tuple[float, bool] | None:
    """The offset of a module whose output is affine in its parameters, and whether the bias is added unchanged."""
    shape = own["weight"].shape
    y0, y1 = run(x, 0.0, 0.0), run(x, 1.0, 0.0)
    xhat = y1 - y0
    offset = round(((y0 * xhat).sum() / xhat.square().sum()).item(), 5) + 0.0
    w, b = (torch.randn(shape, generator=seeds, device="cpu", dtype=torch.float32).to(x.device) for _ in range(2))
    y = run(x, w, b if "bias" in own else 0.0)
    scaled = xhat * align(w + offset, x, axis)
    if not math.isfinite(offset):
        return None
    if "bias" not in own:
        return (offset, True) if _is_close(y, scaled, 1e-4) else None
    if _is_close(y, scaled + align(b, x, axis), 1e-4):
        return offset, True
    each = run(x, 0.0, 1.0) - y0  # a gate that also multiplies the bias
    return (offset, False) if _is_close(y, scaled + each * align(b, x, axis), 1e-4) else None


def _is_close(a: Tensor, b: Tensor, rate: float) -> bool:
    return (a - b).abs().max().item() <= rate * b.abs().max().item()


def _check_normalized(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Check that `f` ignores the scale of a sample and the other samples, and mixes the entries of a sample.

    Raises:
        _NotANormError: it does not.
    """
    y, other = f(x), sample_input(tuple(x.shape), seed=2).to(x.device)
    if y.abs().max() == 0 or _is_close(f(other), y, 2e-3):
        raise _NotANormError(_CONSTANT)
    if not _is_close(f(torch.cat([x[:1], other[1:]]))[:1], y[:1], 2e-3):
        raise _NotANormError("a statistic of the batch: its output for one sample changes with the other samples")
    if not _is_close(f(torch.cat([3 * x[:1], x[1:]]))[:1], y[:1], 2e-3):
        raise _NotANormError("its output changes with its input's scale")
    if x.shape[-1] <= 2:  # a LayerNorm of two features is a sign function, which the next check would refuse
        return
    kept = other > 0
    if _is_close(f(torch.where(kept, x, 2.5 * x))[kept], y[kept], 2e-3):
        raise _NotANormError("its output is computed entry by entry")
