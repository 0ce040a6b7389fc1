"""Compute a norm with other parameters than its own, wider ones, and its own bits where nothing has changed.

The module's own forward runs, with its parameters shadowed, in the one of the ways of `peft_lntune.norms.rounding`
that fits it. Where one fused call of torch is known to give the same bits, and nothing is attached to the module that
it would skip, that is taken instead: a fast path, registered by class.
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_lntune.core.delta import PARAMETERS
from peft_lntune.core.detour import forward_of
from peft_lntune.core.override import call_hooked, is_of_class, runs_own_forward, twin
from peft_lntune.errors import UnsupportedError
from peft_lntune.norms.layer_norm import layer_norm_rows
from peft_lntune.norms.names import own_name
from peft_lntune.norms.rounding import Rule, by_rule, neutral, parameter, rule_for, widened

__all__ = [
    "FAST_PATHS",
    "bind",
    "call_with",
    "call_with_rows",
    "fast_path",
    "normalize",
    "output_dtype",
    "split_call",
    "with_rows",
]

FastPath = Callable[[Any, Tensor, Tensor, "Tensor | None"], Tensor]
FAST_PATHS: dict[type[nn.Module], FastPath] = {}
_FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {}
"""The forward of each class that its fast path has the bits of. A kernel may take its place."""


def fast_path(cls: type[nn.Module]) -> Callable[[FastPath], FastPath]:
    """Register `(norm, x, weight, bias) -> y` for norms of exactly this class.

    A fast path is admitted only when a test shows it bit-equal to the module at zero delta, in every dtype.

    Raises:
        KeyError: the class has a fast path already.
    """

    def register(function: FastPath) -> FastPath:
        if cls in FAST_PATHS:
            raise KeyError(f"{cls.__name__} already has the fast path {FAST_PATHS[cls].__name__}")
        FAST_PATHS[cls], _FORWARDS[cls] = function, cls.forward
        return function

    return register


def _fast_path_of(norm: nn.Module) -> FastPath | None:
    """The fast path of a norm, where its class still has the forward that it was written for."""
    cls = type(norm)
    return FAST_PATHS[cls] if cls in FAST_PATHS and cls.forward is _FORWARDS[cls] else None


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
    own_bias = parameter(norm, "bias")
    x = _differentiable(norm, x)
    weight = parameter(norm, "weight").to(given.dtype) if weight is None else weight
    bias = own_bias.to(given.dtype) if bias is None and own_bias is not None else bias
    path = _fast_path_of(norm)
    if path is not None and not args and not kwargs and runs_own_forward(norm):
        return path(norm, x, weight, bias)
    outer_bias = bias is not None and own_bias is None
    rule, own, wider = rule_for(norm, x.device, x.dtype, weight.dtype, outer_bias), forward_of(norm), (weight, bias)
    if runs_own_forward(norm):
        return by_rule(norm, rule, own, wider, x, args, kwargs)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return by_rule(norm, rule, own, wider, x, args, kwargs)

    return call_hooked(norm, forward, x, *args, **kwargs)


def _differentiable(norm: nn.Module, x: Tensor) -> Tensor:
    """The input; of a GroupNorm on a CPU one that takes a gradient, where it is laid out with the channels last.

    Torch (2.13) ends the process in the backward pass there, where weights want a gradient and the input does not:
    behind a frozen convolution, that is.
    """
    if (
        isinstance(norm, nn.GroupNorm)
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not (x.requires_grad or x.is_contiguous() or x.is_inference() or torch.compiler.is_compiling())
    ):
        return x.detach().requires_grad_()
    return x


def bind(norm: nn.Module, weight: Tensor | None, bias: Tensor | None) -> Callable[..., Tensor]:
    """`call_with` for many calls with the same parameters: what does not depend on the input is done once.

    Args:
        norm: as in `call_with`; what is attached to it or changed on it later is seen.
        weight: as in `call_with`.
        bias: likewise.

    Returns:
        `(x, *args, **kwargs) -> y`, the same as `call_with(norm, x, weight, bias, *args, **kwargs)`.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> bind(norm, None, torch.ones(2))(torch.zeros(1, 2)).tolist()
        [[1.0, 1.0]]
    """
    given = {name: value for name, value in (("weight", weight), ("bias", bias)) if value is not None}
    entries = {own_name(norm, name): value for name, value in given.items()}
    has_all = weight is not None and given.keys() == {name for name in PARAMETERS if parameter(norm, name) is not None}
    rules: dict[tuple[object, ...], Rule] = {}

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if has_all and weight is not None and runs_own_forward(norm):
            fused = _fast_path_of(norm)
            if fused is not None and not args and not kwargs:
                return fused(norm, x, weight, bias)
            forward = type(norm).forward
            key = (forward, x.dtype, x.device, _autocast(x.device.type))
            if key not in rules:
                rules[key] = rule_for(norm, x.device, x.dtype, weight.dtype, False)
            rule = rules[key]
            if rule.way == "own":
                y = forward(twin(norm, entries), x, *args, **kwargs)
                return y if rule.dtype is None or y.dtype is rule.dtype else y.to(rule.dtype)
        return call_with(norm, x, weight, bias, *args, **kwargs)

    return call


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


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
    own = forward_of(norm)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return with_rows(norm, own, x, weight, bias, *args, **kwargs)

    if runs_own_forward(norm):
        return forward(x, *args, **kwargs)
    return call_hooked(norm, forward, x, *args, **kwargs)


def with_rows(
    norm: nn.Module,
    own: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """What `call_with_rows` computes, without the hooks of the module: for a forward that stands in the module's place.

    Args:
        norm: the module.
        own: its forward, `forward_of(norm)`.
        x: as in `call_with_rows`, and so the others.
        weight: likewise.
        bias: likewise.
        *args: likewise.
        **kwargs: likewise.

    Example:
        >>> norm, x = nn.LayerNorm(2, bias=False), torch.tensor([[1.0, 3.0]])
        >>> with_rows(norm, norm.forward, x, torch.tensor([[2.0, 2.0]]), None).round()
        tensor([[-2.,  2.]])
    """
    if _is_layer_norm(norm) and not args and not kwargs and is_of_class(norm, own):
        y = layer_norm_rows(x.to(weight.dtype), norm.normalized_shape, weight, bias, norm.eps)
        return y.to(output_dtype(norm, x) if torch.is_autocast_enabled(x.device.type) else x.dtype)
    rule = rule_for(norm, x.device, x.dtype, weight.dtype, True)
    if rule.by_sample:
        return _sample_by_sample(norm, rule, own, x, weight, bias, args, kwargs)
    if not rule.is_norm:
        raise UnsupportedError(
            f"the forward of this {type(norm).__name__} could not be tried on a small input on {x.device}, so it "
            "cannot be run with other parameters for each row. Run the batch one adapter at a time, with set_adapter."
        )
    xhat = neutral(norm, rule, own, x, args, kwargs)
    y = xhat * weight if bias is None else torch.addcmul(bias, xhat, weight)
    return y.to(x.dtype if rule.dtype is None else rule.dtype)


def _sample_by_sample(
    norm: nn.Module,
    rule: Rule,
    own: Callable[..., Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run the norm's own forward for each sample, with the parameters of its row."""
    samples = range(len(x)) if len(weight) > 1 or (bias is not None and len(bias) > 1) else [slice(None)]
    outputs = []
    for sample in samples:
        place = sample if isinstance(sample, slice) else slice(sample, sample + 1)

        def of_sample(value: Any, place: slice = place) -> Any:
            return value[place] if isinstance(value, Tensor) and value.dim() and len(value) == len(x) else value

        wider = [
            None if rows is None else (rows[place] if len(rows) > 1 else rows).reshape(parameter(norm, name).shape)
            for name, rows in (("weight", weight), ("bias", bias))
        ]
        more, named = [of_sample(value) for value in args], {key: of_sample(value) for key, value in kwargs.items()}
        outputs.append(by_rule(norm, rule, own, (wider[0], wider[1]), x[place], tuple(more), named))  # type: ignore[arg-type]
    return _joined(outputs)


