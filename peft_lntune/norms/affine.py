"""Compute a norm with other, wider parameters, bit-equal to the norm where nothing has changed.

The module's own forward runs with other parameters, in the rounding mode of `peft_lntune.norms.rounding` that fits it.
Where its class has a fast path, and the module has no hooks that this would skip, the fast path is used.
"""

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.core.cache import is_traced
from peft_lntune.core.detour import forward_of
from peft_lntune.core.override import call_hooked, copy_with, is_of_class, runs_own_forward
from peft_lntune.errors import UnsupportedError
from peft_lntune.norms.fast_paths import FAST_PATHS, fast_path_of
from peft_lntune.norms.names import own_name
from peft_lntune.norms.rounding import Rule, by_rule, neutral, parameter, rule_for, widened

__all__ = ["NormCall", "call_with", "call_with_rows", "normalize", "output_dtype", "split_call", "with_rows"]


def call_with(
    norm: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any, **kwargs: Any
) -> Tensor:
    """Call a norm with these effective parameters in place of its own.

    The module's forward and its hooks run, and the output has the dtype that the module's own call would have given.

    Args:
        norm: the module; afterwards it is as it was, also when its forward raises. Not for two threads at once.
        x: its input, `(B, ..., d)`.
        weight: of the shape of the norm's weight, in float32 or wider; None: the norm's own.
        bias: of the shape of the norm's bias, in float32 or wider; None: the norm's own. A norm without a bias takes
            one too: it is added before the output is rounded.
        *args: further arguments of the module's forward, such as a gate.
        **kwargs: further arguments by name.

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
    path = fast_path_of(norm)
    if path is not None and not args and not kwargs and runs_own_forward(norm):
        return path.forward(norm, x, weight, bias)
    outer_bias = bias is not None and own_bias is None
    rule, own, wider = rule_for(norm, x.device, x.dtype, weight.dtype, outer_bias), forward_of(norm), (weight, bias)
    if runs_own_forward(norm):
        return by_rule(norm, rule, own, wider, x, args, kwargs)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return by_rule(norm, rule, own, wider, x, args, kwargs)

    read = {own_name(norm, "weight"): weight, own_name(norm, "bias"): bias}
    return call_hooked(norm, forward, read, x, *args, **kwargs)


def _differentiable(norm: nn.Module, x: Tensor) -> Tensor:
    """The input; for a GroupNorm on a CPU with channels-last input, one that requires a gradient.

    Torch (2.13) ends the process in the backward pass there where the weights require a gradient and the input does
    not, that is, after a frozen convolution.
    """
    if (
        isinstance(norm, nn.GroupNorm)
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not (x.requires_grad or x.is_contiguous() or x.is_inference() or torch.compiler.is_compiling())
    ):
        return x.detach().requires_grad_()
    return x


class NormCall:
    """`call_with` for many calls of one norm: work is done ahead of the calls where possible, to save time per call.

    Args:
        norm: the module; later changes to it, such as new hooks, take effect.

    Example:
        >>> call = NormCall(nn.LayerNorm(2)).bind(None, torch.ones(2))
        >>> call(torch.zeros(1, 2)).tolist()
        [[1.0, 1.0]]
    """

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm
        self._names = own_name(norm, "weight"), own_name(norm, "bias")
        self._rules: dict[tuple[object, ...], Rule] = {}

    def bind(self, weight: Tensor | None, bias: Tensor | None) -> Callable[..., Tensor]:
        """The norm with these effective parameters in place of its own.

        Args:
            weight: of the shape of the norm's weight, in float32 or wider; None: the norm's own.
            bias: of the shape of the norm's bias, in float32 or wider; None: the norm's own.

        Returns:
            `(x, *args, **kwargs) -> y`, equal to `call_with(norm, x, weight, bias, *args, **kwargs)`; the input may be
            given by name.
        """
        norm, names = self.norm, self._names
        given = {name: value for name, value in zip(names, (weight, bias), strict=True) if value is not None}
        own = {name for name in names if name in norm.__dict__ or norm._parameters.get(name) is not None}
        is_direct = weight is not None and given.keys() == own
        if isinstance(norm, nn.GroupNorm) and any(value.requires_grad for value in given.values()):
            is_direct = False  # its input may have to be changed, see `_differentiable`
        copy: tuple[nn.Module, list[Any]] = norm, []
        latest: tuple[Any, ...] = None, None, None, None  # what the last call was for, and its rule

        def call(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal copy, latest
            if is_direct and weight is not None and runs_own_forward(norm):
                forward, path = type(norm).forward, FAST_PATHS.get(type(norm))
                if path is not None and path.of is forward and len(args) == 1 and not kwargs:
                    return path.forward(norm, args[0], weight, bias)
                x = args[0] if args else next(iter(kwargs.values()))
                cast = torch._C._is_any_autocast_enabled()
                same = latest[0] is forward and latest[1] is x.dtype and latest[2] == x.device
                rule: Rule = latest[3] if same and not cast else self._rule(forward, x, weight)
                if not (same or cast):
                    latest = forward, x.dtype, x.device, rule
                if rule.mode == "native":
                    (override, values), state = copy, norm.__dict__
                    # An attribute that has changed, such as eps, is another object.
                    if len(values) != len(state) or not all(map(is_, values, state.values())):
                        copy = override, values = copy_with(norm, given), [*state.values()]
                    y: Tensor = forward(override, *args, **kwargs)
                    return y if rule.dtype is None or y.dtype is rule.dtype else y.to(rule.dtype)
            x, args, kwargs = split_call(args, kwargs)
            return call_with(norm, x, weight, bias, *args, **kwargs)

        return call

    def _rule(self, forward: object, x: Tensor, weight: Tensor) -> Rule:
        norm, cast = self.norm, None
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
            cast = torch.get_autocast_dtype(x.device.type)
        own = norm._parameters.get(self._names[0])
        key = (forward, x.dtype, x.device, weight.dtype, None if own is None else own.dtype, cast)
        rule = self._rules.get(key)
        if rule is None:
            rule = rule_for(norm, x.device, x.dtype, weight.dtype, False)
            if own is not None and not is_traced():
                self._rules[key] = rule
        return rule


def call_with_rows(
    norm: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
) -> Tensor:
    """Call a norm with different parameters per sample.

    The module's forward and its hooks run, and the output has the dtype that the module's own call would have given.

    Args:
        norm: the module; afterwards it is as it was, also when its forward raises. Not for two threads at once.
        x: its input, `(B, ..., d)`.
        weight: `weight + offset` of each sample, `(B, 1, ..., d)` or whatever broadcasts over `x`; float32 or wider.
        bias: bias per sample, of the shape and dtype of `weight`, or None.
        *args: further arguments of the module's forward, such as a gate.
        **kwargs: further arguments by name.

    Returns:
        `xhat * weight + bias`.

    Raises:
        UnsupportedError: the norm's forward could not be tried, so its xhat is unknown.

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
    return call_hooked(norm, forward, {}, x, *args, **kwargs)


