"""Loads models from folders, with or without weights, and with an adapter."""

from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import AutoConfig

from peft_lntune.config import StoredConfig
from peft_lntune.errors import ConfigError
from peft_lntune.planning.claims import check_architecture
from peft_lntune.storage.keys import is_ours
from peft_lntune.storage.saved_adapter import SavedAdapter

__all__ = ["empty_model", "load_adapted", "load_model"]

CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The class of transformers with the head for each of PEFT's task types."""


def empty_model(model: str) -> nn.Module:
    """Make the model of a folder on the meta device, without its weights.

    Args:
        model: folder with a `config.json`, or a name on the Hub.

    Returns:
        The model, of the class that the folder was saved from.
    """
    config = AutoConfig.from_pretrained(model)
    kind = _own_class(config)
    with torch.device("meta"):
        return kind(config) if kind is not None else transformers.AutoModel.from_config(config)


def load_model(model: str, task_type: str | None = None, class_name: str | None = None, **options: Any) -> nn.Module:
    """Load the model of a folder with its weights, in the saved dtype.

    Args:
        model: folder, or a name on the Hub.
        task_type: task type of PEFT, which decides the head. None: the class that the folder was saved from.
        class_name: class of transformers, if there is no task type.
        **options: further arguments of `from_pretrained`.

    Returns:
        The model, in evaluation mode.
    """
    known = getattr(transformers, CLASSES.get(str(task_type), class_name or ""), None)
    kind: Any = known or _own_class(AutoConfig.from_pretrained(model)) or transformers.AutoModel
    return kind.from_pretrained(model, **options)


def load_adapted(adapter: str, model: str | None = None) -> PeftModel:
    """Load the model that an adapter was trained on, with the adapter.

    The class of the model is that of the adapter's task, with as many labels as the saved head has.

    Args:
        adapter: folder of the adapter.
        model: folder of the base model; None: the one that the adapter's config names.

    Returns:
        The model with the adapter as `"default"`.

    Raises:
        ConfigError: no model is named, or the config is damaged.
        AdapterFileError: the adapter is damaged, of another package, or from another architecture than the model.
    """
    config = StoredConfig.from_pretrained(adapter)
    base = model or config.base_model_name_or_path
    if not base:
        raise ConfigError(f"the config of {adapter} does not say which model it is for. Name it: --model FOLDER.")
    check_architecture(config, AutoConfig.from_pretrained(base), adapter)  # before its weights are read
    options = {}
    labels = _labels(adapter) if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else None
    if labels is not None:
        options["num_labels"] = labels
    named = (config.auto_mapping or {}).get("base_model_class")
    return PeftModel.from_pretrained(load_model(str(base), config.task_type, named, **options), adapter)


def _own_class(config: Any) -> Any:
    """The class that the model was saved from, by its config; None if transformers does not have it."""
    names = getattr(config, "architectures", None) or [""]
    return getattr(transformers, names[0], None)


def _labels(adapter: str) -> int | None:
    """Number of labels of the head saved with an adapter: the rows of its narrowest matrix; None without a head."""
    shapes = SavedAdapter(adapter, {}).shapes
    rows = [shape[0] for key, shape in shapes.items() if not is_ours(key) and len(shape) == 2]
    return min(rows, default=None)
