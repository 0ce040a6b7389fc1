"""One gradient per sample for chosen parameters, with one backward pass per batch.

A norm is `y = xhat * (weight + offset) + bias`, so with g the gradient of a sample's loss by y, summed over tokens,

    d loss / d weight = sum_t g * xhat        d loss / d bias = sum_t g

and for a linear module, `y = x W^T + b`, `d loss / d W = sum_t g x^T`. Samples of a batch do not influence each other,
so one backward pass of the sum of all losses gives every sample its own g. A forward hook on the module captures g;
xhat is recomputed from the input, which autograd keeps anyway, so a pass needs the memory of an ordinary step.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_lntune.core.delta import PARAMETERS
from peft_lntune.core.module_tree import base_modules, called_modules
from peft_lntune.errors import UnsupportedError
from peft_lntune.norms.affine import normalize, split_call
from peft_lntune.norms.find import Norm, survey
from peft_lntune.norms.names import role_of
from peft_lntune.norms.probe import summed

__all__ = ["PerSample", "RowNorms", "per_sample"]

_CHUNK = 2**24  # entries of per-sample gradients of one linear weight held at a time


class RowNorms(NamedTuple):
    """What a backward pass gives a module's output.

    Attributes:
        name: name of the module.
        norms: norms of the gradient with respect to the rows of each sample, `(B,)` float64.
        dtype: dtype of the gradient.
    """

    name: str
    norms: Tensor
    dtype: torch.dtype


class PerSample:
    """The per-sample gradients that hooks on a model have gathered; created by `per_sample`.

    Attributes:
        hooked: names of the parameters whose gradients the hooks capture.
        fallback: names of the parameters without a rule, such as an embedding's weight: they need one backward pass per
            sample.
        unproven: whether a module of the latest forward pass had a number of rows per sample that no entry of the batch
            has, such as tokens times heads: only `measuring` shows whether these are sorted by sample.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        bases = base_modules(model)
        norms, _ = survey(bases)
        wanted: dict[int, str] = {}
        for name in names:
            module, _, parameter = name.rpartition(".")
            wanted.setdefault(id(getattr(bases[module], parameter)), name)
        self._keys: dict[str, dict[str, str]] = {}  # module -> its parameter -> the wanted name
        unruled: set[str] = set()
        for module_name, holder in bases.items():
            norm = norms.get(module_name)
            named = (lambda p, holder=holder: p) if norm is None else partial(role_of, holder)
            keys = {named(p): wanted[id(v)] for p, v in holder._parameters.items() if id(v) in wanted}
            ruled = type(holder) is nn.Linear if norm is None else not norm.by_sample
            if keys and ruled and keys.keys() <= set(PARAMETERS):
                self._keys[module_name] = keys
            else:
                unruled |= set(keys.values())
        self.fallback = [name for name in wanted.values() if name in unruled]
        self.hooked = [name for name in wanted.values() if name not in unruled]
        self._bases, self._norms = bases, norms
        self._size, self._lengths = 0, frozenset[int]()
        self._calls: dict[str, int] = {}
        self._gradients: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._backward = False
        self._whole = False
        self._sizes: list[RowNorms] | None = None
        self._alone = False
        self.unproven = False

    def start(self, size: int, lengths: Iterable[int], whole: bool = False) -> None:
        """Prepare for the next forward pass.

        Args:
            size: number of samples in the batch.
            lengths: possible numbers of rows per sample where a model flattens batch and tokens into one axis.
            whole: keep the gradient of each sample, for `gradients`, instead of squares only.
        """
        self._size, self._lengths, self._whole = size, frozenset(lengths), whole
        self._calls, self._backward, self.unproven = {}, False, False
        self._gradients, self._squares = {}, {}

    def gradients(self) -> dict[str, Tensor]:
        """Take the gradients of the last backward pass, `(B, *shape)` each; parameters it did not reach are absent."""
        found, self._gradients = self._gradients, {}
        return found

    def squares(self) -> dict[str, Tensor]:
        """Take the squared gradients of the last backward pass, summed over samples, in the parameters' shapes."""
        found, self._squares = self._squares, {}
        for name, gradient in self.gradients().items():
            found[name] = gradient.square().sum(0)
        return found

    def drop(self, names: Iterable[str]) -> None:
        """Stop capturing the gradients of these parameters; they become `fallback`."""
        gone = set(names)
        self.fallback += [name for name in self.hooked if name in gone]
        self.hooked = [name for name in self.hooked if name not in gone]

    @contextmanager
    def measuring(self, alone: bool) -> Iterator[list[RowNorms]]:
        """Inside this context, a backward pass gathers norms.

        The gradient of a row is a sum over samples, each with the weight of its loss. So two passes, one with equal and
        one with other weights, show which sample a row belongs to.

        Args:
            alone: gather no gradients beside the norms.

        Yields:
            The norms of each call, in the order of the backward pass.
        """
        self._sizes, self._alone = [], alone
        try:
            yield self._sizes
        finally:
            self._sizes, self._alone = None, False

    # Hooks.

    def hook(self, name: str, anchor: Tensor) -> Any:
        """The forward hook of one module.

        Args:
            name: name of the module.
            anchor: a scalar that requires a gradient, on the module's device.

        Returns:
            A hook to register `with_kwargs=True`.
        """

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
            x, more, named = split_call(args, kwargs)
            if not isinstance(y, Tensor):
                raise UnsupportedError(f"{name} ({type(module).__name__}) returns {type(y).__name__}, not a tensor.")
            if isinstance(x, nn.Parameter):  # the same for all samples, as DeBERTa's norm of its position embeddings
                self.drop(self._keys[name].values())
                return y
            self._check_rows(name, x)
            if not self._backward:
                for key in self._keys[name].values():
                    self._calls[key] = self._calls.get(key, 0) + 1
            tensors = [x]
            call = [_set_aside(value, tensors) for value in more], {k: _set_aside(v, tensors) for k, v in named.items()}
            return _Identity.apply(y, anchor, partial(self._note, name, call), *tensors)

        return hook

    def _check_rows(self, name: str, x: Tensor) -> None:
        # All rows belong to a single sample.
        whole = self._size == 1 and not (name in self._norms and self._norms[name].axis == 1)
        if x.shape[0] == self._size or whole:
            return
        if x.shape[0] % self._size or x.dim() < 2:
            raise UnsupportedError(
                f"{name} gets an input of shape {tuple(x.shape)} for a batch of {self._size} samples, so its rows are "
                "not sorted by sample (packed sequences, or tokens routed to experts). Leave it out with parameters=, "
                "or give batches of one sample."
            )
        self.unproven |= x.shape[0] // self._size not in self._lengths

    def _rows(self, x: Tensor) -> Tensor:
        return x if x.shape[0] == self._size else x.unflatten(0, (self._size, -1))

    def _note(self, name: str, call: tuple[list[Any], dict[str, Any]], gradient: Tensor, *tensors: Tensor) -> None:
        """Use the gradient with respect to the output of one call of the module `name`."""
        self._backward = True
        keys = {parameter: key for parameter, key in self._keys[name].items() if key in self.hooked}
        if self._sizes is not None and keys:
            norms = self._rows(gradient).reshape(self._size, -1).double().norm(dim=1)
            self._sizes.append(RowNorms(name, norms, gradient.dtype))
        if self._alone:
            return
        if name not in self._norms:
            self._note_linear(keys, gradient, tensors[0])
            return
        more = [_put_back(value, tensors) for value in call[0]]
        named = {key: _put_back(value, tensors) for key, value in call[1].items()}
        self._note_norm(self._bases[name], self._norms[name], keys, gradient, tensors[0], *more, **named)

    def _note_norm(
        self, base: nn.Module, norm: Norm, keys: Mapping[str, str], g: Tensor, x: Tensor, *more: Any, **named: Any
    ) -> None:
        if not keys:
            return
        wide = torch.promote_types(g.dtype, torch.float32)
        if "weight" in keys:
            xhat = normalize(base, x, *more, **named)
            wide = torch.promote_types(wide, xhat.dtype)
            self._add(
                keys["weight"], summed(self._rows(g.to(wide) * xhat.to(wide)), norm.weight_shape or (), norm.axis)
            )
        if "bias" in keys:
            self._add(keys["bias"], summed(self._rows(g), norm.bias_shape or (), norm.axis, wide))

    def _note_linear(self, keys: Mapping[str, str], g: Tensor, x: Tensor) -> None:
        wide = torch.promote_types(torch.promote_types(g.dtype, x.dtype), torch.float32)
        g, x = (self._rows(t).reshape(self._size, -1, t.shape[-1]) for t in (g, x))
        if "bias" in keys:
            self._add(keys["bias"], g.sum(1, dtype=wide))
        if "weight" not in keys:
            return
        key = keys["weight"]
        if self._whole or self._calls.get(key, 0) != 1:
            self._add(key, torch.bmm(g.to(wide).mT, x.to(wide)))
            return
        step = max(1, _CHUNK // (g.shape[-1] * x.shape[-1]))
        for some_g, some_x in zip(g.split(step), x.split(step), strict=True):
            square = torch.bmm(some_g.to(wide).mT, some_x.to(wide)).square_().sum(0)
            self._squares[key] = self._squares[key] + square if key in self._squares else square

    def _add(self, key: str, gradient: Tensor) -> None:
        # A shared norm is called more than once; the gradient of a sample is summed over calls before it is squared.
        self._gradients[key] = self._gradients[key] + gradient if key in self._gradients else gradient


@contextmanager
def per_sample(model: nn.Module, names: Iterable[str]) -> Iterator[PerSample]:
    """Inside this context, hooks on the modules that hold these parameters gather per-sample gradients.

    Args:
        model: a model, plain or with adapters. Its parameters should not require gradients, or these are computed too.
        names: names of the parameters in the base model.

    Yields:
        The gathered gradients; `start` must be called before each forward pass.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 1))
        >>> with per_sample(model, ["0.bias"]) as hooks:
        ...     hooks.start(size=3, lengths=())
        ...     model(torch.randn(3, 2)).sum().backward()
        ...     gradients = hooks.gradients()
        >>> gradients["0.bias"].shape
        torch.Size([3, 2])
    """
    hooks = PerSample(model, names)
    called = called_modules(model)
    anchors: dict[torch.device, Tensor] = {}
    handles = []
    try:
        for name in hooks._keys:
            device = next(called[name].parameters()).device
            # A tensor that requires a gradient, so that there is a backward pass through a frozen model.
            anchor = anchors.setdefault(device, torch.zeros((), device=device, requires_grad=True))
            handles.append(called[name].register_forward_hook(hooks.hook(name, anchor), with_kwargs=True))
        yield hooks
    finally:
        for handle in handles:
            handle.remove()


class _Identity(torch.autograd.Function):
    """The identity; its backward pass hands the gradient to `note`.

    The input goes through `save_for_backward`, not a closure, so that gradient checkpointing can free it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, note: Any, *tensors: Tensor) -> Tensor:
        ctx.note = note
        ctx.save_for_backward(*tensors)
        return y.detach()  # not y itself: a view made here could not be written to in place by the next module

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        tensors = ctx.saved_tensors  # read once: recomputed tensors can be read only once
        with torch.no_grad():
            ctx.note(gradient, *tensors)
        return (gradient, *[None] * (2 + len(tensors)))


@dataclass(frozen=True)
class _Aside:
    """Stands for a tensor that autograd keeps."""

    place: int


def _set_aside(value: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    tensors.append(value)
    return _Aside(len(tensors) - 1)


def _put_back(value: Any, tensors: Sequence[Tensor]) -> Any:
    return tensors[value.place] if isinstance(value, _Aside) else value
