"""The whole repair of a damaged model: an adapter of its norms, trained on the logits of the undamaged model."""

from collections.abc import Sequence
from dataclasses import dataclass

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_lntune.errors import ConfigError
from peft_lntune.recover.distill import distill
from peft_lntune.recover.pairs import Batch, check_pair, logits_of, recovery_config

__all__ = ["Recovery", "recover"]


@dataclass(frozen=True, eq=False)
class Recovery:
    """A repaired model.

    Attributes:
        model: the damaged model with the adapter; save it with `save_pretrained`.
        entries: number of tuned entries.
        losses: the divergence from the teacher before each step, in nats per position.
    """

    model: PeftModel
    entries: int
    losses: Sequence[float]


def recover(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Batch],
    *,
    config: PeftConfig | None = None,
    steps: int = 100,
    learning_rate: float = 3e-3,
    progress: bool = False,
) -> Recovery:
    """Repair a quantized or pruned model: tune its norms until its answers are those of the undamaged model.

    Norms are a ten-thousandth of a model, are not quantized, and stay in float32 in most files, so the result fits into
    the damaged model's own file: nothing is quantized again, and zeros of a pruned matrix stay zeros.

    Source: Norm Tweaking (Li et al. 2023, arXiv 2309.02784), norms after quantization, by channel statistics; PERP
    (Zimmer et al. 2023, arXiv 2312.15230), norms and biases after pruning, by the language model loss. Here the loss is
    the divergence from the undamaged model's logits.

    Args:
        student: the damaged model: plain, quantized by a library that transformers loads, or pruned. It takes an
            adapter, as by `get_peft_model`.
        teacher: the undamaged model, on the same device. It is not changed.
        batches: dicts of inputs, such as `{"input_ids": ...}`, on the device of the models. After the last comes the
            first again, so give as many as there are steps if texts allow.
        config: what to tune; None: all norms. See `recovery_config`.
        steps: number of batches to train on.
        learning_rate: the largest of the run.
        progress: show a progress bar.

    Returns:
        The model with the adapter, and how the divergence fell.

    Raises:
        ConfigError: the models differ in vocabulary or norms, or one of them holds adapters already.
        DataError: there are no batches, or a divergence is not finite. The model has no adapter then.
        UnsupportedError: a model returns no logits.
    """
    for model in (student, teacher):
        if isinstance(model, PeftModel):
            raise ConfigError("a repair starts from plain models, and one holds an adapter. Merge or unload it first.")
    check_pair(student, teacher)
    grads = {parameter: parameter.requires_grad for parameter in student.parameters()}
    training = teacher.training
    peft_model = get_peft_model(student, recovery_config(student) if config is None else config)
    teacher.eval()
    try:
        losses = distill(
            peft_model,
            lambda batch: logits_of(teacher, batch),
            batches,
            steps=steps,
            learning_rate=learning_rate,
            progress=progress,
        )
    except BaseException:
        peft_model.unload()
        for parameter, required in grads.items():
            parameter.requires_grad_(required)
        raise
    finally:
        teacher.train(training)
    entries = sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad)
    return Recovery(peft_model, entries, losses)
