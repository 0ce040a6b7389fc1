"""Parameter groups of an optimizer, from tensors that say what they are."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from peft_lntune.errors import ConfigError

__all__ = ["HEAD", "Member", "group_members"]

HEAD = "head"
"""The name of the group of heads."""


class Member(NamedTuple):
    """A tensor to train, and what it is.

    Attributes:
        name: for errors.
        tensor: the tensor; one that is listed several times is trained once.
        group: name of its group, such as `"ln.weight"`.
        decays: whether weight decay applies to it.
    """

    name: str
    tensor: Tensor
    group: str
    decays: bool = False


def group_members(
    members: Iterable[Member], rates: Mapping[str, float | None], weight_decay: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Put each tensor into one group per name and weight decay.

    Args:
        members: the tensors to train.
        rates: learning rate of each group by name, in the order of the result; None: that of the optimizer.
        weight_decay: weight decay of the members of each group that decay; None: that of the optimizer. The other
            members have 0.

    Returns:
        Groups for an optimizer, with `params`, `name`, `weight_decay` and `lr`. Where some members of a name decay and
        some do not, the second group is called `<name> (no decay)`. Empty groups are left out.

    Raises:
        ConfigError: one tensor is in two groups that treat it differently.

    Example:
        >>> import torch
        >>> gain, head = torch.ones(2), torch.ones(3)
        >>> groups = group_members(
        ...     [Member("norm", gain, "ln.weight"), Member("head", head, "head", decays=True)],
        ...     {"ln.weight": 1e-3, "head": 5e-3},
        ...     {"ln.weight": 0.0, "head": 0.1},
        ... )
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
        [('ln.weight', 0.001, 0.0), ('head', 0.005, 0.1)]
    """
    placed: dict[int, Member] = {}
    for member in members:
        known = placed.setdefault(id(member.tensor), member)
        ways = {
            (rates[each.group], weight_decay[each.group] if each.decays else 0.0, each.decays)
            for each in (known, member)
        }
        if len(ways) > 1:
            raise ConfigError(
                f"{known.name} (group {known.group!r}) and {member.name} (group {member.group!r}) are one parameter, "
                "and the two groups treat it differently. Give both the same learning rate and weight decay, or untie "
                "them (for a language model, load with tie_word_embeddings=False)."
            )
    found: list[dict[str, Any]] = []
    for name, rate in rates.items():
        by_decay = {
            decays: [m.tensor for m in placed.values() if (m.group, m.decays) == (name, decays)]
            for decays in (True, False)
        }
        both = all(by_decay.values())
        for decays, tensors in by_decay.items():
            decay = weight_decay[name] if decays else 0.0
            group = {
                "params": tensors,
                "name": f"{name} (no decay)" if both and not decays else name,
                **({} if rate is None else {"lr": rate}),
                **({} if decay is None else {"weight_decay": decay}),
            }
            found += [group] if tensors else []
    return found
