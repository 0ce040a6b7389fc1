"""Rows of a route by token, for packed rows: several sequences one after the other in one row of a batch.

Collators for packing and engines of continuous batching make such rows. The parameters then follow tokens, not samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_lntune.core.packed_positions import begins_again, of_text
from peft_lntune.errors import RoutingError
from peft_lntune.routing.stacks import NormRows, Stack, spread
from peft_lntune.routing.tokens import TokenFact, axes_of

__all__ = ["PackedRows", "sequences_of", "unpacked"]


class PackedRows:
    """The parameters of each token of packed rows.

    Attributes:
        index: see below.

    Args:
        gathered: rows of effective parameters, `(rows, k, *shape)` each.
        index: which of these rows each token uses, `(B, T)` int64, on the device of the rows; None: there is one row
            per token, in the order of the tokens.
        shape: `(B, T)`.
        facts: where the tokens are in each layer's input; None: not measured.
        shared: parameters that are the same for all tokens, `(1, k, *shape)` each.

    Example:
        >>> packed = PackedRows([Stack(("norm.weight",), torch.tensor([[[1.0]], [[2.0]]]))], torch.tensor([[0, 1, 1]]))
        >>> packed.rows("norm", torch.zeros(1, 3, 1), "norm", -1).weight.flatten()
        tensor([1., 2., 2.])
    """

    def __init__(
        self,
        gathered: Sequence[Stack],
        index: Tensor | None,
        shape: tuple[int, int] | None = None,
        facts: Mapping[str, TokenFact] | None = None,
        shared: Sequence[Stack] = (),
    ) -> None:
        lengths = index.shape if shape is None and index is not None else shape
        assert lengths is not None
        self.batch, self.tokens = lengths
        self.facts, self.index = facts, index
        self._index = None if index is None else index.flatten()
        self._rows, self._shared = spread(gathered), spread(shared)

    def rows(self, owner: str, x: Tensor, label: str, axis: int) -> NormRows:
        """The parameters of one norm, shaped to broadcast over its input.

        Args:
            owner: name under which the stacks hold the norm's parameters.
            x: the norm's input; its leading axes hold the tokens.
            label: name of the norm, for errors.
            axis: -1 where the parameters match the input's last dimensions.

        Returns:
            Weight and bias; None for a parameter that no adapter tunes.

        Raises:
            RoutingError: the place of the tokens in the input is not known, or is not that of the packed rows.
        """
        if axis != -1:
            raise RoutingError(f"{label} normalizes over channels, and packed rows have their tokens there. {_INSTEAD}")
        each, alike = self._rows.get(owner, NormRows()), self._shared.get(owner, NormRows())
        return NormRows(*(self._fitted(own, one, x, label) for own, one in zip(each, alike, strict=True)))

    def _fitted(self, own: Tensor | None, one: Tensor | None, x: Tensor, label: str) -> Tensor | None:
        rows = one if own is None else own
        if rows is None:
            return None
        shape = rows.shape[2 + max(0, rows.dim() - 1 - x.dim()) :]
        leading = x.dim() - len(shape)
        if own is None:
            return rows.reshape(*(1,) * leading, *shape)
        lengths = self._leading(x.shape[:leading], x.shape, label)
        each = rows if self._index is None else rows.index_select(0, self._index)
        return each.reshape(*lengths, *shape)

    def _leading(self, leading: Sequence[int], shape: Sequence[int], label: str) -> list[int]:
        """The leading lengths of the parameters: those of the axes of rows and tokens, and 1 elsewhere."""
        place = self._axis(leading, shape, label)
        lengths = [1] * len(leading)
        if place == 0:
            lengths[0] = self.batch * self.tokens
        else:
            lengths[0], lengths[place] = self.batch, self.tokens
        return lengths

    def _axis(self, leading: Sequence[int], shape: Sequence[int], label: str) -> int:
        places = axes_of(leading, self.batch, self.tokens)
        if self.facts is not None:
            fact = self.facts.get(label, TokenFact(refused="it was not called when the model was measured"))
            if fact.refused:
                raise RoutingError(f"packed rows cannot be routed in {label}: {fact.refused}. {_INSTEAD}")
            places = [fact.axis] if fact.axis in places else []
        if len(places) != 1:
            raise RoutingError(
                f"the input of {label} has the shape {tuple(shape)}, in which the place of {self.tokens} tokens in "
                f"{self.batch} packed rows is not certain. {_INSTEAD}"
            )
        return places[0]


_INSTEAD = "Give batches with one sequence per row, padded."


def sequences_of(named: Mapping[str, Any]) -> Tensor | None:
    """The number of the sequence that each token of packed rows belongs to.

    Args:
        named: arguments of a model's call: `position_ids` that begin again in a row, or `cu_seq_lens_q`.

    Returns:
        `(B, T)` int64, counted on from row to row; None where the rows are not packed.

    Raises:
        RoutingError: the two arguments contradict each other.

    Example:
        >>> sequences_of({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])})
        tensor([[0, 0, 0, 1, 1]])
    """
    positions, lengths = named.get("position_ids"), named.get("cu_seq_lens_q")
    by_position = by_length = None
    if isinstance(positions, Tensor):
        positions = of_text(positions)
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1]:
        # A jump of any size begins a sequence, as in the masks of transformers.
        begins = positions.diff(dim=-1) != 1
    elif isinstance(positions, Tensor) and positions.dim() == 3 and (again := begins_again(positions)) is not None:
        begins = again[:, 1:]
    else:
        begins = None
    if begins is not None:
        begins = torch.cat([begins.new_ones(len(begins), 1), begins], dim=1).long()
        by_position = begins.flatten().cumsum(0).sub(1).reshape(begins.shape)
    if isinstance(lengths, Tensor) and lengths.dim() == 1 and len(lengths) > 1:
        by_length = torch.repeat_interleave(lengths.diff().long())[None].to(lengths.device)
    if by_position is not None and by_length is not None and not torch.equal(by_position, by_length.to(by_position)):
        raise RoutingError(
            "position_ids and cu_seq_lens_q of these packed rows name different sequences. Give the two as one "
            "collator makes them (DataCollatorWithFlattening)."
        )
    return by_length if by_position is None else by_position


def unpacked(value: Any, sequences: Tensor, fill: Mapping[str, int], name: str = "") -> Any:
    """Give each sequence of packed rows a row of its own, padded at its end.

    Args:
        value: a tensor, or a mapping of tensors, of a model's outputs or of a batch.
        sequences: from `sequences_of`, `(B, T)`.
        fill: values for the padding by the tensor's name; 0 for others.
        name: name of the value.

    Returns:
        The value with `(sequences, longest, ...)` in place of `(B, T, ...)`; other tensors are left out.

    Example:
        >>> unpacked({"labels": torch.tensor([[5, 6, 7]])}, torch.tensor([[0, 0, 1]]), {"labels": -100})
        {'labels': tensor([[   5,    6],
                [   7, -100]])}
    """
    if isinstance(value, Mapping):
        found = {key: unpacked(each, sequences, fill, key) for key, each in value.items()}
        return {key: each for key, each in found.items() if each is not None}
    if not isinstance(value, Tensor) or value.shape[:2] != sequences.shape:
        return None
    flat = sequences.flatten().to(value.device)
    lengths = flat.bincount()
    begins = lengths.cumsum(0) - lengths
    rows = value.new_full((len(lengths), int(lengths.max()), *value.shape[2:]), fill.get(name, 0))
    place = torch.arange(len(flat), device=flat.device) - begins[flat]
    return rows.index_put((flat, place), value.flatten(0, 1))
