"""Where the samples of a batch are in the input of a layer: measured, since shapes alone do not tell.

A model may put time first, flatten samples and tokens into one axis in either order, give several images to one sample,
or send tokens to experts; and two lengths may be equal by chance. So a copy of the model runs three times: unchanged,
and with noise in the first and then the last sample. Where samples are in order along the first axis, nothing outside
the block of the noisy sample may change in any watched layer. Noise is added to the model's inputs and to the output of
each watched layer, so that layers behind one with the same input for all samples (learned queries) are tested too.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_lntune.routing.sharing_copy import sharing_copy

__all__ = ["Fact", "Noise", "Run", "Sums", "measure_samples", "run_copy", "sums_of", "tensors_in"]


class Fact(NamedTuple):
    """The result of the measurement for one layer.

    Attributes:
        blocks: whether each sample has a block of several rows; False: one row.
        refused: why the layer cannot be routed by sample; empty where it can.
    """

    blocks: bool = False
    refused: str = ""


def measure_samples(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int, watched: Mapping[str, nn.Module]
) -> dict[str, Fact] | None:
    """Measure where each watched layer has the samples of a batch.

    The model and its inputs do not change: a copy of the model that shares its tensors runs on copies of the inputs,
    without gradients, and random states are restored.

    Args:
        module: the model, or the part of it that is called.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        size: number of samples in the batch, at least two.
        watched: layers of the model by a label.

    Returns:
        Facts by label, for the layers that were called; None where the copy cannot be made or run.

    Example:
        >>> class TimeFirst(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4)
        ...     def forward(self, x):
        ...         return self.second(self.first(x).transpose(0, 1))
        >>> model = TimeFirst()
        >>> facts = measure_samples(model, (torch.randn(3, 3, 4),), {}, 3, dict(model.named_children()))
        >>> facts["first"].refused, bool(facts["second"].refused)
        ('', True)
    """
    devices = sorted({tensor.device.index for tensor in module.parameters() if tensor.device.type == "cuda"})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            runs = [
                run_copy(module, args, kwargs, watched, _SampleNoise(size, sample), sums_of)
                for sample in (None, 0, size - 1)
            ]
    # Whatever the error, the model itself may still run; lengths must then suffice.
    except Exception:
        return None
    (plain, _), first, last = runs
    if not plain or not (first.noisy or last.noisy):
        return None
    facts = {}
    for label, calls in plain.items():
        noisy = [(run.calls.get(label, []), sample) for run, sample in ((first, 0), (last, size - 1))]
        facts[label] = _judge(calls, noisy, size)
    return facts


class Run(NamedTuple):
    """One run: for each label what was noted of each call's input; and whether any noise was added."""

    calls: dict[str, list[Any]]
    noisy: bool


class Sums(NamedTuple):
    """`(rows,)` sums of an input, and the relative change that rounding alone may cause."""

    values: Tensor
    rounding: float


def run_copy(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    watched: Mapping[str, nn.Module],
    noise: "Noise",
    note: Callable[[Tensor], Any],
) -> Run:
    """Run a copy of a module on copies of its inputs, with noise.

    Args:
        module: the module, which does not change.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        watched: layers of the module by a label.
        noise: where noise is added.
        note: what is kept of the input of a watched layer.

    Returns:
        What was noted, by label.

    Raises:
        Exception: any error of the copy or of its forward pass.
    """
    copied, inside = sharing_copy(module)
    args, kwargs = _copied(args), _copied(dict(kwargs))
    own = {
        tensor.untyped_storage().data_ptr()
        for _, tensor in tensors_in((args, kwargs))
        if not tensor.is_floating_point() and tensor.dim() > 1 and noise.fits(tensor)
    }
    for name, tensor in tensors_in((args, kwargs)):
        # Masks get no noise.
        if tensor.is_floating_point() and tensor.dim() > 1 and "mask" not in name:
            noise.add(tensor)
    calls: dict[str, list[Any]] = {}
    with ExitStack() as stack:
        for label, each in watched.items():
            if id(each) in inside:
                before = inside[id(each)].register_forward_pre_hook(
                    partial(_note, calls.setdefault(label, []), note), with_kwargs=True
                )
                stack.callback(before.remove)
                if noise.everywhere:
                    after = inside[id(each)].register_forward_hook(lambda module, args, output: noise.behind(output))
                    stack.callback(after.remove)
        for each in copied.modules():
            if isinstance(each, nn.Embedding):
                handle = each.register_forward_hook(partial(_embedded, own, noise))
                stack.callback(handle.remove)
        copied(*args, **kwargs)
    return Run({label: found for label, found in calls.items() if found}, noise.added)


