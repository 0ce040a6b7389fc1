"""Where the tokens of packed rows are in the input of a layer, and whether sequences of one row meet: measured.

A copy of the model runs with noise in some sequences of a row. Only their tokens may change, in each layer, along one
axis; where others change too, the model mixes the sequences, as attention without a mask for packed rows does.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_lntune.routing.samples import Noise, Sums, run_copy, sums_of

__all__ = ["Probe", "TokenFact", "axes_of", "measure_causal", "measure_tokens", "probes_of"]


class TokenFact(NamedTuple):
    """Where a layer has the tokens of packed rows.

    Attributes:
        axis: the axis of its input; 0 where rows and tokens share the first.
        refused: why the layer cannot be routed by token; empty where it can.
    """

    axis: int = 1
    refused: str = ""


class Probe(NamedTuple):
    """Bool masks of tokens, `(B, T)`: which get noise, and which may change."""

    noisy: Tensor
    free: Tensor


def probes_of(sequences: Tensor) -> list[Probe]:
    """Probes that tell whether sequences meet: noise in the first one, then in the last.

    Args:
        sequences: number of the sequence of each token, `(B, T)`.

    Returns:
        The probes.

    Example:
        >>> [probe.noisy.tolist() for probe in probes_of(torch.tensor([[0, 1, 1]]))]
        [[[True, False, False]], [[False, True, True]]]
    """
    return [Probe(own, own) for own in (sequences == sequences.min(), sequences == sequences.max())]


def measure_tokens(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    probes: Sequence[Probe],
    watched: Mapping[str, nn.Module],
) -> dict[str, TokenFact] | None:
    """Measure where each watched layer has the tokens of packed rows.

    The model and its inputs do not change: a copy of the model that shares its tensors runs on copies of the inputs,
    without gradients, and random states are restored.

    Args:
        module: the model, or the part of it that is called.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        probes: which tokens get noise, and which may change.
        watched: layers of the model by a label.

    Returns:
        Facts by label, for the layers that were called; None where the copy cannot be made or run.

    Example:
        >>> sequences = torch.tensor([[0, 0, 1]])
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4))
        >>> measure_tokens(model, (torch.randn(1, 3, 2),), {}, probes_of(sequences), {"norm": model[1]})
        {'norm': TokenFact(axis=1, refused='')}
    """
    shape = probes[0].noisy.shape
    devices = sorted({tensor.device.index for tensor in module.parameters() if tensor.device.type == "cuda"})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            plain, *noisy = (
                run_copy(module, args, kwargs, watched, _TokenNoise(shape, probe), partial(_note, shape))
                for probe in (None, *probes)
            )
    # Whatever the error, the model itself may still run; lengths must then suffice.
    except Exception:
        return None
    if not plain.calls or not all(run.noisy for run in noisy):
        return None
    return {
        label: _judge(calls, [run.calls.get(label, []) for run in noisy], probes)
        for label, calls in plain.calls.items()
    }


def measure_causal(model: nn.Module, watched: Mapping[str, nn.Module]) -> dict[str, TokenFact] | None:
    """Measure where each watched layer of a causal language model has its tokens, with a sequence of three.

    Noise in a token may change this one and those behind it, so the order of the tokens is measured too.

    Args:
        model: the model, called with `input_ids`.
        watched: layers of the model by a label.

    Returns:
        Facts by label, for the layers that were called; None where a copy of the model cannot be made or run.
    """
    device = next(model.parameters()).device
    ids, place = torch.arange(3, device=device)[None], torch.arange(3)[None]
    probes = [Probe(place >= first, place >= first) for first in (1, 2)]
    return measure_tokens(model, (), {"input_ids": ids, "use_cache": False}, probes, watched)


class _TokenNoise(Noise):
    """Adds noise to some tokens of packed rows."""

    def __init__(self, shape: Sequence[int], probe: Probe | None) -> None:
        super().__init__()
        self.shape, self.noisy = tuple(shape), None if probe is None else probe.noisy

    def fits(self, tensor: Tensor) -> bool:
        return tensor.shape[:2] == self.shape

    def chosen(self, tensor: Tensor) -> Any:
        return None if self.noisy is None else self.noisy.to(tensor.device)


def _note(shape: Sequence[int], x: Tensor) -> dict[int, Sums]:
    """Sums per token, `(B * T,)`, by each axis that may be that of the tokens."""
    batch, tokens = shape
    found = {}
    for axis in axes_of(x.shape[:-1], batch, tokens):
        found[axis] = sums_of(x if axis == 0 else x.movedim(axis, 1).flatten(0, 1))
    return found


def _judge(calls: Sequence[Any], noisy: Sequence[Sequence[Any]], probes: Sequence[Probe]) -> TokenFact:
    if any(len(others) != len(calls) for others in noisy):
        return TokenFact(refused="the number of its calls changes with one sequence")
    axes = [axis for axis in calls[0] if all(axis in call for call in calls)]
    if not axes:
        return TokenFact(refused="its input has no axis of the tokens")
    for axis in axes:
        if all(
            _stays(call[axis], other[axis], probe)
            for others, probe in zip(noisy, probes, strict=True)
            for call, other in zip(calls, others, strict=True)
        ):
            return TokenFact(axis)
    return TokenFact(
        refused="a change of one sequence reaches it in the tokens of others, so the model mixes the sequences of a "
        "row (transformers keeps them apart by position_ids that begin again, if called with use_cache=False and "
        "without an attention_mask)"
    )


def _stays(plain: Sums, other: Sums, probe: Probe) -> bool:
    """Whether a change is where it may be, and somewhere."""
    changed = (other.values - plain.values).abs().nan_to_num(float("inf"))
    changed[plain.values.isnan() & other.values.isnan()] = 0
    noisy, free = probe.noisy.flatten().to(changed.device), probe.free.flatten().to(changed.device)
    own = changed[noisy].min()
    rest = changed[~free]
    return bool(own > 0) and (not len(rest) or bool(rest.max() <= plain.rounding * changed[noisy].max()))


def axes_of(leading: Sequence[int], batch: int, tokens: int) -> list[int]:
    """The axes of an input that may be that of the tokens, told by length; 0 where rows and tokens share one axis.

    Args:
        leading: leading lengths of the input, without the dimensions of the norm.
        batch: number of rows.
        tokens: number of tokens per row.

    Returns:
        The axes.

    Example:
        >>> axes_of((2, 5), 2, 5), axes_of((10,), 2, 5), axes_of((2, 5, 5), 2, 5)
        ([1], [0], [1, 2])
    """
    flat = [0] if leading[:1] == (batch * tokens,) and (len(leading) == 1 or batch * tokens != batch) else []
    later = [axis for axis in range(1, len(leading)) if leading[0] == batch and leading[axis] == tokens]
    return flat + later
