"""What a damaged model and its teacher must have in common, and what of the damaged model is tuned."""

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn

from peft_lntune.config import LNTuningConfig, ModuleTuningConfig, UnifiedConfig
from peft_lntune.errors import ConfigError, UnsupportedError
from peft_lntune.interop.folds import linear_maps
from peft_lntune.norms.find import Norm, find_norms

__all__ = ["check_pair", "logits_of", "mask_of", "recovery_config"]

Batch = Mapping[str, Any]

_SHOWN = 3


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse two models of which one cannot be a damaged copy of the other.

    Only what a repair relies on is compared: the size of the vocabulary, and which norms there are, with their shapes.
    The values of norms may differ, because some quantizers (AWQ, SmoothQuant) move scales into them.

    Args:
        student: the damaged model.
        teacher: the undamaged model.

    Raises:
        ConfigError: the models differ in vocabulary or norms, or have no norms.
    """
    sizes = [_vocabulary(model) for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the damaged model has a vocabulary of {sizes[0]}, and the teacher one of {sizes[1]}, so their answers "
            "cannot be compared. Give the model that the damaged one was made from."
        )
    own, known = find_norms(student), find_norms(teacher)
    if not own:
        raise ConfigError(f"{type(student).__name__} has no norms, and norms are what a repair tunes.")
    alone = [name for name in own if name not in known], [name for name in known if name not in own]
    if any(alone):
        owners = zip(alone, ("the damaged model", "the teacher"), strict=True)
        said = [f"{_listed(names)} only in {owner}" for names, owner in owners if names]
        raise ConfigError(
            f"the norms of the two models differ: {'; '.join(said)}. Give the model that the damaged one was made "
            "from. A model that lost whole layers cannot be repaired this way."
        )
    for name, norm in own.items():
        if _shapes(norm) != _shapes(known[name]):
            raise ConfigError(
                f"the norm {name} has parameters of shapes {_shapes(norm)} in the damaged model, and of "
                f"{_shapes(known[name])} in the teacher. Give the model that the damaged one was made from."
            )


def recovery_config(model: nn.Module, *, biases: bool = False, task_type: str | None = "CAUSAL_LM") -> PeftConfig:
    """The config of an adapter that repairs a model.

    Args:
        model: the damaged model.
        biases: also tune the biases of linear maps, which quantizers leave in floating point. Biases of norms are
            tuned in any case.
        task_type: PEFT's name of the task.

    Returns:
        An `LNTuningConfig` of all norms; with biases, a `UnifiedConfig` with a `ModuleTuningConfig` beside it.

    Raises:
        ConfigError: `biases` was asked for, and no linear map has one.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
        >>> [type(part).__name__ for part in recovery_config(model, biases=True).parts]
        ['LNTuningConfig', 'ModuleTuningConfig']
    """
    if not biases:
        return LNTuningConfig(task_type=task_type)
    names = [name for name, linear in linear_maps(model).items() if isinstance(getattr(linear, "bias", None), Tensor)]
    if not names:
        raise ConfigError(
            f"no linear map of {type(model).__name__} has a bias, so there are none to tune. Leave out `biases`: the "
            "biases of norms are tuned in any case."
        )
    parts = [LNTuningConfig(), ModuleTuningConfig(target_modules=names, tune="bias")]
    return UnifiedConfig(task_type=task_type, parts=parts)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Run a model on a batch.

    Args:
        model: a model of transformers with a head, plain or with adapters.
        batch: its inputs; labels are left out, and a cache is not asked for.

    Returns:
        Its logits.

    Raises:
        UnsupportedError: the model returns no logits.
    """
    given = {name: value for name, value in batch.items() if name != "labels"}
    logits = getattr(model(**given), "logits", None)
    if not isinstance(logits, Tensor):
        raise UnsupportedError(
            f"{type(model).__name__} returns no logits, and the answers of the two models are compared by them. Load "
            "both with a head, such as AutoModelForCausalLM."
        )
    return logits


def mask_of(batch: Batch, logits: Tensor) -> Tensor | None:
    """Which positions of an answer count.

    Args:
        batch: the inputs.
        logits: the answer, `(..., C)`.

    Returns:
        The attention mask, if there is one of the positions of the answer; None: all count. Answers of an
        encoder-decoder are those of its decoder, so the mask of the encoder's texts is not theirs.
    """
    decodes = any(name.startswith("decoder_input") for name in batch)
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    return mask if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1] else None


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return f"{', '.join(names[:_SHOWN])}{f' and {more} more' if more > 0 else ''}"


def _vocabulary(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    # A head may be padded to another size than the config says.
    find: Any = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    rows = getattr(head, "out_features", None)
    return rows if isinstance(rows, int) else size


def _shapes(norm: Norm) -> tuple[tuple[int, ...] | None, ...]:
    return norm.weight_shape, norm.bias_shape
