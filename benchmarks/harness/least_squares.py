"""Repairs of norms without gradients, to compare: gains by least squares, or by the spread of each channel.

By least squares, what the linear maps behind a norm compute should be what they compute in the undamaged model. One
pass of each model over a few rows is enough. The package has none of this, because it repairs too little for its time:
see `benchmarks/results/recover.md`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.core.module_tree import base_modules
from peft_lntune.interop.folds import linear_maps, weight_of
from peft_lntune.norms.affine import call_with, normalize, split_call
from peft_lntune.norms.consumers import find_consumers
from peft_lntune.norms.find import Norm, find_norms
from peft_lntune.norms.names import own_parameter
from peft_lntune.recover.pairs import Batch, logits_of, mask_of

RIDGE = 1e-3
WAYS = ("own inputs", "teacher inputs", "spread")


def least_squares_gain(
    xhat: Tensor,
    known: Tensor,
    gain: Tensor,
    gram: Tensor | None = None,
    cross: Tensor | None = None,
    bias: Tensor | None = None,
    ridge: float = RIDGE,
) -> Tensor:
    """The gain of a damaged model's norm with which the linear maps behind it compute what they did.

    With the normalized inputs `s` of the damaged model and `t` of the undamaged one, its gain `g` and bias `b`, and the
    stacked weights `V` (damaged) and `W` of the linear maps that read the norm, the new gain `h` minimises

        mean over tokens of |V (h * s + b) - W (g * t + b)|^2 + ridge * m * |h - g|^2.

    This is least squares in `h`. Its normal equations need only second moments, and are Hadamard products, because
    `diag(s) V'V diag(s) = V'V * ss'`:

        (V'V * E[ss'] + ridge m I) h = (V'W * E[st']) g + E[s] * ((V'W - V'V) b) + ridge m g,

    where `m` is the mean of the diagonal of `V'V * E[ss']`. The matrix is positive definite (Schur's product theorem).

    Assumptions: nothing but these linear maps reads the norm; an error in each of their outputs counts alike; and the
    tokens are like those that the model will read.

    Args:
        xhat: `(tokens, d)`, `s`, at the same positions as `known`.
        known: `(tokens, d)`, `t`.
        gain: `(d,)`, `g`, an offset included.
        gram: `(d, d)`, `V'V`; None: the identity, so the norm's own outputs are matched, each entry by itself.
        cross: `(d, d)`, `V'W`; None: the identity.
        bias: `(d,)`, `b`, which is kept; None: zero.
        ridge: how strongly the gain is held at `g`.

    Returns:
        `h`, `(d,)`, in float64.

    Source:
        The objective is that of layer-wise reconstruction (AdaRound, arXiv 2004.10568; GPTQ, arXiv 2210.17323), with
        the gain as the unknown. Norm Tweaking (Li et al. 2023, arXiv 2309.02784) moves norms by gradient steps on a
        distance of channel means and variances; a closed form of that, `std(known) / std(xhat)`, is in
        https://github.com/onnxsim/onnxsim/pull/1124 (`spread_gain` here).

    Example:
        >>> known = torch.randn(64, 3, dtype=torch.float64)
        >>> least_squares_gain(known / 2, known, torch.ones(3), ridge=0.0)
        tensor([2., 2., 2.], dtype=torch.float64)
    """
    s, t, g = xhat.double(), known.double(), gain.double()
    tokens = len(s)
    if gram is None or cross is None:
        own, right = s.square().mean(0), (s * t).mean(0) * g
        slack = ridge * own.mean()
        return (right + slack * g) / (own + slack)
    gram, cross = gram.double(), cross.double()
    own = gram * (s.mT @ s / tokens)
    right = (cross * (s.mT @ t / tokens)) @ g
    if bias is not None:
        right = right + s.mean(0) * ((cross - gram) @ bias.double())
    slack = ridge * own.diagonal().mean()
    step = torch.linalg.solve(own + slack * torch.eye(len(g), dtype=own.dtype, device=own.device), right - own @ g)
    return g + step


def spread_gain(xhat: Tensor, known: Tensor, gain: Tensor) -> Tensor:
    """The gain with which each channel of a damaged model's norm has the spread that it had.

    Args:
        xhat: `(tokens, d)`, the normalized inputs of the damaged model.
        known: `(tokens, d)`, those of the undamaged one.
        gain: `(d,)`, the gain of both.

    Returns:
        The new gain, `(d,)`, in float64.

    Source:
        https://github.com/onnxsim/onnxsim/pull/1124, after Norm Tweaking (arXiv 2309.02784).

    Example:
        >>> known = torch.randn(64, 3, dtype=torch.float64)
        >>> spread_gain(known / 2, known, torch.ones(3))
        tensor([2., 2., 2.], dtype=torch.float64)
    """
    return gain.double() * known.double().std(0) / xhat.double().std(0)


def closed_form(
    student: nn.Module, teacher: nn.Module, batch: Batch, way: str = "own inputs", ridge: float = RIDGE
) -> dict[str, Tensor]:
    """Deltas of the gains of a damaged model in closed form, norm after norm in one pass.

    The pass stops at each norm, solves `least_squares_gain`, and goes on with the new gain. So each norm is solved for
    the inputs that the norms repaired before it will give it. A norm that something other than linear maps reads (norms
    of queries and keys, post-norms) is matched by its own output. A norm that runs more than once, or whose weight is
    not one row, keeps its gain. The model is not changed.

    Args:
        student: the damaged model, without adapters.
        teacher: the undamaged model.
        batch: inputs; some thousand tokens. The normalized inputs of all norms are kept in memory.
        way: `"own inputs"`, least squares for the inputs that the damaged model has; `"teacher inputs"`, for those of
            the undamaged one, which makes up for the linear maps behind the norm alone; `"spread"`, `spread_gain`.
        ridge: how strongly gains are held where they are, see `least_squares_gain`.

    Returns:
        The delta of each solved norm's weight, by the norm's name, in float32.

    Raises:
        ValueError: a solution is not finite, or there is no such way.
    """
    if way not in WAYS:
        raise ValueError(f"There is no way {way!r}; the ways are {WAYS}.")
    norms = {n: one for n, one in find_norms(student).items() if one.axis == -1 and len(one.weight_shape or ()) == 1}
    norms = {name: one for name, one in norms.items() if not one.by_sample}
    modules, taught = base_modules(student), base_modules(teacher)
    linears = linear_maps(student)
    read = find_consumers(
        {name: modules[name] for name in norms}, linears, modules, lambda: logits_of(student, _few(batch))
    )
    inputs = _inputs(teacher, {name: taught[name] for name in norms}, batch)
    deltas: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    handles = []

    def repair(name: str, norm: Norm) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            known = inputs.get(name)
            x, args, kwargs = split_call(args, kwargs)
            if known is None or args or kwargs or calls[name] > 1:
                return None
            rows = _rows(normalize(module, x), batch)
            if rows.shape != known.shape:
                return None
            weight, bias = own_parameter(module, "weight").detach(), own_parameter(module, "bias")
            wide = torch.promote_types(weight.dtype, torch.float32)
            gain = weight.to(wide) + norm.offset
            found = read.get(name)
            behind = found.linears if found is not None and not found.others else []
            if way == "spread":
                repaired = spread_gain(rows, known, gain)
            else:
                own_inputs = known if way == "teacher inputs" else rows
                repaired = least_squares_gain(own_inputs, known, gain, *_grams(behind, modules, taught), bias, ridge)
            delta = (repaired - gain.double()).float()
            if not bool(delta.isfinite().all()):
                raise ValueError(f"The gain of {name} has no finite solution. Give more tokens.")
            deltas[name] = delta
            own = None if bias is None else bias.detach().to(wide)
            return call_with(_bare(module), x, weight.to(wide) + delta.to(wide), own)

        return hook

    try:
        for name, norm in norms.items():
            handles.append(modules[name].register_forward_hook(repair(name, norm), with_kwargs=True))
        with torch.no_grad():
            logits_of(student, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: delta for name, delta in deltas.items() if calls[name] == 1}


def _bare(module: nn.Module) -> nn.Module:
    """A copy of a norm without hooks, which shares its tensors."""
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy._forward_hooks = type(module._forward_hooks)()
    return copy


def _inputs(model: nn.Module, norms: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
    """The normalized inputs of norms that run once, as rows of tokens."""
    found: dict[str, list[Tensor]] = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, rest, named = split_call(args, kwargs)
            if not rest and not named:
                found.setdefault(name, []).append(_rows(normalize(module, x), batch).to(x.dtype))

        return hook

    try:
        for name, norm in norms.items():
            handles.append(norm.register_forward_pre_hook(keep(name), with_kwargs=True))
        with torch.no_grad():
            logits_of(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: rows[0] for name, rows in found.items() if len(rows) == 1}


def _rows(xhat: Tensor, batch: Batch) -> Tensor:
    """Tokens as rows; padding is left out."""
    mask = mask_of(batch, xhat)
    return xhat.reshape(-1, xhat.shape[-1]) if mask is None else xhat[mask.bool()]


def _few(batch: Batch) -> Batch:
    return {name: value[:1] if isinstance(value, Tensor) else value for name, value in batch.items()}


def _grams(
    behind: list[str], modules: Mapping[str, nn.Module], taught: Mapping[str, nn.Module]
) -> tuple[Tensor | None, Tensor | None]:
    """`V'V` and `V'W` of the linear maps behind a norm; None where there are none."""
    gram = cross = None
    for name in behind:
        own, known = weight_of(modules[name]).float(), weight_of(taught[name]).float()
        gram = own.mT @ own if gram is None else gram + own.mT @ own
        cross = own.mT @ known if cross is None else cross + own.mT @ known
    return gram, cross