def _joined(outputs: list[Any]) -> Any:
    """Outputs of single samples as that of the batch: tensors, or tuples of tensors."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs) if len(outputs) > 1 else first
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(list(each)) for each in zip(*outputs, strict=True))
    return first


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
    if _is_layer_norm(norm) and not args and not kwargs:
        wide = torch.promote_types(x.dtype, widened(norm))
        return F.layer_norm(x.to(wide), norm.normalized_shape, None, None, norm.eps).to(wide)
    rule = rule_for(norm, x.device, x.dtype, widened(norm), True)
    if not rule.is_norm:
        raise UnsupportedError(
            f"normalize expects a norm, whose output is affine in its weight and free of its input's scale; "
            f"{type(norm).__name__} is none. See find_norms(model) for the norms of a model."
        )
    return neutral(norm, rule, forward_of(norm), x, args, kwargs).to(rule.wide)


def _is_layer_norm(norm: nn.Module) -> TypeGuard[nn.LayerNorm]:
    return type(norm) is nn.LayerNorm and nn.LayerNorm.forward is _FORWARDS[nn.LayerNorm]


def output_dtype(norm: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype that `norm(x)` would have, here and now (autocast counts), without running the model's module.

    Example:
        >>> output_dtype(nn.LayerNorm(4), torch.ones(2, 4))
        torch.float32
    """
    rule = rule_for(norm, x.device, x.dtype, widened(norm), True)
    return x.dtype if rule.dtype is None else rule.dtype


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The input of a norm and its further arguments; a few models pass the input by name."""
    if args:
        return args[0], args[1:], kwargs
    first, *others = kwargs
    return kwargs[first], (), {name: kwargs[name] for name in others}
