"""Where the samples of a batch are in the input of a layer: measured, since shapes alone do not tell.

A model may put time first, flatten samples and tokens into one axis in either order, give several images to one sample,
or send tokens to experts; and two lengths may be equal by chance. So a copy of the model runs three times: unchanged,
and with noise in the first and then the last sample. Where samples are in order along the first axis, nothing outside
the block of the noisy sample may change in any watched layer. Noise is added to the model's inputs and to the output of
each watched layer, so that layers behind one with the same input for all samples (learned queries) are tested too.

If noise in a sample changes nothing in a layer's input, that input says nothing about its rows: they may be learned
queries, one block per sample, or a table that all samples share. Then what follows decides: the copy runs again with
noise behind such layers only, in the rows of several groups of samples, and nothing may change for samples outside the
group, neither in a watched layer nor in the outputs.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_lntune.routing.sharing_copy import sharing_copy

__all__ = ["Fact", "Noise", "Run", "Sums", "measure_samples", "run_copy", "sums_of", "tensors_in"]


_PART = 2**24  # entries


class Fact(NamedTuple):
    """The result of the measurement for one layer.

    Attributes:
        blocks: whether each sample has a block of several rows; False: one row.
        refused: why the layer cannot be routed by sample; empty where it can.
    """

    blocks: bool = False
    refused: str = ""


@torch.compiler.disable
def measure_samples(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    size: int,
    watched: Mapping[str, nn.Module],
    attached: bool = False,
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
        attached: whether token ids alone tell the samples, and images or the like belong to samples by placeholders
            among the tokens, any number to each. Then no noise is added to images.

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

    def run(samples: Sequence[int], behind: Set[str] | None = None) -> Run:
        noise = _SampleNoise(size, samples, behind, floats=not attached and behind is None)
        return run_copy(module, args, kwargs, watched, noise, sums_of, outputs=behind is not None)

    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            plain, *runs = (run(samples) for samples in ([], [0], [size - 1]))
            if not plain.calls or not any(each.noisy for each in runs):
                return None
            facts, unreached = {}, set()
            for label, calls in plain.calls.items():
                noisy = [(each.calls.get(label, []), sample) for each, sample in zip(runs, (0, size - 1), strict=True)]
                facts[label], reached = _judge(calls, noisy, size)
                if not reached and not facts[label].refused:
                    unreached.add(label)
            apart = True
            if unreached:
                still = run([], unreached)
                apart = all(_stays_in(still, run(samples, unreached), samples, size) for samples in _groups(size))
    # Whatever the error, the model itself may still run; lengths must then suffice.
    except Exception:
        return None
    return {
        label: fact if apart or label not in unreached else Fact(refused=_NOT_OF_SAMPLES)
        for label, fact in facts.items()
    }


class Run(NamedTuple):
    """One run.

    Attributes:
        calls: for each label, what was noted of each call's input.
        noisy: whether any noise was added.
        outputs: what was noted of each floating-point tensor that the module returned, if asked for.
    """

    calls: dict[str, list[Any]]
    noisy: bool
    outputs: Sequence[Any] = ()


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
    outputs: bool = False,
) -> Run:
    """Run a copy of a module on copies of its inputs, with noise.

    Args:
        module: the module, which does not change.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        watched: layers of the module by a label.
        noise: where noise is added.
        note: what is kept of the input of a watched layer.
        outputs: whether it is also kept of what the module returns.

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
        if noise.inputs(name) and tensor.is_floating_point() and tensor.dim() > 1 and "mask" not in name:
            noise.add(tensor)
    calls: dict[str, list[Any]] = {}
    with ExitStack() as stack:
        for label, each in watched.items():
            if id(each) in inside:
                before = inside[id(each)].register_forward_pre_hook(
                    partial(_note, calls.setdefault(label, []), note), with_kwargs=True
                )
                stack.callback(before.remove)
                if noise.follows(label):
                    after = inside[id(each)].register_forward_hook(lambda module, args, output: noise.behind(output))
                    stack.callback(after.remove)
        for each in copied.modules():
            if isinstance(each, nn.Embedding) and noise.ids:
                handle = each.register_forward_hook(partial(_embedded, own, noise))
                stack.callback(handle.remove)
        output = copied(*args, **kwargs)
    returned = [tensor for _, tensor in tensors_in(output) if tensor.is_floating_point() and tensor.dim()]
    found = {label: notes for label, notes in calls.items() if notes}
    return Run(found, noise.added, [note(tensor) for tensor in returned] if outputs else ())


