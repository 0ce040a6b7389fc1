"""A callback for transformers' Trainer that tells whether the norms learn."""

import logging
from typing import Any

from transformers import TrainerCallback

from peft_lntune.doctor.report import Report
from peft_lntune.doctor.watch import NormWatch
from peft_lntune.errors import ConfigError

__all__ = ["NormDoctor"]

_LOG = logging.getLogger(__name__)


class NormDoctor(TrainerCallback):
    """Tells during training whether the norms learn, and if not, why, with one sentence of advice per fault.

    It looks at steps 1, 2, 4, 8, ... up to `every`, then at every `every`-th step, and only at norms. A fault is logged
    as a warning when it is first seen; `report` has all of them at the end of training.

    It works with any model that Trainer trains: plain ones, PEFT's LoRA with norms in `modules_to_save`, PEFT's
    `LN_TUNING`, and adapters of this package. Parameters that DeepSpeed ZeRO-3 has partitioned have no values in any
    single process, and are left out.

    Args:
        every: number of steps between two looks, at least 1.
        expect: which norms are to be trained: True for all, or a regular expression that is searched in the names of
            their parameters. None: frozen norms are taken to be frozen on purpose.

    Attributes:
        report: what was seen, from the first diagnosis on; None before.
        watch: the `NormWatch` of the run; None before training.

    Raises:
        ConfigError: `every` is below 1.

    Example:
        >>> from transformers import Trainer
        >>> doctor = NormDoctor(every=50)
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[doctor])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> print(doctor.report)  # doctest: +SKIP
    """

    def __init__(self, every: int = 100, *, expect: str | bool | None = None) -> None:
        if every < 1:
            raise ConfigError(f"every should be a number of steps, at least 1, but is {every}.")
        self.every, self.expect = every, expect
        self.watch: NormWatch | None = None
        self.report: Report | None = None
        self._warned: set[str] = set()
        self._step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Find the norms, and keep their values."""
        clip = getattr(args, "max_grad_norm", None)
        self.watch = NormWatch(model, kwargs["optimizer"], expect=self.expect, max_grad_norm=clip)
        self.report, self._warned, self._step = None, set(), 0

    def is_look(self, step: int) -> bool:
        """Whether a step is looked at.

        Args:
            step: counted from 1.

        Returns:
            True for powers of two up to `every`, and for multiples of `every`.
        """
        return step % self.every == 0 or (step < self.every and step & (step - 1) == 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at gradients and values."""
        self._step += 1  # not of `state`, which a resumed run continues
        if self.watch is not None and self.is_look(self._step):
            self.watch.optimizer = kwargs.get("optimizer") or self.watch.optimizer
            self.watch.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the values after the step."""
        if self.watch is not None and self.is_look(self._step):
            self.watch.after_step()
            looks = self.watch.looks
            # A diagnosis costs more than a look: once early, once when the looks become regular, then rarely.
            if looks == 4 or self._step == self.every or looks % 20 == 0:
                self._diagnose(ended=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Diagnose the whole run."""
        self._diagnose(ended=True)

    def _diagnose(self, ended: bool) -> None:
        if self.watch is None:
            return
        self.report = self.watch.report(ended=ended)
        for finding in self.report.findings:
            if finding.kind not in self._warned:
                self._warned.add(finding.kind)
                _LOG.warning("NormDoctor, step %d: %s", self._step, finding)
