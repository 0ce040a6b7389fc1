"""Supermasks: which entries of a frozen parameter are switched off, learned with one score per entry.

effective = base where keep, else 0          keep = Bernoulli(sigmoid(score)) in training, score > 0 otherwise
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.core.delta import ParameterSlice, never_narrowed, pack_bits, unpack_bits
from peft_lntune.core.override import runs_own_forward
from peft_lntune.core.rebuild import is_plain

__all__ = ["Supermask", "initial_scores", "kept", "masked", "smallest"]


def smallest(values: Tensor, count: int) -> Tensor:
    """Choose the entries of smallest magnitude; of equal entries the first ones.

    Args:
        values: a tensor of any shape.
        count: number of entries to choose.

    Returns:
        A bool mask of the shape of `values`.

    Example:
        >>> smallest(torch.tensor([3.0, -1.0, 2.0, 1.0]), 1)
        tensor([False,  True, False, False])
    """
    size = values.detach().abs().reshape(-1)
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    # A threshold and a count of ties, since sorting all entries is several times slower. Outside the CPU, kthvalue
    # raises under torch.use_deterministic_algorithms, because of its indices.
    bound = size.kthvalue(count).values if size.device.type == "cpu" else size.sort().values[count - 1]
    chosen = size < bound
    ties = (size == bound).nonzero().reshape(-1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.view(values.shape)


def initial_scores(base: Tensor, sparsity: float, score: float) -> Tensor:
    """Initial scores of a mask that switches off the smallest entries: `-score` for these, `score` for all others.

    Args:
        base: the parameter, of any shape.
        sparsity: fraction of its entries that are off at the start.
        score: confidence of the start; `sigmoid(score)` is the probability that an entry keeps its state.

    Returns:
        float32, of the shape of `base`.

    Example:
        >>> initial_scores(torch.tensor([0.1, -2.0, 0.3, 4.0]), sparsity=0.5, score=5.0)
        tensor([-5.,  5., -5.,  5.])
    """
    off = smallest(base, round(sparsity * base.numel()))
    return torch.full(base.shape, score, dtype=torch.float32, device=base.device).masked_fill_(off, -score)


def kept(scores: Tensor) -> Tensor:
    """The mask of given scores outside training: bool, True where the entry stays."""
    return scores > 0


def masked(base: Tensor, scores: Tensor, keep: Tensor) -> Tensor:
    """The entries of `base` that a mask keeps, zero elsewhere, with a straight-through gradient to the scores.

    In the backward pass the mask is replaced by its probability `p = sigmoid(scores)`, so
    `d/d scores = d/d effective * base * p * (1 - p)`. The backward pass needs no memory beyond the arguments.

    Args:
        base: the parameter, of any shape.
        scores: one score per entry, of the shape of `base`.
        keep: bool, of the shape of `base`, True where the entry stays.

    Returns:
        A new tensor of the dtype of `base`.

    Source: Bengio et al. 2013 (arXiv 1308.3432), the estimator; Radiya-Dixit and Wang 2020 (arXiv 2004.14129).

    Example:
        >>> scores = torch.zeros(2, requires_grad=True)
        >>> masked(torch.tensor([1.0, 8.0]), scores, torch.tensor([True, False])).sum().backward()
        >>> scores.grad
        tensor([0.2500, 2.0000])
    """
    result: Tensor = _StraightThrough.apply(base, scores, keep)
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, scores: Tensor, keep: Tensor) -> Tensor:
        # The mask is needed only where the base has a gradient, because another mask in training computed it.
        ctx.save_for_backward(base, scores, keep if ctx.needs_input_grad[0] else None)
        return torch.where(keep, base, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        base, scores, keep = ctx.saved_tensors
        of_base = torch.where(keep, gradient, 0) if ctx.needs_input_grad[0] else None
        of_scores = None
        if ctx.needs_input_grad[1]:
            # In the dtype of the scores: in float16 the product of two small numbers is zero.
            wide = gradient.to(scores.dtype) * base
            of_scores = torch.ops.aten.sigmoid_backward(wide, scores.sigmoid()).to(scores.dtype)
        return of_base, of_scores, None


class Supermask(nn.Module):
    """A mask over one base parameter; its forward turns the base into the effective parameter.

    It holds either `weight`, the trainable scores, or `keep`, the mask itself at one bit per entry, which suffices for
    serving. In training mode the mask is drawn again in every call, by torch's global generator like dropout, so a seed
    or a restored generator reproduces it.

    Source: Radiya-Dixit and Wang 2020 (arXiv 2004.14129).

    Args:
        base: the parameter.
        sparsity: fraction of its entries that are off at the start, the smallest first.
        score: confidence of the start; `sigmoid(score)` is the probability that an entry keeps its state.
        dtype: dtype of the scores.
        trained: whether there are scores.
        block: the part of the parameter to mask, if not all of it; the scores have its shape.
        blank: skip the ranking, because values will be loaded.

    Example:
        >>> mask = Supermask(torch.tensor([0.1, -2.0]), sparsity=0.5).eval()
        >>> mask(torch.tensor([0.1, -2.0])).tolist()
        [0.0, -2.0]
    """

    weight: nn.Parameter | None
    keep: Tensor | None

    def __init__(
        self,
        base: Tensor,
        sparsity: float = 0.0,
        score: float = 5.0,
        dtype: torch.dtype = torch.float32,
        trained: bool = True,
        block: ParameterSlice | None = None,
        blank: bool = False,
    ) -> None:
        super().__init__()
        part = (base if block is None else block.of(base)).detach()
        self.shape = base.shape
        self.block = block
        self.sparsity, self.score = sparsity, score
        self.sampling = False
        blank = blank or base.is_meta  # there are no values to rank
        scores = torch.zeros_like(part, dtype=dtype) if blank else self.start(part).to(dtype)
        self.weight = nn.Parameter(scores) if trained else None
        self.register_buffer("keep", None if trained else pack_bits(kept(scores)))

    @property
    def drawn(self) -> bool:
        """Whether the next call draws a random mask."""
        return self.weight is not None and (self.training or self.sampling)

    @property
    def stored(self) -> str:
        """Name of the tensor that stores the mask."""
        return "keep" if self.weight is None else "weight"

    @property
    def part_shape(self) -> torch.Size:
        """Shape of the scores."""
        return self.shape if self.block is None else self.block.shape_in(self.shape)

    def mask(self) -> Tensor:
        """The mask outside training: bool, of the shape of the scores."""
        if self.weight is not None:
            return kept(self.weight.detach())
        assert self.keep is not None
        return unpack_bits(self.keep, self.part_shape)

    def start(self, part: Tensor) -> Tensor:
        """The initial scores of a mask over `part`, which has the shape of the scores."""
        return initial_scores(part, self.sparsity, self.score)

    def forward(self, base: Tensor) -> Tensor:
        return self._apply_to(base, self._draw() if self.drawn else self.mask())

    def with_rebuild(self, base: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """The effective parameter, and a function that recomputes its values from the base in a backward pass.

        The function holds the mask of this call, at one bit per entry.

        Args:
            base: the base parameter.

        Returns:
            The parameter and the function; None for the function where the scores may be sharded or the mask has hooks.
        """
        if type(self) is not Supermask or not runs_own_forward(self) or not is_plain(self, "weight"):
            return self(base), None
        keep = self._draw() if self.drawn else self.mask()
        value, bits, shape = self._apply_to(base, keep), pack_bits(keep), keep.shape
        return value, lambda base: self._put(base, torch.where(unpack_bits(bits, shape), self._part(base), 0))

    def merged_value(self, base: Tensor) -> Tensor:
        """The effective parameter that merging writes, by the mask outside training whatever the mode."""
        return self._apply_to(base, self.mask())

    def _draw(self) -> Tensor:
        assert self.weight is not None
        return torch.bernoulli(self.weight.detach().sigmoid()).bool()

    def _apply_to(self, base: Tensor, keep: Tensor) -> Tensor:
        part = self._part(base)
        return self._put(base, torch.where(keep, part, 0) if self.weight is None else masked(part, self.weight, keep))

    def _part(self, base: Tensor) -> Tensor:
        return base if self.block is None else self.block.of(base)

    def _put(self, base: Tensor, part: Tensor) -> Tensor:
        return part if self.block is None else self.block.put(base, part)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Supermask":
        return super()._apply(never_narrowed(fn), recurse)

    def extra_repr(self) -> str:
        return f"{tuple(self.part_shape)}, {'bits' if self.weight is None else 'scores'}"