def with_rows(
    norm: nn.Module,
    own: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Compute a norm with different parameters per sample, without running the module's hooks.

    For functions that replace the module's forward; elsewhere use `call_with_rows`.

    Args:
        norm: the module.
        own: its forward, `forward_of(norm)`.
        x: its input, `(B, ..., d)`.
        weight: `weight + offset` of each sample, `(B, 1, ..., d)` or whatever broadcasts over `x`; float32 or wider.
        bias: bias per sample, of the shape and dtype of `weight`, or None.
        *args: further arguments of the module's forward, such as a gate.
        **kwargs: further arguments by name.

    Returns:
        `xhat * weight + bias`, in the dtype that the module's own call would have given.

    Raises:
        UnsupportedError: the norm's forward could not be tried, so its xhat is unknown.

    Example:
        >>> norm, x = nn.LayerNorm(2, bias=False), torch.tensor([[1.0, 3.0]])
        >>> with_rows(norm, norm.forward, x, torch.tensor([[2.0, 2.0]]), None).round()
        tensor([[-2.,  2.]])
    """
    path = fast_path_of(norm)
    if path is not None and not args and not kwargs and is_of_class(norm, own):
        y = path.rows(norm, x, weight, bias)
        return y.to(output_dtype(norm, x) if torch.is_autocast_enabled(x.device.type) else x.dtype)
    rule = rule_for(norm, x.device, x.dtype, weight.dtype, True)
    if rule.by_sample:
        if any(
            rows is not None and rows[0].numel() > parameter(norm, name).numel()
            for name, rows in (("weight", weight), ("bias", bias))
        ):
            raise UnsupportedError(
                f"the forward of this {type(norm).__name__} does more than normalize, so it runs once per sample, and "
                "in packed rows every token would need a run. Give batches with one sequence per row, padded."
            )
        return _sample_by_sample(norm, rule, own, x, weight, bias, args, kwargs)
    if not rule.is_norm:
        raise UnsupportedError(
            f"the forward of this {type(norm).__name__} could not be tried on a small input on {x.device}, so it "
            "cannot be run with different parameters per row. Run the batch one adapter at a time, with set_adapter."
        )
    # Without gradients alone: the backward pass of a kernel may know one weight only.
    free = rule.takes_rows and not (args or kwargs or torch.is_grad_enabled())
    if free and (bias is None) == (parameter(norm, "bias") is None):
        return by_rule(norm, rule, own, (weight, bias), x, args, kwargs)
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
    """The output of a batch from those of its samples: a tensor, or a tuple of tensors."""
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
        norm: the module; its hooks do not run.
        x: its input, `(B, ..., d)`.
        *args: further arguments of the module's forward, such as a gate; its effect is part of the result.
        **kwargs: further arguments by name.

    Returns:
        xhat, of the shape of `x`.

    Raises:
        UnsupportedError: the module is not a norm.

    Example:
        >>> normalize(nn.LayerNorm(4), torch.tensor([[0.0, 0.0, 2.0, 2.0]])).round()
        tensor([[-1., -1.,  1.,  1.]])
    """
    path = fast_path_of(norm)
    if path is not None and not args and not kwargs:
        return path.normalize(norm, x)
    rule = rule_for(norm, x.device, x.dtype, widened(norm), True)
    if not rule.is_norm:
        raise UnsupportedError(
            f"normalize expects a norm, whose output is affine in its weight and independent of its input's scale; "
            f"{type(norm).__name__} is not one. See find_norms(model) for the norms of a model."
        )
    return neutral(norm, rule, forward_of(norm), x, args, kwargs).to(rule.wide)


def output_dtype(norm: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype of `norm(x)` in the present context, autocast included, without running the module itself.

    Args:
        norm: the module.
        x: its input, `(B, ..., d)`.

    Returns:
        The dtype; that of `x` where the norm cannot be run on a small copy.

    Example:
        >>> output_dtype(nn.LayerNorm(4), torch.ones(2, 4))
        torch.float32
    """
    rule = rule_for(norm, x.device, x.dtype, widened(norm), True)
    return x.dtype if rule.dtype is None else rule.dtype


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Separate the input of a norm from the further arguments of its call; a few models pass the input by name.

    Args:
        args: positional arguments of the call.
        kwargs: keyword arguments of the call; the first is the input where `args` is empty.

    Returns:
        The input, the further positional arguments, and the further keyword arguments.

    Example:
        >>> split_call((), {"hidden_states": 1, "gate": 2})
        (1, (), {'gate': 2})
    """
    if args:
        return args[0], args[1:], kwargs
    first, *others = kwargs
    return kwargs[first], (), {name: kwargs[name] for name in others}
