"""The Fisher diagonal of chosen parameters: the mean over samples of the squared gradient of each sample's loss.

    F_i = mean over samples x of (d loss(x, y) / d w_i)^2

Gradients are squared per sample, not after averaging over the batch. `kind` selects y: `empirical` takes the labels of
the data, `mc` draws them from the model, `exact` takes the expectation over the model's classes.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_lntune.core.choices import FISHER_KINDS
from peft_lntune.core.module_tree import base_model
from peft_lntune.errors import ConfigError, DataError, UnsupportedError
from peft_lntune.norms.per_sample import PerSample, RowNorms, per_sample
from peft_lntune.selection.losses import LOSS_HEADS, Batch, Head, Loss
from peft_lntune.selection.own_loss import FoundHead, find_head
from peft_lntune.selection.packed import find_packed
from peft_lntune.selection.parameters import find_parameters, generator
from peft_lntune.selection.samples import (
    check_divisible,
    has_attachments,
    lengths_of,
    parts_of,
    rows_of,
    shapes_of,
    size_of,
)
from peft_lntune.selection.scores import register_score

__all__ = [
    "FISHER_KINDS",
    "MAX_CLASSES",
    "FisherState",
    "add_samples",
    "fisher_scores",
    "own_share",
    "several_processes",
]

MAX_CLASSES = 32
"""The exact kind runs one backward pass per class, up to this many."""

# The check of where samples are: weights from 1 to 1/16, so that those of neighbors differ by 4 % among 64 samples; a
# gradient may differ by less. In half precision the roundings of a norm may reach a last digit, which is more.
_SPREAD = 16
_ROWS_APART = 1e-3


@dataclass
class FisherState:
    """Sums over the samples seen so far, to resume a pass or to split it over several processes.

    Attributes:
        first: number of the first sample, where another process scores the samples before it. Drawn labels depend on
            the seed and the number of the sample, not on the process.
        samples: number of samples in the sums; a resumed pass skips as many.
        squares: the summed squares by parameter.

    Example:
        >>> model, x = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)), torch.randn(4, 2)
        >>> def loss(outputs, batch):
        ...     return outputs[:, 0]
        >>> batches = [{"input": row.unsqueeze(0)} for row in x]
        >>> one, two = FisherState(), FisherState(first=2)
        >>> _ = fisher_scores(model, batches[:2], loss=loss, state=one)
        >>> _ = fisher_scores(model, batches[2:], loss=loss, state=two)
        >>> (one + two).samples
        4
    """

    first: int = 0
    samples: int = 0
    squares: dict[str, Tensor] = field(default_factory=dict)

    def scores(self) -> dict[str, Tensor]:
        """The scores so far.

        Returns:
            The mean over samples for each parameter.

        Raises:
            DataError: no sample has been seen.
        """
        if not self.samples:
            raise DataError("no sample has been seen, so there is no score. The batches are empty.")
        return {name: total / self.samples for name, total in self.squares.items()}

    def __add__(self, other: "FisherState") -> "FisherState":
        if self.squares.keys() != other.squares.keys():
            raise ConfigError("these two states hold scores of different parameters, so they cannot be added.")
        squares = {name: total + other.squares[name].to(total.device) for name, total in self.squares.items()}
        return FisherState(min(self.first, other.first), self.samples + other.samples, squares)

    def of_all_processes(self) -> "FisherState":
        """Add the sums of all processes of `torch.distributed`.

        Every process must call this method, also one that has seen no sample.

        Returns:
            The total, the same in all processes; this state itself where there is a single process.

        Raises:
            ConfigError: the processes have scored different parameters.
        """
        if not several_processes():
            return self
        facts = {name: (tuple(total.shape), total.dtype) for name, total in self.squares.items()}
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, (self.samples, facts))
        known = [facts for _, facts in told if facts]
        if any(facts != known[0] for facts in known):
            raise ConfigError("the processes have scored different parameters, so their sums cannot be added.")
        device = next((total.device for total in self.squares.values()), _device())
        squares = {}
        for name, (shape, dtype) in (known[0] if known else {}).items():
            own = self.squares.get(name)
            squares[name] = torch.zeros(shape, dtype=dtype, device=device) if own is None else own.clone()
            dist.all_reduce(squares[name])
        return FisherState(0, sum(samples for samples, _ in told), squares)


def own_share(samples: int) -> tuple[int, int]:
    """The share of samples that this process of `torch.distributed` scores.

    Args:
        samples: number of samples of all processes.

    Returns:
        The number of its first sample, and the number of its samples.

    Example:
        >>> own_share(1024)  # one process
        (0, 1024)
    """
    if not several_processes():
        return 0, samples
    rank, each, rest = dist.get_rank(), *divmod(samples, dist.get_world_size())
    return rank * each + min(rank, rest), each + (rank < rest)


def several_processes() -> bool:
    """Whether `torch.distributed` runs more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> torch.device:
    """The device that `torch.distributed` needs for tensors of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


@register_score("fisher")
def fisher_scores(
    model: nn.Module,
    batches: Iterable[Batch],
    kind: str = "empirical",
    parameters: Iterable[str] | None = None,
    loss: Loss | str | None = None,
    seed: int = 0,
    *,
    num_samples: int | None = None,
    state: FisherState | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Score parameters by Fisher information: exact per-sample scores from one forward and backward pass per batch.

    The model runs in evaluation mode without caches. Its mode, gradients and requires_grad are restored afterwards.
    Parameters of norms and linear modules need one pass per batch, and one more backward pass in the first batch and in
    each with images or audio beside tokens, which checks where each sample's rows are. Parameters of other modules, or
    used outside their module's call, need one backward pass per sample.

    Source: Sung et al. 2021 (FISH mask, arXiv 2111.09839); ValizadehAslani and Liang 2024 (arXiv 2403.20284).

    Args:
        model: any model; a model with adapters is scored with its active adapters.
        batches: dicts of tensors with labels, as a `DataLoader` yields them; batch axis first.
        kind: `"empirical"`, `"mc"` or `"exact"`. The last is for regression and heads of few classes (`MAX_CLASSES`).
        parameters: names in the base model; None: weight and bias of every norm.
        loss: None: the loss of the model's own head; for losses over tokens, the mean over the tokens of each sample.
            Otherwise a key of `peft_lntune.selection.losses.LOSS_HEADS` such as `"causal_lm_sum"`, or a function
            `(outputs, batch) -> (B,)`. Where the model's forward takes no `labels` (diffusion models), only the
            function gets them.
        seed: seed of the labels drawn by `"mc"`.
        num_samples: stop after this many samples; None: use all.
        state: sums of an earlier pass to resume from; updated in place, also if the pass is interrupted.
        progress: show a progress bar where the pass takes longer than a few seconds.

    Returns:
        For each parameter its scores: of its shape, at least 0, in float32 or wider. A parameter on which no loss
        depends has zeros.

    Raises:
        ConfigError: the kind, loss or a parameter is unknown, or the loss does not give one value per sample.
        DataError: there are no batches or labels, rows are packed, a batch cannot be divided into its samples, or a
            loss is not finite.
        UnsupportedError: the model mixes the rows of a batch before a norm, or its head fits no known loss.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> model = BertForSequenceClassification(config)
        >>> batch = {"input_ids": torch.randint(9, (4, 5)), "labels": torch.tensor([0, 1, 1, 0])}
        >>> scores = fisher_scores(model, [batch])
        >>> scores["bert.encoder.layer.0.output.LayerNorm.weight"].shape
        torch.Size([8])
    """
    state = FisherState() if state is None else state
    add_samples(state, model, batches, kind, parameters, loss, seed, num_samples=num_samples, progress=progress)
    return state.scores()


