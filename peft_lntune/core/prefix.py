"""Key/value prefixes: columns to the left of an attention's keys and values, and the masks that go with them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Prefix", "join", "widen_bias", "widen_mask"]


def join(key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> tuple[Tensor, Tensor]:
    """Put a prefix to the left of keys and values.

    They are joined after position embeddings and norms of the keys, so a prefix has no position and does not shift the
    positions of tokens.

    Source: Li and Liang 2021 (arXiv 2101.00190).

    Args:
        key: `(B, H, S, hd)`.
        value: `(B, H, S, hd)`.
        prefix_key: `(P, H, hd)`, the same for all samples, or `(B, P, H, hd)`.
        prefix_value: of the shape of `prefix_key`.

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
        mask: None; `(B, S)`, True or 1 for tokens that are not padding; or `(B or 1, H or 1, T, S)`, bool (True: seen)
            or floating (added to the scores). A mask longer than the keys, as caches of a fixed size make it, is cut.
        columns: P, the number of prefix columns.
        queries: T, the number of queries.
        keys: S, the number of keys without the prefix.
        causal: without a mask, whether query i sees only the keys up to i.
        keep: `(B, P)` or `(1, P)` bool, which columns each sample sees; None: all. Lets prefixes of different lengths
            share a batch.
        dtype: dtype of a new mask where `mask` is None: bool or floating.
        device: device of a new mask.

    Returns:
        The mask with P more columns on its left, in its own dtype; None where no mask is needed.

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
    """A bool mask (True: seen) as a mask of `dtype`; where that is floating, 0 for seen and minus infinity for hidden.

    Models hide tokens with the lowest finite number, so the hidden tokens of a padding row share its attention. Minus
    infinity keeps a hidden prefix out of that. Every row has at least one token, so no row is all infinite.
    """
    if not dtype.is_floating_point:
        return seen.to(dtype)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


def widen_bias(bias: Tensor, columns: int, keys: int) -> Tensor:
    """Extend a position bias, which T5 adds to its scores, by zeros for the prefix columns.

    Args:
        bias: `(B or 1, H, T, S)`.
        columns: P, the number of prefix columns.
        keys: S, the number of keys without the prefix; a longer bias is cut.

    Returns:
        `(B or 1, H, T, P + S)`.

    Example:
        >>> widen_bias(torch.ones(1, 1, 1, 2), columns=1, keys=2).tolist()
        [[[[0.0, 1.0, 1.0]]]]
    """
    return F.pad(bias[..., :keys], (columns, 0))


class Prefix(nn.Module):
    """The keys and values of one prefix at one attention, one tensor `weight` of shape `(2, P, H * hd)`.

    With `hidden`, a small network computes them during training, and `fold_` replaces it by the plain tensor:

        prefix = up(tanh(down(embedding)))        (P, e) -> (P, hidden) -> (P, 2 * H * hd)

    Both start with values of standard deviation `std`. Published code mostly starts plain prefixes from 1, which needs
    the network to train stably. At 0.02, at which models initialize their own weights, the new keys score near zero and
    the new values add little, so the start is close to the base model. It is not equal: a prefix always takes some
    attention from the tokens, so no prefix is the identity.

    Source: Li and Liang 2021 (arXiv 2101.00190), prefixes and the network that is folded away.

    Args:
        columns: P, the number of virtual tokens.
        width: H * hd, over the key heads.
        hidden: size of the network's hidden layer; None: no network.
        std: standard deviation of the initial values.
        dtype: dtype of the parameters.
        device: device of the parameters.

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
        # tanh gives values of at most 1, and `hidden` of them are summed.
        nn.init.normal_(self.up.weight, std=std / hidden**0.5)
        nn.init.zeros_(self.up.bias)

    def forward(self) -> Tensor:
        """Keys and values, `(2, P, H * hd)`, with gradients to the parameters.

        The result is a copy, because FSDP keeps a gathered parameter only during the call of its module.
        """
        if self.weight is not None:
            return self.weight.clone()
        both = self.up(torch.tanh(self.down(self.embedding)))
        return both.view(self.columns, 2, self.width).transpose(0, 1)

    def fold_(self) -> None:
        """Replace the network by the plain tensor. It is a new parameter, so make the optimizer afterwards."""
        if self.weight is not None:
            return
        with torch.no_grad():
            values = self().contiguous()
        self.weight = nn.Parameter(values, requires_grad=self.embedding.requires_grad)
        for name in ("embedding", "down", "up"):
            delattr(self, name)

    def extra_repr(self) -> str:
        return f"columns={self.columns}, width={self.width}"
