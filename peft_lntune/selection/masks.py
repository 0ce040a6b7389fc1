"""Combine, measure, compare and check masks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peft_lntune.errors import ConfigError

__all__ = ["check_alike", "check_bool", "check_masks", "combine_masks", "mask_density", "mask_overlap"]


def combine_masks(
    masks: Sequence[Mapping[str, Tensor]], how: str = "union", at_least: int | None = None
) -> dict[str, Tensor]:
    """Combine the masks of several tasks.

    Args:
        masks: one set of bool masks per task, all of the same parameters.
        how: `"union"` (chosen by any task), `"intersection"` (by all tasks), or `"vote"` (by `at_least` tasks).
        at_least: for `"vote"`: number of tasks, from 1 to the number of sets.

    Returns:
        The combined bool masks by parameter.

    Raises:
        ConfigError: there are no masks, parameters or shapes differ, `how` is unknown, or `at_least` is out of range.

    Example:
        >>> one, two = {"w": torch.tensor([True, False, True])}, {"w": torch.tensor([True, True, False])}
        >>> combine_masks([one, two])["w"].tolist(), combine_masks([one, two], "intersection")["w"].tolist()
        ([True, True, True], [True, False, False])
    """
    votes = {"union": 1, "intersection": len(masks), "vote": at_least}
    if not masks:
        raise ConfigError("there are no masks to combine.")
    if how not in votes:
        raise ConfigError(f"how={how!r}: choose one of {', '.join(map(repr, votes))}.")
    if (how == "vote") != (at_least is not None):
        raise ConfigError(f'how={how!r} with at_least={at_least}: at_least belongs to how="vote", which needs it.')
    needed = votes[how]
    if needed is None or not 1 <= needed <= len(masks):
        raise ConfigError(f"at_least={at_least} should be from 1 to {len(masks)}, the number of masks.")
    for other in masks[1:]:
        check_alike(masks[0], other)
    return {
        name: torch.stack([one[name].to(first.device) for one in masks]).sum(0) >= needed
        for name, first in masks[0].items()
    }


def mask_density(masks: Mapping[str, Tensor]) -> float:
    """The fraction of entries that masks choose.

    Args:
        masks: bool masks by parameter.

    Returns:
        The fraction, from 0 to 1.

    Example:
        >>> mask_density({"w": torch.tensor([True, False]), "b": torch.tensor([False, False])})
        0.25
    """
    return sum(int(mask.sum()) for mask in masks.values()) / max(1, sum(mask.numel() for mask in masks.values()))


def mask_overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The Jaccard index of two sets of masks: entries in both, divided by entries in either.

    Args:
        a: bool masks by parameter.
        b: bool masks of the same parameters.

    Returns:
        The index, from 0 to 1; 1 where both are empty.

    Raises:
        ConfigError: parameters or shapes differ.

    Example:
        >>> mask_overlap({"w": torch.tensor([True, True, False])}, {"w": torch.tensor([True, False, False])})
        0.5
    """
    check_alike(a, b)
    both = sum(int((a[name] & b[name].to(a[name].device)).sum()) for name in a)
    either = sum(int((a[name] | b[name].to(a[name].device)).sum()) for name in a)
    return both / either if either else 1.0


def check_masks(masks: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], what: str) -> None:
    """Check that masks are bool tensors of given shapes and choose at least one entry.

    Args:
        masks: masks by parameter.
        shapes: shapes of all parameters that can be masked; for a plain model
            `{name: p.shape for name, p in model.named_parameters()}`.
        what: owner of the parameters, for the message.

    Raises:
        ConfigError: a name or shape does not fit, a mask is not bool, or no entry is chosen.

    Example:
        >>> check_masks({"w": torch.tensor([True])}, {"w": torch.Size([1])}, "the model")
    """
    unknown = sorted(masks.keys() - shapes.keys())
    if unknown:
        raise ConfigError(
            f"masks name {unknown[0]!r} (and {len(unknown) - 1} more), which {what} does not tune. "
            f"It tunes: {', '.join(shapes)}."
        )
    for name, mask in masks.items():
        if mask.dtype != torch.bool or mask.shape != shapes[name]:
            raise ConfigError(
                f"the mask of {name} should be a bool tensor of shape {tuple(shapes[name])}, but is {mask.dtype} "
                f"of shape {tuple(mask.shape)}."
            )
    if not any(mask.any() for mask in masks.values()):
        raise ConfigError("the masks choose no entry at all, so there would be nothing to train.")


def check_bool(masks: Mapping[str, Tensor], what: str) -> None:
    """Check that masks are bool tensors.

    Args:
        masks: masks by parameter.
        what: owner of the masks, for the message.

    Raises:
        ConfigError: a mask is not bool.
    """
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ConfigError(f"{what}: the mask of {name} should be a bool tensor, but is {mask.dtype}.")


def check_alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Check that two sets of masks have the same parameters and shapes.

    Args:
        a: masks by parameter.
        b: masks by parameter.

    Raises:
        ConfigError: parameters or shapes differ; the message names the first.
    """
    differing = sorted(a.keys() ^ b.keys()) or [name for name in a if a[name].shape != b[name].shape]
    if differing:
        raise ConfigError(
            f"masks of the same parameters are needed, but {differing[0]} (and {len(differing) - 1} more) is missing "
            "in one of them or has another shape. They were made for different models or configs."
        )