class Noise:
    """Adds noise to a part of tensors.

    Attributes:
        added: whether any was added.
        everywhere: whether it is added behind watched layers too, not only to inputs and embeddings.
    """

    everywhere = False

    def __init__(self) -> None:
        self.added = False
        self.generator = torch.Generator().manual_seed(0)

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor may have the part."""
        raise NotImplementedError

    def chosen(self, tensor: Tensor) -> Any:
        """An index of the part in a tensor that fits; None: no noise."""
        raise NotImplementedError

    def add(self, tensor: Tensor) -> None:
        """In place."""
        if not self.fits(tensor) or (chosen := self.chosen(tensor)) is None:
            return
        spread = tensor.float().std().nan_to_num(1.0).clamp(1e-3, 1e3)
        # Drawn along the last axis only: drawing for the whole tensor would take longer than the model.
        noise = torch.randn(tensor.shape[-1], generator=self.generator).to(tensor.device) * spread
        tensor[chosen] += noise.to(tensor.dtype)
        self.added = True

    def behind(self, output: Any) -> Any:
        """A copy of a module's output, with noise."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        output = output.clone()
        self.add(output)
        return output


class _SampleNoise(Noise):
    """Adds noise to one sample, assuming that samples are along the first axis; None: to none."""

    everywhere = True

    def __init__(self, size: int, sample: int | None) -> None:
        super().__init__()
        self.size, self.sample = size, sample

    def fits(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and len(tensor) > 0 and len(tensor) % self.size == 0

    def chosen(self, tensor: Tensor) -> Any:
        rows = len(tensor) // self.size
        return None if self.sample is None else slice(self.sample * rows, (self.sample + 1) * rows)


def _embedded(own: set[int], noise: Noise, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Add noise to embeddings of the user's inputs; positions and the like are the same for all samples."""
    index = args[0] if args else None
    if isinstance(index, Tensor) and index.dim() > 1 and index.untyped_storage().data_ptr() in own:
        return noise.behind(output)
    return output


def _note(
    found: list[Any], note: Callable[[Tensor], Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    x = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(x, Tensor) and x.is_floating_point() and x.dim():
        found.append(note(x))


def sums_of(x: Tensor) -> Sums:
    """A weighted sum of each row of an input, which changes if any of its entries changes.

    Args:
        x: floating-point, `(rows, ...)`.

    Returns:
        The sums.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    fixed = torch.Generator().manual_seed(1)
    while wide.dim() > 1:
        wide = wide @ torch.randn(wide.shape[-1], generator=fixed).to(wide)
    # Experts regroup the tokens of a batch when one of them changes, which changes the rounding of products.
    return Sums(wide, {4: 1e-4, 8: 1e-9}.get(x.itemsize, 2**-6))


def _judge(calls: list[Sums], noisy: list[tuple[list[Sums], int]], size: int) -> Fact:
    several = False
    for others, sample in noisy:
        if len(others) != len(calls):
            return Fact(refused="the number of its calls changes with one sample")
        for plain, other in zip(calls, others, strict=True):
            before, after = plain.values, other.values
            if len(before) != len(after) or len(before) % size:
                return Fact(refused=f"its input has {len(before)} rows for {size} samples")
            rows = len(before) // size
            several |= rows > 1
            changed = (after - before).abs().nan_to_num(float("inf"))
            changed[before.isnan() & after.isnan()] = 0
            own = changed[sample * rows : (sample + 1) * rows].max()
            rest = torch.cat([changed[: sample * rows], changed[(sample + 1) * rows :]]).max()
            if rest > plain.rounding * own:
                return Fact(refused="a change of one sample reaches it in the rows of others")
    return Fact(blocks=several)


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Find the tensors in nested tuples, lists and mappings.

    Args:
        value: the object to search.
        name: prefix of the names.

    Yields:
        Pairs of name and tensor; the name joins the keys that lead to the tensor.

    Example:
        >>> [name for name, _ in tensors_in({"a": torch.ones(1), "b": [torch.ones(1)]})]
        ['.a', '.b']
    """
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from tensors_in(each, f"{name}.{key}")
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each, name)


def _copied(value: Any) -> Any:
    """A copy of a model's inputs with separate tensors: noise is added to them, and caches are written."""
    memo = {id(tensor): tensor.detach().clone() for _, tensor in tensors_in(value)}
    return copy.deepcopy(value, memo)
