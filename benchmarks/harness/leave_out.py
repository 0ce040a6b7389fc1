"""How useful trained entries are: leave groups of them out, or follow the loss while all of them fade in.

Entries stand in one vector of n values, those of the named tensors one after the other; a group is a bool (n,).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.harness.splits import Batch

Named = dict[str, Tensor]


class Answers(NamedTuple):
    """Mean loss and accuracy over some rows."""

    loss: float
    accuracy: float


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the entries of named tensors in one vector (n,).

    Example:
        >>> flat({"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
        tensor([1., 1., 0.])
    """
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])


def unflat(vector: Tensor, like: Mapping[str, Tensor]) -> Named:
    """Return a vector (n,) as tensors of the names and shapes of `like`; the inverse of `flat`.

    Example:
        >>> unflat(torch.tensor([1.0, 2.0]), {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)})
        {'weight': tensor([[1.]]), 'bias': tensor([2.])}
    """
    parts = vector.split([tensor.numel() for tensor in like.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(like.items(), parts, strict=True)}


@torch.no_grad()
def answers(model: nn.Module, tensors: Mapping[str, Tensor], batches: Iterable[Batch]) -> Answers:
    """Score a classifier in evaluation mode with other parameters in place of its own, which stay as they are.

    Args:
        model: a classifier of transformers.
        tensors: by parameter name; the model's own tensor where none is given.
        batches: with labels.
    """
    model.eval()
    loss, right, rows = 0.0, 0, 0
    for batch in batches:
        outputs = functional_call(model, dict(tensors), kwargs=dict(batch))
        size = len(batch["labels"])
        loss += float(outputs.loss) * size
        right += int((outputs.logits.argmax(-1) == batch["labels"]).sum())
        rows += size
    return Answers(loss / rows, right / rows)


def without(start: Mapping[str, Tensor], end: Mapping[str, Tensor], group: Tensor) -> Named:
    """Return the trained tensors with a group (n,) of their entries set back to its start.

    Example:
        >>> without({"w": torch.zeros(2)}, {"w": torch.ones(2)}, torch.tensor([True, False]))
        {'w': tensor([0., 1.])}
    """
    return {name: torch.where(chosen, start[name], end[name]) for name, chosen in unflat(group, end).items()}


def partition(entries: int, groups: int, generator: torch.Generator) -> Tensor:
    """Return the number of the random group of each entry (n,); sizes differ by one at most.

    Example:
        >>> partition(6, 3, torch.Generator().manual_seed(0)).bincount()
        tensor([2, 2, 2])
    """
    return torch.randperm(entries, generator=generator) % groups


def quantile(scores: Tensor, bins: int) -> Tensor:
    """Return the number of the bin of each entry (n,), 0 for the smallest scores; sizes differ by one at most.

    Example:
        >>> quantile(torch.tensor([0.3, 9.0, 0.1, 2.0]), 2)
        tensor([0, 1, 0, 1])
    """
    ranks = torch.empty(len(scores), dtype=torch.long)
    ranks[scores.argsort(stable=True)] = torch.arange(len(scores))
    return ranks * bins // len(scores)


def usefulness(partitions: Sequence[Tensor], increases: Sequence[Sequence[float]]) -> Tensor:
    """Return for each entry the mean of what leaving out did, over the groups it was in.

    Args:
        partitions: for each, the group of each entry (n,).
        increases: for each partition, the increase in loss without each of its groups.

    Example:
        >>> usefulness([torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])], [[1.0, 3.0], [5.0, 7.0]])
        tensor([3., 4., 5.])
    """
    each = [torch.tensor(found)[groups] for groups, found in zip(partitions, increases, strict=True)]
    return torch.stack(each).mean(0)


def contributions(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    rest: Mapping[str, Tensor],
    batches: Sequence[Batch],
    points: int,
) -> Tensor:
    """Return each entry's share of the loss that all entries together save, by integrated gradients.

        c_i = -(w1_i - w0_i) * integral over t from 0 to 1 of  d loss / d w_i  at  w0 + t (w1 - w0)

    The shares add up to loss(w0) - loss(w1), but for the integral's error: the midpoint rule with `points` points.

    Source: Sundararajan et al. 2017 (arXiv 1703.01365), here of parameters instead of inputs.

    Args:
        model: a classifier of transformers, run in evaluation mode.
        start: w0, named tensors with n entries together.
        end: w1, the tensors after training, by the same names.
        rest: other parameters that replace the model's own.
        batches: with labels; the loss is the mean over their rows.
        points: passes over the batches.

    Returns:
        (n,), positive where moving the entry lowers the loss.
    """
    model.eval()
    step = flat(end) - flat(start)
    rows = sum(len(batch["labels"]) for batch in batches)
    total = torch.zeros_like(step)
    for number in range(points):
        t = (number + 0.5) / points
        here = {name: (value + t * (end[name] - value)).detach().requires_grad_() for name, value in start.items()}
        for batch in batches:
            loss = functional_call(model, {**rest, **here}, kwargs=dict(batch)).loss
            found = torch.autograd.grad(loss, list(here.values()))
            total += flat(dict(zip(here, found, strict=True))) * (len(batch["labels"]) / rows / points)
    return -step * total


def spearman(first: Tensor, second: Tensor) -> float | None:
    """Return the rank correlation of two vectors, equal values sharing their mean rank; None where one is constant.

    Example:
        >>> round(spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.0, 6.0, 5.0])), 6)
        0.5
    """
    ranks = torch.stack([torch.from_numpy(rankdata(values.double().numpy())) for values in (first, second)])
    ranks -= ranks.mean(1, keepdim=True)
    lengths = ranks.norm(dim=1).prod()
    return float((ranks[0] @ ranks[1]) / lengths) if lengths else None
