"""Key/value prefixes: columns that stand to the left of the keys of an attention, and what follows for its masks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Prefix", "join", "widen_bias", "widen_mask"]


def join(key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> tuple[Tensor, Tensor]:
    """Put a prefix to the left of keys and values.

    They are joined as attention sees them, after position embeddings and norms of the keys, so a prefix has no
    position and shifts none.

    Args:
        key: `(B, H, S, hd)`.
        value: `(B, H, S, hd)`.
        prefix_key: `(P, H, hd)`, the same for all samples, or `(B, P, H, hd)`.
        prefix_value: as `prefix_key`.

    Returns:
        Keys and values, each `(B, H, P + S, hd)`, in the dtypes of `key` and `value`.

    Example:
        >>> own, prefix = torch.zeros(2, 1, 3, 4), torch.ones(5, 1, 4)
        >>> key, value = join(own, own, prefix, prefix)
        >>> key.shape, value[0, 0, :, 0].tolist()
        (torch.Size([2, 1, 8, 4]), [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    """
    return _joined(key, prefix_key), _joined(value, prefix_value)


def _joined(tensor: Tensor, prefix: Tensor) -> Tensor:
    prefix = prefix.to(tensor.dtype).transpose(-2, -3)
    if prefix.dim() == 3:
        prefix = prefix.unsqueeze(0)
    batch = max(tensor.shape[0], prefix.shape[0])
    return torch.cat([prefix.expand(batch, -1, -1, -1), tensor.expand(batch, -1, -1, -1)], dim=2)


def widen_mask(
    mask: Tensor | None,
    columns: int,
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    keep: Tensor | None = None,
    dtype: torch.dtype = torch.bool,
    device: torch.device | None = None,
) -> Tensor | None:
    """Extend an attention mask by the columns of a prefix, which every query sees.

    Args:
        mask: None; `(B, S)`, which tokens are there; or `(B or 1, H or 1, T, S)`, bool (True is seen) or floating (it
            is added to the scores). It may be longer than the keys, as caches of a fixed size make it: it is cut.
        columns: P, the number of prefix columns.
        queries: T.
        keys: S, the number of keys without the prefix.
        causal: whether query i sees the keys up to i only, where there is no mask that says so.
        keep: `(B, P)` or `(1, P)` bool, which columns a sample sees; None: all. So shorter prefixes share a batch.
        dtype: of a mask that is made because there was none: bool, or a floating one.
        device: of a mask that is made.

    Returns:
        The mask with P columns more on its left, in the dtype it had; None where none is needed.

    Example:
        >>> widen_mask(None, 1, 2, 2, causal=True).int().tolist()
        [[[[1, 1, 0], [1, 1, 1]]]]
        >>> widen_mask(torch.tensor([[0, 1]]), 2, 2, 2).tolist()
        [[1, 1, 0, 1]]
    """
    causal = causal and queries > 1
    if mask is None:
        if not causal and keep is None:
            return None
        device = device if keep is None else keep.device
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
        mask = _as_mask(seen.tril() if causal else seen, dtype)[None, None]
    mask = mask[..., :keys]
    shown = torch.ones(1, columns, dtype=torch.bool, device=mask.device) if keep is None else keep.to(mask.device)
    left = _as_mask(shown, mask.dtype)
    if mask.dim() > 2:
        left = left[:, None, None, :]
    batch = max(left.shape[0], mask.shape[0])
    size = (batch, *mask.shape[1:-1])
    return torch.cat([left.expand(*size, -1), mask.expand(*size, -1)], dim=-1)


def _as_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is seen, as a mask of `dtype`: 0 and minus infinity where it is floating, else True or 1 and not.

    Masks of models hide by the lowest number, so where all tokens of a row are hidden (it is padding), they share it.
    Minus infinity keeps a hidden prefix out of that too. There is always a token beside it, so no row is all infinite.
    """
    if not dtype.is_floating_point:
        return seen.to(dtype)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


def widen_bias(bias: Tensor, columns: int, keys: int) -> Tensor:
    """Extend a position bias `(B or 1, H, T, S)`, as T5 adds it to its scores, by zeros for the prefix columns.

    Example:
        >>> widen_bias(torch.ones(1, 1, 1, 2), columns=1, keys=2).tolist()
        [[[[0.0, 1.0, 1.0]]]]
    """
    return F.pad(bias[..., :keys], (columns, 0))


class Prefix(nn.Module):
    """The keys and values of one prefix at one attention, one tensor `weight` of shape `(2, P, H * hd)`.

    With `hidden`, they come from a small network while they are trained, and `fold_` leaves the plain tensor:

        prefix = up(tanh(down(embedding)))        (P, e) -> (P, hidden) -> (P, 2 * H * hd)

    Both start with values of spread `std`. The field mostly starts plain prefixes from a spread of 1, which needs the
    network to train stably. At 0.02, as models initialize their own weights, the new keys score near zero and the new
    values add next to nothing, so the start is close to the base. It is not the base: a prefix always takes part of the
    attention from the tokens, so no value of it is the identity.

    Source: Li and Liang 2021 (arXiv 2101.00190), prefixes and the network that is folded away.

    Args:
        columns: P, the number of virtual tokens.
        width: H * hd, over the key heads.
        hidden: size of the network's hidden layer; None: no network.
        std: spread of the first values.
        dtype: of the parameters.
        device: of the parameters.

    Example:
        >>> prefix = Prefix(columns=3, width=8, hidden=16)
        >>> before = prefix()
        >>> prefix.fold_()
        >>> [name for name, _ in prefix.named_parameters()], torch.equal(prefix.weight, before)
        (['weight'], True)
    """

    weight: nn.Parameter | None
    embedding: nn.Parameter
    down: nn.Linear
    up: nn.Linear

    def __init__(
        self,
        columns: int,
        width: int,
        hidden: int | None = None,
        std: float = 0.02,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.columns = columns
        self.width = width
        if hidden is None:
            self.weight = nn.Parameter(torch.empty(2, columns, width, dtype=dtype, device=device))
            nn.init.normal_(self.weight, std=std)
            return
        self.register_parameter("weight", None)
        self.embedding = nn.Parameter(torch.empty(columns, width, dtype=dtype, device=device))
        self.down = nn.Linear(width, hidden, dtype=dtype, device=device)
        self.up = nn.Linear(hidden, 2 * width, dtype=dtype, device=device)
        nn.init.normal_(self.embedding)
        # tanh gives values of size 1 at most, and `hidden` of them are summed.
        nn.init.normal_(self.up.weight, std=std / hidden**0.5)
        nn.init.zeros_(self.up.bias)

    def forward(self) -> Tensor:
        """Keys and values, `(2, P, H * hd)`; with gradients to whatever they come from.

        A copy, made in a call of the module: FSDP has a parameter together, and its memory, for that long.
        """
        if self.weight is not None:
            return self.weight.clone()
        both = self.up(torch.tanh(self.down(self.embedding)))
        return both.view(self.columns, 2, self.width).transpose(0, 1)

    def fold_(self) -> None:
        """Leave the plain tensor in place of the network. It is a new parameter, so make the optimizer afterwards."""
        if self.weight is not None:
            return
        with torch.no_grad():
            values = self().contiguous()
        self.weight = nn.Parameter(values, requires_grad=self.embedding.requires_grad)
        for name in ("embedding", "down", "up"):
            delattr(self, name)

    def extra_repr(self) -> str:
        return f"columns={self.columns}, width={self.width}"