def add_samples(
    state: FisherState,
    model: nn.Module,
    batches: Iterable[Batch],
    kind: str,
    parameters: Iterable[str] | None,
    loss: Loss | str | None,
    seed: int,
    *,
    num_samples: int | None = None,
    progress: bool = True,
) -> None:
    """Add the squared gradients of samples to a state; unlike for `fisher_scores`, there may be no samples.

    Args:
        state: the sums, updated in place.
        model: any model; a model with adapters is scored with its active adapters.
        batches: dicts of tensors with labels; batch axis first.
        kind: `"empirical"`, `"mc"` or `"exact"`.
        parameters: names in the base model; None: weight and bias of every norm.
        loss: None, a key of `LOSS_HEADS`, or a function `(outputs, batch) -> (B,)`.
        seed: seed of the labels drawn by `"mc"`.
        num_samples: stop after this many samples; None: use all.
        progress: show a progress bar where the pass takes longer than a few seconds.

    Raises:
        ConfigError: the kind, loss or a parameter is unknown, or the loss does not give one value per sample.
        DataError: there are no labels, rows are packed, a batch cannot be divided into its samples, or a loss is not
            finite.
        UnsupportedError: the model mixes the rows of a batch before a norm, or its head fits no known loss.
    """
    if kind not in FISHER_KINDS:
        raise ConfigError(f"kind={kind!r}: choose one of {', '.join(map(repr, FISHER_KINDS))}.")
    if isinstance(loss, str) and loss not in LOSS_HEADS:
        raise ConfigError(f"loss={loss!r}: choose one of {', '.join(LOSS_HEADS)}, or pass a function.")
    if callable(loss) and kind != "empirical":
        raise ConfigError(f"kind={kind!r} needs to know what the outputs mean, so loss takes a name, not a function.")
    found = find_parameters(model, parameters)
    away = next((name for name, value in found.items() if value.is_meta), None)
    if away is not None:
        raise UnsupportedError(
            f"{away} is on the meta device, as accelerate leaves the parameters of modules that it offloads, so no "
            "gradient can be compared with it. Compute the scores of a model that is loaded, and set_masks from them."
        )
    with _frozen(model), per_sample(base_model(model), found) as hooks:
        scorer = _Scorer(model, found, hooks, kind, loss, seed)
        for batch, size, divided in _left(batches, state, num_samples, progress):
            with parts_of(batch, divided):
                scorer.add(batch, size, state)


