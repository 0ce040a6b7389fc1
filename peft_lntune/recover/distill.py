"""Training that makes the answers of one model those of another: no labels, only logits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from peft_lntune.errors import ConfigError, DataError
from peft_lntune.recover.divergence import divergence
from peft_lntune.recover.pairs import Batch, logits_of, mask_of

__all__ = ["distill"]

_WARM_UP = 0.1  # share of the steps


def distill(
    model: nn.Module,
    teacher: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    *,
    steps: int,
    learning_rate: float = 3e-3,
    progress: bool = False,
) -> list[float]:
    """Train the parameters of a model that require gradients, until its logits are those of a teacher.

    AdamW without weight decay on the `divergence`, gradients clipped to norm 1, a linear warm-up over a tenth of the
    steps and a linear decay to 0. The model runs in evaluation mode, without dropout. Nothing else of the model
    changes. After an error, the trained parameters are as they were.

    Args:
        model: the damaged model with an adapter of any PEFT type.
        teacher: `batch -> logits` of the undamaged model, such as `lambda batch: logits_of(teacher, batch)`, or a
            look-up of logits that were computed before. It runs without gradients.
        batches: dicts of the model's inputs, on its device. After the last comes the first again.
        steps: number of batches to train on.
        learning_rate: the largest of the run.
        progress: show a progress bar.

    Returns:
        The divergence before each step, in nats per position.

    Raises:
        DataError: there are no batches, or a divergence is not finite.
        ConfigError: no parameter requires a gradient, the logits have different shapes, or there are no steps.

    Example:
        >>> import copy
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator ...>
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
        >>> teacher = LlamaForCausalLM(LlamaConfig(vocab_size=9, num_hidden_layers=1, **sizes))
        >>> student = copy.deepcopy(teacher).requires_grad_(False)
        >>> norm = student.model.norm.weight.mul_(2).requires_grad_()
        >>> batches = [{"input_ids": torch.arange(9)[None]}]
        >>> found = distill(student, lambda batch: logits_of(teacher, batch), batches, steps=5, learning_rate=0.1)
        >>> found[-1] < found[0]
        True
    """
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not tuned:
        raise ConfigError("no parameter of the model requires a gradient. Add an adapter, or load it as trainable.")
    if not batches:
        raise DataError("there are no batches, so there is nothing to learn from. Give texts.")
    if steps < 1:
        raise ConfigError(f"steps={steps}, and at least one is needed.")
    optimizer = torch.optim.AdamW(tuned, lr=learning_rate, weight_decay=0.0)
    warm_up = max(1, round(_WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    before = [parameter.detach().clone() for parameter in tuned]
    training, found = model.training, []
    model.eval()
    try:
        for step in tqdm(range(steps), desc="distillation", unit="step", disable=not progress):
            found.append(_step(model, teacher, batches[step % len(batches)], tuned, optimizer, step))
            schedule.step()
    except BaseException:
        with torch.no_grad():
            for parameter, value in zip(tuned, before, strict=True):
                parameter.copy_(value)
        raise
    finally:
        optimizer.zero_grad()
        model.train(training)
    return found


def _step(
    model: nn.Module,
    teacher: Callable[[Batch], Tensor],
    batch: Batch,
    tuned: list[nn.Parameter],
    optimizer: Any,
    step: int,
) -> float:
    with torch.no_grad():
        known = teacher(batch)
    logits = logits_of(model, batch)
    if logits.shape != known.shape:
        raise ConfigError(
            f"the teacher's logits are of shape {tuple(known.shape)}, and the model's of {tuple(logits.shape)}. Give "
            "the model that the damaged one was made from."
        )
    loss = divergence(logits, known, mask_of(batch, logits))
    optimizer.zero_grad()
    loss.backward()
    size = nn.utils.clip_grad_norm_(tuned, 1.0)
    if not (bool(loss.isfinite()) and bool(size.isfinite())):
        what = "divergence" if not bool(loss.isfinite()) else "gradient"
        raise DataError(
            f"the {what} in step {step + 1} is not finite. Lower the learning rate; if it is the first step, look at "
            "the logits of both models, or load them in a wider dtype than float16."
        )
    optimizer.step()
    return float(loss.detach())
