"""Looks at single steps of a training run, and only at its norms."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.doctor.movement import can_move, movement_between, shrinks_alike, spacing
from peft_lntune.doctor.optimizers import Group, Holdings, has_master, holdings
from peft_lntune.doctor.places import NormParameter, local, norm_parameters
from peft_lntune.doctor.records import Record, diagnose
from peft_lntune.doctor.report import Report

__all__ = ["NormWatch"]

_NO_GROUP = Group(None, None, 0.0, 0.0, 0.0, False)
_FACTS = ("missing", "zero", "nonfinite", "skipped", "reset", "gradient", "moved_in_a_step", "surprising")


class NormWatch:
    """Looks at the norms of a model before and after some steps of its optimizer, in a training loop of your own.

    Call `before_step` when the gradients are complete (unscaled and clipped) and `after_step` when the optimizer has
    stepped, at a few steps of the run, the first among them. A look copies the values and gradients of the norms, and
    nothing else; the steps in between cost nothing.

    Args:
        model: a plain model or a `PeftModel`. It is not run or changed.
        optimizer: the optimizer that trains it.
        expect: which norms are to be trained: True for all, or a regular expression that is searched in the names of
            their parameters. Those that are frozen are then a fault. None: a frozen norm is taken to be frozen on
            purpose, unless the optimizer holds it or the active adapter brings it.
        max_grad_norm: to what gradients are clipped, if they are; tells strong clipping from vanishing gradients.

    Attributes:
        looks: number of finished looks.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
        >>> watch = NormWatch(model, optimizer)
        >>> for _ in range(3):
        ...     model(torch.randn(2, 4)).square().sum().backward()
        ...     watch.before_step()
        ...     optimizer.step()
        ...     watch.after_step()
        >>> [finding.kind for finding in watch.report().findings]
        ['not_in_optimizer']
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        expect: str | bool | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._expected = re.compile("" if expect is True else expect) if expect else None
        self._max_grad_norm = max_grad_norm or None
        self.looks = 0
        self._open()

    def _open(self) -> None:
        """Find the norms and keep their values."""
        self.parameters = norm_parameters(self.model)
        self._last = [found.tensor for found in self.parameters]
        held = holdings(self.optimizer, self.model)
        self._seen = [
            number
            for number, found in enumerate(self.parameters)
            if (found.tensor.requires_grad or id(found.tensor) in held.groups) and local(found.tensor).numel()
        ]
        self._groups = _by_kind([self.parameters[number] for number in self._seen])
        self._start = [_joined([found.tensor for found in group]) for group in self._groups]
        self._facts = [{name: torch.zeros(len(group)) for name in _FACTS} for group in self._groups]
        sizes = [[local(found.tensor).numel() for found in group] for group in self._groups]
        self._segments = [torch.repeat_interleave(torch.arange(len(its)), torch.tensor(its)) for its in sizes]
        self._starts = [joined.split(its) for joined, its in zip(self._start, sizes, strict=True)]
        self._rates: dict[int, float] = {}
        self._peaks: dict[int, float] = {}
        self._before: list[Tensor] | None = None
        self._bad: list[Tensor] = []
        self.looks = 0

    def _is_current(self) -> bool:
        """Whether the model still has the parameters that were found, and in the same state."""
        return all(
            found.owner._parameters.get(found.key) is last
            for found, last in zip(self.parameters, self._last, strict=True)
        )

    def before_step(self) -> None:
        """Look at gradients and values, before the optimizer steps.

        If parameters were replaced since the last look, the watch starts again with the new ones.
        """
        if not self._is_current():
            self._open()
        held, self._bad = holdings(self.optimizer, self.model), []
        for group, facts, segments in zip(self._groups, self._facts, self._segments, strict=True):
            tensors = [found.tensor for found in group]
            gradients = [tensor.grad for tensor in tensors]
            # Sparse or absent gradients of a vector do not occur together with values here: absent ones count as zeros.
            flat = _joined(
                [
                    torch.zeros_like(local(tensor)) if gradient is None else gradient
                    for tensor, gradient in zip(tensors, gradients, strict=True)
                ]
            ).float()
            finite = flat.isfinite()
            size = torch.where(finite, flat.abs(), 0.0)
            largest = torch.zeros(len(group)).scatter_reduce_(0, segments, size, "amax")
            bad = torch.zeros(len(group)).index_add_(0, segments, (~finite).float()) > 0
            absent = torch.tensor([gradient is None for gradient in gradients])
            facts["missing"] += absent
            facts["nonfinite"] += bad
            facts["zero"] += (largest == 0) & ~bad & ~absent
            facts["gradient"] = torch.maximum(facts["gradient"], largest)
            self._bad.append(bad)
            for found in group:
                settings = held.groups.get(id(found.tensor), _NO_GROUP)
                if settings.learning_rate is not None and settings.peak is not None:
                    key = id(found.tensor)
                    self._rates[key] = max(self._rates.get(key, 0.0), settings.learning_rate)
                    self._peaks[key] = max(self._peaks.get(key, 0.0), settings.peak)
        self._before = [_joined([found.tensor for found in group]) for group in self._groups]
        for now, first, facts, segments in zip(self._before, self._start, self._facts, self._segments, strict=True):
            back = _count(now != first, segments, len(facts["reset"])) == 0
            facts["reset"] += back & (facts["moved_in_a_step"] > 0)

    def after_step(self) -> None:
        """Look at the values after the optimizer has stepped.

        Raises:
            RuntimeError: `before_step` was not called before.
        """
        if self._before is None:
            raise RuntimeError("after_step needs the look before the step: call before_step first.")
        if not self._is_current():
            self._open()
            return
        told = bool(getattr(self.optimizer, "step_was_skipped", False))
        held = holdings(self.optimizer, self.model)
        looks = zip(self._groups, self._before, self._bad, self._facts, self._segments, strict=True)
        for group, before, bad, facts, segments in looks:
            after = _joined([found.tensor for found in group])
            changed = after != before
            moved = _count(changed, segments, len(group))
            facts["skipped"] += (moved == 0) & (bad | told)
            facts["moved_in_a_step"] = torch.maximum(facts["moved_in_a_step"], moved)
            steps = torch.tensor([self._step_of(found, held) for found in group], dtype=torch.float64)[segments]
            inwards, outwards = can_move(before, torch.where(steps.isfinite(), steps, 0.0))
            # Rounding by chance or of a sum moves an entry to the next value. Longer moves are of steps beyond the
            # rate, as Adam takes them where its second moment is zero in half precision.
            near = (after.double() - before.double()).abs() <= 2 * spacing(before)
            odd = changed & near & ~inwards & ~outwards & steps.isfinite()
            facts["surprising"] = torch.maximum(facts["surprising"], _count(odd, segments, len(group)))
        self._before = None
        self.looks += 1

    def _step_of(self, found: NormParameter, held: Holdings) -> float:
        """The largest step of a parameter by its rate; NaN if it is not known."""
        step = _group_of(held, found).step(self._peaks.get(id(found.tensor)), float("inf"))
        return float("nan") if step is None else step

    def report(self, *, ended: bool = True) -> Report:
        """What was seen so far.

        Args:
            ended: whether the run is over; before, a parameter whose optimizer cannot be seen is given time to move.

        Returns:
            The findings, and one row per norm parameter.
        """
        if not self._is_current():
            self._open()
        records = self.records()
        return Report(tuple(records), tuple(diagnose(records, ended=ended)), looks=self.looks)

    def records(self) -> list[Record]:
        """What was seen of each norm parameter, in the order of the model's modules."""
        held = holdings(self.optimizer, self.model)
        places = {id(found): (g, n) for g, group in enumerate(self._groups) for n, found in enumerate(group)}
        # Of parameters that require a gradient, the parts of their names: an adapter's name is one of them.
        trained = {
            part for name, value in self.model.named_parameters() if value.requires_grad for part in name.split(".")
        }
        trains_adapters = any(found.adapter in trained for found in self.parameters)
        made = []
        for found in self.parameters:
            record = self._described(found, held)
            if self._expected is not None and self._expected.search(found.name):
                record.wanted = True
            elif found.adapter is not None and found.is_active:
                record.wanted = found.adapter in trained or not trains_adapters
            if id(found) in places:
                self._measured(record, found, held, *places[id(found)])
            made.append(record)
        return made

    def _described(self, found: NormParameter, held: Holdings) -> Record:
        tensor = found.tensor
        settings = _group_of(held, found)
        is_held = id(tensor) in held.groups
        half = tensor.dtype.itemsize < 4
        return Record(
            name=found.name,
            role=found.role,
            dtype=str(tensor.dtype).removeprefix("torch."),
            entries=local(tensor).numel(),
            adapter=found.adapter,
            trainable=tensor.requires_grad,
            active=found.is_active,
            held=is_held or (half and held.master_of(tensor)),
            stale=not is_held and bool(held.foreign),
            hidden=not held.sees_model and half,
            weight_decay=settings.weight_decay,
            neutral=found.neutral,
            looks=self.looks,
        )

    def _measured(self, record: Record, found: NormParameter, held: Holdings, group: int, number: int) -> None:
        tensor, settings, key = found.tensor, _group_of(held, found), id(found.tensor)
        facts = self._facts[group]
        for name in _FACTS:
            value = float(facts[name][number])
            setattr(record, name, value if name == "gradient" else int(value))
        record.learning_rate, record.peak = self._rates.get(key), self._peaks.get(key)
        first = self._starts[group][number]
        now = local(tensor).reshape(-1).to("cpu", copy=True)
        record.finite = bool(now.isfinite().all())
        seen = movement_between(first, now)
        record.moved, record.one_way, record.inwards = seen.moved, seen.one_way, seen.inwards
        if record.finite and record.weight_decay > 0:
            record.shrank = shrinks_alike(first, now)
        record.spacing = float(spacing(first).median())
        scale = settings.smallest_size
        if scale is not None and record.peak and float(first.double().square().mean().sqrt()) <= scale:
            moved = float((now.double() - first.double()).abs().max()) if now.numel() else 0.0
            record.size_scale = scale if moved < record.peak else None
        if key not in held.groups or has_master(self.optimizer, tensor):
            return
        bound = settings.step(record.peak, float("inf"))
        real = settings.step(record.peak, record.gradient)
        record.step = real if bound is None else bound
        record.by_gradient = settings.by_gradient
        if record.step is None:
            return
        # SGD's step is known by its gradients only, so a coarse dtype shows with these.
        record.can_move, record.can_move_outwards = _movable(first, record.step)
        record.real_can_move = None if real is None else _movable(first, real)[0]
        if self._max_grad_norm is not None:
            share = self._max_grad_norm / max(sum(map(len, self._start)), 1) ** 0.5
            clipped = settings.step(record.peak, share)
            record.clip_can_move = None if clipped is None else _movable(first, clipped)[0]


def _group_of(held: Holdings, found: NormParameter) -> Group:
    """The settings of a parameter's group; those of a group without a rate if the optimizer does not hold it."""
    return held.groups.get(id(found.tensor), _NO_GROUP)


def _movable(values: Tensor, step: float) -> tuple[int, int]:
    """Number of entries that a step moves at all, and away from zero."""
    inwards, outwards = can_move(values, step)
    return int((inwards | outwards).sum()), int(outwards.sum())


def _by_kind(found: Sequence[NormParameter]) -> list[list[NormParameter]]:
    """Group parameters by dtype and device, so that each group is read by one operation."""
    groups: dict[Any, list[NormParameter]] = {}
    for one in found:
        groups.setdefault((one.tensor.dtype, one.tensor.device), []).append(one)
    return list(groups.values())


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """The entries of tensors in one vector on the CPU, a copy."""
    return torch.cat([local(tensor).reshape(-1) for tensor in tensors]).cpu()


def _count(chosen: Tensor, segments: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups).index_add_(0, segments, chosen.float())