class _Scorer:
    """One pass over batches, with the facts found about the model's head and hooks."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        hooks: PerSample,
        kind: str,
        loss: Loss | str | None,
        seed: int,
    ) -> None:
        self.model, self.parameters, self.hooks, self.kind, self.seed = model, parameters, hooks, kind, seed
        self.device = next(iter(parameters.values())).device
        self.head: Head | None = LOSS_HEADS[loss] if isinstance(loss, str) else None
        self.loss: Loss | None = loss if callable(loss) else None
        self.settled = loss is not None
        config = getattr(model, "config", None)
        self.needs_labels = self.loss is not None or getattr(config, "is_encoder_decoder", False)
        self.takes_labels = _takes(base_model(model), "labels")
        self.checked = self.sorted = False

    def add(self, batch: Batch, size: int, state: FisherState) -> None:
        """Add the squares of one batch to the sums; where this raises, nothing is added."""
        packed = find_packed(batch, size)
        if packed is not None:
            raise DataError(
                f"this batch has packed rows: {packed} shows that a row holds several samples, but Fisher information "
                "squares the gradient of each sample separately. Give one sample per row, with padding (packing=False "
                "and padding_free=False in TRL, DataCollatorWithPadding in transformers)."
            )
        check_divisible(batch, size)
        batch = {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        number = state.first + state.samples
        if not self.settled:
            self.head, self.settled = self._find_head(batch, size)
        if not self.checked:
            self._check_hooks(batch, size, number)
            self.checked = True
        found = self._tapped_squares(batch, size, number, not self.sorted or has_attachments(batch))
        self.sorted |= size > 1
        for sample in range(size) if self.hooks.fallback else ():
            with parts_of(batch, size > 1):
                squares = self._fallback_squares(rows_of(batch, size, sample, sample + 1), number + sample)
            for name, square in squares.items():
                found[name] = found[name] + square if name in found else square
        for name, parameter in self.parameters.items():
            wide = torch.promote_types(parameter.dtype, torch.float32)
            total = state.squares.setdefault(name, torch.zeros_like(parameter, dtype=wide, requires_grad=False))
            if name in found:
                total += found[name].to(total)
        state.samples += size

    def _find_head(self, batch: Batch, size: int) -> FoundHead:
        """Find the model's own loss from one sample."""
        labels = batch.get("labels")
        sample = 0
        if isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point():
            counted = (labels != -100).flatten(1).sum(1)
            sample = int(counted.argmax())  # the possible losses differ most for the sample with the most tokens
        one = rows_of(batch, size, sample, sample + 1)
        self.hooks.start(1, lengths_of(one, 1))
        with (
            _gradients_of({name: self.parameters[name] for name in self.hooks.fallback}),  # a graph without hooks too
            parts_of(batch, size > 1),
        ):
            return find_head(self.model, self.model(**one), one)

    def _losses(self, batch: Batch, size: int, number: int) -> list[tuple[Tensor | None, Tensor]]:
        """The losses `(B,)` for the backward passes, each with the weights of its squares (None: 1)."""
        labels = self.head.labels if self.head is not None and not self.needs_labels else ()
        if self.loss is not None and not self.takes_labels:
            labels = ("labels",)
        outputs = self.model(**{key: value for key, value in batch.items() if key not in labels})
        if self.loss is not None:
            terms: list[tuple[Tensor | None, Tensor]] = [(None, self.loss(outputs, batch))]
        elif self.kind == "exact":
            terms = [*self._expected(outputs)]
        else:
            assert self.head is not None
            if self.kind == "mc":
                generators = [generator(self.seed, number + row) for row in range(size)]
                batch = {**batch, **self.head.draw(outputs, batch, generators)}
            elif not all(name in batch for name in self.head.labels):
                raise DataError(f"a batch lacks {' and '.join(self.head.labels)}: it has {', '.join(batch)}.")
            terms = [(None, self.head.loss(outputs, batch))]
        for _, losses in terms:
            if not isinstance(losses, Tensor) or losses.shape != (size,):
                shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                raise ConfigError(f"loss should return one value per sample, of shape {(size,)}, but returned {shape}.")
            if not losses.isfinite().all():
                row = int((~losses.isfinite()).nonzero()[0])
                raise DataError(
                    f"the loss of sample {number + row} is {losses[row].item()}. Look at its inputs and labels, and at "
                    "the model's outputs for it."
                )
        return terms

    def _expected(self, outputs: Any) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.head is not None
        if self.head.expected is None:
            raise UnsupportedError(
                f'kind="exact" is for heads of few classes and for regression; a {self.head.name} head has too many '
                'outcomes to sum over. Use kind="mc", which draws them.'
            )
        terms = self.head.expected(outputs)
        if len(terms) > MAX_CLASSES:
            raise UnsupportedError(
                f'kind="exact" runs one backward pass per class, and this head has {len(terms)}, above {MAX_CLASSES}. '
                'Use kind="mc", which draws one class per sample.'
            )
        yield from terms

    def _send_back(self, terms: list[tuple[Tensor | None, Tensor]]) -> Iterator[None]:
        """Run the backward pass of each term, with the loss scaled by the root of the weight of its squares."""
        for left, (weights, losses) in zip(range(len(terms) - 1, -1, -1), terms, strict=True):
            if not losses.requires_grad:
                raise UnsupportedError(
                    "the loss depends on no module with a wanted parameter, so nothing can be scored."
                )
            _scaled(weights, losses).sum().backward(retain_graph=left > 0)
            yield

    def _tapped_squares(self, batch: Batch, size: int, number: int, check: bool) -> dict[str, Tensor]:
        if not self.hooks.hooked:
            return {}
        self.hooks.start(size, lengths_of(batch, size))
        found: dict[str, Tensor] = {}
        terms = self._losses(batch, size, number)
        check = size > 1 and (check or self.hooks.unproven)
        losses = _scaled(*terms[0])
        weights = torch.logspace(0, -1, size, _SPREAD, device=losses.device, dtype=losses.dtype)
        with self.hooks.measuring(alone=True) as weighted:
            if check and losses.requires_grad:
                (losses * weights).sum().backward(retain_graph=True)
        with ExitStack() as stack:
            equal = stack.enter_context(self.hooks.measuring(alone=False)) if check else []
            for _ in self._send_back(terms):
                for name, square in self.hooks.squares().items():
                    found[name] = found[name] + square if name in found else square
        self._check_sorted(equal[: len(weighted)], weighted, weights, batch)
        return found

    def _check_sorted(self, equal: list[RowNorms], weighted: list[RowNorms], weights: Tensor, batch: Batch) -> None:
        """Check that each hooked module has the rows of each sample where the hooks look for them.

        With other weights of the losses, the gradient of a sample's rows must change by its own weight.
        """
        dtypes = {weights.dtype, *(call.dtype for call in equal), *(p.dtype for p in self.parameters.values())}
        unit = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
        # A gradient below the rounding of the largest may be zero but for rounding, which follows no weight.
        zero = unit * max((call.norms.max().item() for call in equal), default=0.0)
        for plain, scaled in zip(equal, weighted, strict=True):
            change = (scaled.norms / weights.to(scaled.norms) - plain.norms).abs()
            if (change > zero + max(_ROWS_APART, unit) * plain.norms.max()).any():
                raise DataError(
                    f"at {plain.name} the loss of one sample depends on the rows of another, so there is no gradient "
                    f"per sample: this batch ({shapes_of(batch)}) has another number of images or clips in some "
                    "samples than in others, or the model mixes samples. Give batches of one sample, or leave the "
                    "module out with parameters=."
                )

    def _fallback_squares(self, one: Batch, number: int) -> dict[str, Tensor]:
        """The squares of one sample by an ordinary backward pass."""
        found: dict[str, Tensor] = {}
        with _gradients_of({name: self.parameters[name] for name in self.hooks.fallback}) as gradients:
            self.hooks.start(1, lengths_of(one, 1))
            for _ in self._send_back(self._losses(one, 1, number)):
                for name, gradient in gradients().items():
                    square = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square()
                    found[name] = found[name] + square if name in found else square
        return found

    def _check_hooks(self, batch: Batch, size: int, number: int) -> None:
        """Compare the hooks with autograd on the first sample, in a batch of two where there are two.

        A parameter that the model uses outside its module's call has another gradient in autograd; it then gets one
        backward pass per sample. A loss that depends on the rows of another sample is refused.
        """
        if not self.hooks.hooked:
            return
        pair = min(size, 2)
        some = rows_of(batch, size, 0, pair)
        with (
            _gradients_of({name: self.parameters[name] for name in self.hooks.hooked}) as gradients,
            parts_of(batch, size > 1),
        ):
            self.hooks.start(pair, lengths_of(some, pair), whole=True)
            weights, losses = self._losses(some, pair, number)[0]
            for _ in self._send_back([(weights, losses * torch.eye(pair, device=losses.device)[0])]):
                ours, theirs = self.hooks.gradients(), gradients()
        for name, gradient in ours.items():
            if gradient[1:].any():
                raise UnsupportedError(
                    f"the loss of one sample depends on the rows of another at {name.rpartition('.')[0]}, so there is "
                    "no gradient per sample: the batch axis is not the first there, or samples are mixed. Leave it out "
                    "with parameters=, or give batches of one sample."
                )
        self.hooks.drop(name for name in self.hooks.hooked if not _agree(ours.get(name), theirs.get(name)))