class Noise:
    """Adds noise to a part of tensors.

    Attributes:
        added: whether any was added.
        ids: whether it is added to the embeddings of token ids.
    """

    ids = True

    def __init__(self) -> None:
        self.added = False
        self.generator = torch.Generator().manual_seed(0)

    def inputs(self, name: str) -> bool:
        """Whether it is added to a floating-point input of this name."""
        return True

    def follows(self, label: str) -> bool:
        """Whether it is added behind the watched layer of this label."""
        return False

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
    """Adds noise to some samples, assuming that samples are along the first axis.

    Args:
        size: number of samples.
        samples: numbers of those with noise.
        behind: labels of the layers behind which noise is added, and nowhere else; None: behind all, and to inputs.
        floats: whether noise is added to floating-point inputs other than embeddings of tokens.
    """

    def __init__(self, size: int, samples: Sequence[int], behind: Set[str] | None, floats: bool) -> None:
        super().__init__()
        self.size, self.samples, self.layers, self.floats = size, list(samples), behind, floats
        self.ids = behind is None

    def inputs(self, name: str) -> bool:
        return self.floats or (self.ids and name.endswith("inputs_embeds"))

    def follows(self, label: str) -> bool:
        return self.layers is None or label in self.layers

    def fits(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and len(tensor) > 0 and len(tensor) % self.size == 0

    def chosen(self, tensor: Tensor) -> Any:
        return _rows_of(self.samples, len(tensor), self.size).to(tensor.device) if self.samples else None


def _rows_of(samples: Sequence[int], length: int, size: int) -> Tensor:
    """Which of so many rows belong to these samples, `(length,)` bool, if samples are in order.

    Example:
        >>> _rows_of([1], 4, 2).tolist()
        [False, False, True, True]
    """
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[list(samples)] = True
    return chosen.repeat_interleave(length // size)


def _groups(size: int) -> list[list[int]]:
    """Groups of samples such that, of any two samples, each one is in a group without the other.

    So rows that belong to any other sample than they seem to are found, with few runs: two per binary digit.

    Example:
        >>> _groups(3)
        [[1], [0, 2], [2], [0, 1]]
    """
    digits = range((size - 1).bit_length())
    return [[n for n in range(size) if bool(n >> digit & 1) == one] for digit in digits for one in (True, False)]


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
    # In parts, since a float32 copy of all logits of a batch may not fit in memory.
    parts = x.split(max(1, _PART * len(x) // max(1, x.numel())))
    values = torch.cat([_weighted(part if part.dtype == torch.float64 else part.float()) for part in parts])
    # Experts regroup the tokens of a batch when one of them changes, which changes the rounding of products.
    return Sums(values, {4: 1e-4, 8: 1e-9}.get(x.itemsize, 2**-6))


def _weighted(x: Tensor) -> Tensor:
    fixed = torch.Generator().manual_seed(1)
    while x.dim() > 1:
        x = x @ torch.randn(x.shape[-1], generator=fixed).to(x)
    return x


def _judge(calls: list[Sums], noisy: list[tuple[list[Sums], int]], size: int) -> tuple[Fact, bool]:
    """The fact about a layer, and whether each noisy sample reaches each of its calls."""
    several, reached = False, True
    for others, sample in noisy:
        if len(others) != len(calls):
            return Fact(refused="the number of its calls changes with one sample"), True
        for plain, other in zip(calls, others, strict=True):
            changed = _change(plain, other)
            if changed is None or len(changed) % size:
                alike = changed is not None and not bool(changed.any())
                why = _NOT_OF_SAMPLES if alike else f"its input has {len(plain.values)} rows for {size} samples"
                return Fact(refused=why), True
            several |= len(changed) > size
            mine = _rows_of([sample], len(changed), size).to(changed.device)
            own, rest = changed[mine].max(), changed[~mine].max()
            if rest > plain.rounding * own:
                return Fact(refused="a change of one sample reaches it in the rows of others"), True
            reached &= bool(own > 0)
    return Fact(blocks=several), reached


def _stays_in(plain: Run, noisy: Run, samples: Sequence[int], size: int) -> bool:
    """Whether noise in the rows of some samples, behind layers that no sample reaches, changes these samples only."""
    if not noisy.noisy or not plain.outputs:
        return False
    pairs = [(plain.outputs, noisy.outputs)]
    pairs += [(calls, noisy.calls.get(label, [])) for label, calls in plain.calls.items()]
    for before, after in pairs:
        if len(before) != len(after):
            return False
        for one, other in zip(before, after, strict=True):
            changed = _change(one, other)
            if changed is None:
                return False
            if not changed.any():
                continue
            if len(changed) % size:
                return False
            mine = _rows_of(samples, len(changed), size).to(changed.device)
            if changed[~mine].max() > one.rounding * changed[mine].max():
                return False
    return True


def _change(plain: Sums, other: Sums) -> Tensor | None:
    """By how much each row changed; None where their number did."""
    before, after = plain.values, other.values
    if len(before) != len(after):
        return None
    changed = (after - before).abs().nan_to_num(float("inf"))
    changed[before.isnan() & after.isnan()] = 0
    return changed


_NOT_OF_SAMPLES = (
    "its input does not depend on the samples, and its output reaches them all (a table that all samples share), or "
    "samples in another order than the names (not one image, or the like, for each row)"
)


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
