"""Run a small copy of a module to learn what it computes.

A norm is a property of what a module does, not of its name or class, so every question here is answered by running. The
copy has fresh small parameters on the CPU and none of the module's hooks, so that meta, offloaded and quantized models
can be asked, and neither the model nor the random state notices.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from peft_lntune.core.detour import forward_of

__all__ = [
    "Facts",
    "align",
    "blank_copy",
    "is_lasting",
    "measure",
    "parameters_of",
    "run_with",
    "sample_input",
    "signature",
]

_SCALE = 4.0  # inputs have a variance of 16: no eps in use matters, and tanh or softmax are not yet saturated
_HOOKS = tuple(key for key in nn.Module().__dict__ if key.endswith(("_hooks", "_hooks_with_kwargs", "_always_called")))
_FOREIGN = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.Size, torch.device)


@dataclass(frozen=True)
class Facts:
    """What running a norm has shown: `y = xhat * (weight + offset) + bias`, laid along `axis`, for inputs of `shape`.

    Attributes:
        axis: -1 where the parameters match the last dimensions of the input, 1 where they match its channels.
        offset: what the module adds to its weight, 1.0 for zero-centred norms such as Gemma's and 0.0 for others.
        shape: an input shape the module accepts; its first dimension counts samples and may be changed.
    """

    axis: int
    offset: float
    shape: tuple[int, ...]


def align(parameter: Tensor, x: Tensor, axis: int = -1, *, rows: bool = False) -> Tensor:
    """View a norm's parameter so that it broadcasts against the norm's input.

    Args:
        parameter: of the norm's shape, `(d,)` or `(heads, d)`; with `rows` a leading `(B,)`, one parameter a sample.
        x: the norm's input, `(B, ..., d)` for `axis=-1` or `(B, d, ...)` for `axis=1`.
        axis: as in `Facts`.
        rows: whether `parameter` holds one row a sample.

    Returns:
        A view of `parameter` with the dimensions of `x`.

    Example:
        >>> align(torch.ones(2, 4), torch.ones(2, 3, 4), rows=True).shape
        torch.Size([2, 1, 4])
        >>> align(torch.ones(4), torch.ones(2, 4, 5, 5), axis=1).shape
        torch.Size([4, 1, 1])
    """
    lead, own = (parameter.shape[:1], parameter.shape[1:]) if rows else ((), parameter.shape)
    if axis == 1:
        return parameter.reshape(*lead, *own, *(1,) * (x.dim() - 1 - len(own)))
    return parameter.reshape(*lead, *(1,) * (x.dim() - 1 - len(own)), *own) if rows else parameter


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a leaf's forward finds under the names of its parameters.

    Asked by attribute: FSDP shows the forward whole tensors, and keeps slices of them registered.
    """
    found = {name: getattr(module, name, None) for name in ("weight", "bias", *module._parameters)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def blank_copy(module: nn.Module, parameters: Mapping[str, Tensor], *, own_forward: bool = False) -> nn.Module:
    """Copy a leaf module without its tensors and hooks, and give the copy other parameters.

    Args:
        module: the module to copy; nothing of it changes.
        parameters: the copy's parameters by name; others that the module has become None.
        own_forward: keep a forward that was put on this one module (a fused kernel), not only the class's.

    Returns:
        The copy, in evaluation mode. Buffers are copied to the CPU, those on meta become ones.
    """
    copy = type(module).__new__(type(module))
    # An entry of FSDP's would shadow the fresh parameter; a plain `self.bias = None` is the module's own and stays.
    state = {k: v for k, v in module.__dict__.items() if k not in _FOREIGN and not (k in parameters and v is not None)}
    # A forward that appends to a list of its own must not reach the model's list.
    state = {key: value.copy() if isinstance(value, (dict, list, set)) else value for key, value in state.items()}
    state |= {key: type(state[key])() for key in _HOOKS if key in state}
    state["_parameters"] = {**dict.fromkeys(module._parameters), **parameters}
    state["_buffers"] = {key: _fresh_buffer(value) for key, value in module._buffers.items()}
    state["training"] = False
    forward: Any = forward_of(module) if own_forward and "forward" in module.__dict__ else None
    if isinstance(forward, MethodType) and forward.__self__ is module:
        state["forward"] = MethodType(forward.__func__, copy)
    copy.__dict__.update(state)
    return copy


def _fresh_buffer(buffer: Tensor | None) -> Tensor | None:
    if buffer is None or not buffer.is_meta:
        return None if buffer is None else buffer.detach().to("cpu", copy=True)
    return torch.ones(buffer.shape, dtype=buffer.dtype, device="cpu")


def run_with(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Call a copy, or a function in its place, on `x`, with ones as a second argument where the module asks for a gate.

    Raises:
        TypeError: the result is no floating tensor of the shape of `x`.
    """
    try:
        y = function(x)
    except TypeError:
        y = function(x, torch.ones_like(x))
    if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
        raise TypeError("the module does not map a tensor to one of the same shape")
    return y


def sample_input(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random float32 input on the CPU, the same for the same seed, without touching the global random state."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float32) * _SCALE


class _Id(int):
    """The identity of an object, told from a plain number."""

    def __new__(cls, value: object) -> "_Id":
        return super().__new__(cls, id(value))


def signature(module: nn.Module) -> tuple[object, ...]:
    """What decides how a leaf computes, beside the values of its tensors: equal signatures need one probe.

    Objects that are not plain values count by identity, which `is_lasting` tells: such signatures may be compared only
    while the model lives.
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
    """Whether a signature names nothing by identity, so that it may be kept beyond the life of its module."""
    _, _, plain, children = signature
    return not any(isinstance(value, _Id) for part in (plain, children) for _, value in cast(Any, part))


def measure(module: nn.Module) -> Facts | None:
    """Run a module and say how its output depends on its parameters, or None where it is no norm.

    A norm's output is affine in weight and bias entry by entry, keeps its value when a sample is scaled or another
    sample changes, and mixes the entries of a sample. The last point tells it from `sign` and from clipping.

    Args:
        module: a leaf with small parameters `weight` and perhaps `bias`, or with no parameters.

    Returns:
        Its `Facts`, or None.

    Example:
        >>> measure(nn.LayerNorm(4)).offset, measure(nn.BatchNorm1d(4)), measure(nn.PReLU(4))
        (0.0, None, None)
    """
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for axis, shape in _trials(module):
            try:
                facts = _measure_at(module, axis, shape)
            except Exception:  # whatever a stranger's forward raises on this input, it is not a norm of this shape
                continue
            if facts is not None:
                return facts
    return None


def _trials(module: nn.Module) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Input shapes to try, each with the axis along which the parameters would lie."""
    weight = parameters_of(module).get("weight")
    if weight is not None:
        own = tuple(weight.shape)
    else:
        channels = getattr(module, "num_channels", None)
        own = (channels,) if isinstance(channels, int) else tuple(getattr(module, "normalized_shape", (8,)))
    # No other dimension may equal the weight's, or an axis could be taken for another.
    free = [n for n in (3, 5, 7) if n not in own]
    yield -1, (2, free[0], *own)
    if len(own) == 1:
        yield 1, (2, *own, free[0])
        yield 1, (2, *own, free[0], free[1])
        yield -1, (6, *own)


def _measure_at(module: nn.Module, axis: int, shape: tuple[int, ...]) -> Facts | None:
    own = parameters_of(module)
    weight, bias = own.get("weight"), own.get("bias")
    x, seeds = sample_input(shape), torch.Generator().manual_seed(1)

    def run(x: Tensor, w: float | Tensor, b: float | Tensor) -> Tensor:
        values = {"weight": w, "bias": b}
        fresh = {n: torch.zeros(p.shape, dtype=torch.float32, device="cpu") + values[n] for n, p in own.items()}
        y = run_with(blank_copy(module, fresh), x)
        if not torch.isfinite(y).all():
            raise ArithmeticError("not finite")
        return y.float()

    def is_close(a: Tensor, b: Tensor, rate: float) -> bool:
        return (a - b).abs().max().item() <= rate * b.abs().max().item()

    y1 = run(x, 1.0, 0.0)
    offset, xhat = 0.0, y1
    if weight is not None:
        y0 = run(x, 0.0, 0.0)
        xhat = y1 - y0
        offset = round(((y0 * xhat).sum() / xhat.square().sum()).item(), 5) + 0.0
        w = torch.randn(weight.shape, generator=seeds, device="cpu", dtype=torch.float32)
        b = torch.randn(weight.shape, generator=seeds, device="cpu", dtype=torch.float32) if bias is not None else None
        expected = xhat * align(w + offset, x, axis) + (0.0 if b is None else align(b, x, axis))
        if not (math.isfinite(offset) and is_close(run(x, w, 0.0 if b is None else b), expected, 1e-4)):
            return None
    if not _is_normalized(lambda x: run(x, 1.0, 0.0), x, y1, is_close):
        return None
    return Facts(axis, offset, shape)


def _is_normalized(
    f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, is_close: Callable[[Tensor, Tensor, float], bool]
) -> bool:
    """Whether `f` ignores the scale of a sample and the other samples, and mixes the entries within one."""
    other = sample_input(tuple(x.shape), seed=2)
    if y.abs().max() == 0 or not is_close(f(torch.cat([3 * x[:1], other[1:]]))[:1], y[:1], 2e-3):
        return False
    if is_close(f(other), y, 2e-3):
        return False
    if x.shape[-1] <= 2:  # too few to tell: a LayerNorm of two features is a sign
        return True
    kept = other > 0
    return not is_close(f(torch.where(kept, x, 2.5 * x))[kept], y[kept], 2e-3)