def _takes(model: nn.Module, name: str) -> bool:
    """Whether a model's forward takes an argument of this name."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _scaled(weights: Tensor | None, losses: Tensor) -> Tensor:
    """The losses, scaled by the root of the weight of their squares (None: 1)."""
    return losses if weights is None else losses * weights.detach().sqrt()


def _agree(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if theirs is None or ours is None:
        return (theirs is None or not theirs.any()) and (ours is None or not ours.any())
    tolerance = 0.1 if theirs.dtype.itemsize < 4 else 1e-2  # rounding of sums; a missed use makes a larger difference
    error = (ours[0].double() - theirs.double()).norm()
    return bool(error <= tolerance * theirs.double().norm())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside this context, the model is in evaluation mode, has no cache, and no parameter requires a gradient.

    Caches are off because recurrent models write them in place, which autograd cannot differentiate.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs: dict[int, Any] = {id(c): c for c in (getattr(module, "config", None) for module in model.modules())}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for config in caching:
            config.use_cache = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@contextmanager
def _gradients_of(parameters: Mapping[str, Tensor]) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Inside this context, these parameters get gradients; the yielded function fetches and clears them."""
    own = {name: parameter.grad for name, parameter in parameters.items()}

    def fetch() -> dict[str, Tensor]:
        found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        for parameter in parameters.values():
            parameter.grad = None
        return found

    try:
        for parameter in parameters.values():
            parameter.grad = None
            parameter.requires_grad_(True)
        yield fetch
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = own[name]


def _left(
    batches: Iterable[Batch], state: FisherState, num_samples: int | None, progress: bool
) -> Iterator[tuple[Batch, int, bool]]:
    """The batches that are not in `state` yet, cut to `num_samples` in total: batch, size, and whether it was cut."""
    from tqdm.auto import tqdm

    seen, done = 0, state.samples
    with tqdm(total=num_samples, initial=done, desc="Fisher", unit="sample", delay=3, disable=not progress) as bar:
        for batch in batches:
            if num_samples is not None and seen >= num_samples:
                break
            if not isinstance(batch, Mapping):
                raise DataError(f"a batch should be a dict of tensors, but is {type(batch).__name__}.")
            size = size_of(batch)
            begin = min(size, max(0, done - seen))
            end = size if num_samples is None else min(size, num_samples - seen)
            seen += size
            if begin < end:
                divided = (begin, end) != (0, size)
                if divided:
                    check_divisible(batch, size)
                    batch = rows_of(batch, size, begin, end)
                yield batch, end - begin, divided
                bar.update(end - begin)
