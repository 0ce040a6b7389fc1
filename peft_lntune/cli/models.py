"""Loads models from folders or from the Hub, with or without weights, and with an adapter."""

import copy
import importlib.util
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from peft_lntune.config import StoredConfig
from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.planning.claims import check_architecture
from peft_lntune.storage.adapter_file import CONFIG_FILE
from peft_lntune.storage.keys import is_ours
from peft_lntune.storage.packing import ROOT
from peft_lntune.storage.saved_adapter import SavedAdapter

__all__ = [
    "check_weights",
    "empty_model",
    "is_gguf",
    "load_adapted",
    "load_gguf",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "read_model_config",
]

CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The class of transformers with the head for each of PEFT's task types."""

_ADVICE = "Give the model that the adapter was trained on: --model FOLDER."

_PROCESSOR_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""Files of which every tokenizer or processor has at least one."""


def read_model_config(model: str, revision: str | None = None) -> Any:
    """Read the config of a model.

    Args:
        model: folder with a `config.json`, or a name on the Hub.
        revision: of the name on the Hub.

    Returns:
        The config, as `AutoConfig` reads it.

    Raises:
        ConfigError: there is no such model; the message names `model`.
    """
    path, wanted = Path(model), "Give the folder of a model, with its config.json, or a name on the Hub."
    if path.is_dir() and not (path / "config.json").is_file():
        found = f"holds an adapter ({CONFIG_FILE})" if (path / CONFIG_FILE).is_file() else "has no config.json"
        raise ConfigError(f"the folder {model} {found}, and a model is needed. {wanted}")
    if path.is_file():
        raise ConfigError(f"{model} is a file. {wanted}")
    try:
        return AutoConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        what = f"the config.json in {model} cannot be read" if path.is_dir() else f"no model {model}: no such folder"
        also = "" if path.is_dir() else ", and the Hub does not give it"
        raise ConfigError(f"{what}{also} ({_first_line(error)}). {wanted}") from error


def empty_model(model: str) -> nn.Module:
    """Make the model of a folder on the meta device, without its weights.

    Args:
        model: folder with a `config.json`, or a name on the Hub.

    Returns:
        The model, of the class that the folder was saved from.

    Raises:
        ConfigError: there is no such model.
    """
    config = read_model_config(model)
    return _empty(_own_class(config), config)


def load_model(
    model: str,
    task_type: str | None = None,
    class_name: str | None = None,
    *,
    saved_beside: Collection[str] = (),
    **options: Any,
) -> nn.Module:
    """Load the model of a folder with its weights, in the saved dtype.

    Args:
        model: folder, or a name on the Hub.
        task_type: task type of PEFT, which decides the head. None: the class that the folder was saved from.
        class_name: class of transformers, if there is no task type.
        saved_beside: names of parameters that the caller loads from elsewhere, such as the head of an adapter.
        **options: further arguments of `from_pretrained`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ConfigError: there is no such model, or it lacks weights.
    """
    kind = _class_for(read_model_config(model, options.get("revision")), task_type, class_name)
    loaded, info = kind.from_pretrained(model, output_loading_info=True, **options)
    missing = set(info["missing_keys"]) - set(saved_beside)
    if loaded.base_model is loaded:
        # Checkpoints with a head often lack the pooler; without a head, most users do not read its output.
        poolers = {name for name in missing if name.startswith("pooler.")}
        if poolers:
            warnings.warn(f"{model} has no weights for {', '.join(sorted(poolers))}: they are random.", stacklevel=2)
        missing -= poolers
    check_weights(model, missing)
    return loaded


def is_gguf(model: str) -> bool:
    """Whether a model is named by its GGUF file.

    Args:
        model: file, folder, or a name on the Hub.

    Returns:
        True for a path that ends in `.gguf`.

    Example:
        >>> is_gguf("llama-Q2_K.gguf"), is_gguf("./llama")
        (True, False)
    """
    return model.lower().endswith(".gguf")


def load_gguf(file: str) -> nn.Module:
    """Load the language model of a GGUF file by transformers, which dequantizes it to float32.

    Args:
        file: the file.

    Returns:
        The model, in evaluation mode.

    Raises:
        ConfigError: there is no such file, transformers does not read it, or it lacks weights.
        ImportError: the package `gguf` is missing.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"no such file: {file}. Give the GGUF file of a model.")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading GGUF files needs the package gguf: pip install 'peft-lntune[gguf]'.")
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # the reader raises what numpy raises
        raise ConfigError(f"transformers does not read {file} ({_first_line(error)}).") from error
    tied = {"lm_head.weight"} if loaded.config.tie_word_embeddings else set()
    check_weights(file, set(info["missing_keys"]) - tied)
    return loaded


def check_weights(model: str, missing: Collection[str]) -> None:
    """Refuse a model that lacks weights, which transformers fills with random values.

    Args:
        model: the folder or name, for the error.
        missing: names of parameters that were not found.

    Raises:
        ConfigError: there are some.
    """
    if missing:
        names = sorted(missing)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ConfigError(
            f"{model} has no weights for {', '.join(names[:3])}{more}, so they would be random. Get a complete copy, "
            "or give the model that the adapter was trained on."
        )


def load_adapted(adapter: str, model: str | None = None) -> PeftModel:
    """Load the model that an adapter was trained on, with the adapter.

    The class of the model is that of the adapter's task, with as many labels as the saved head has. Whether the adapter
    fits is decided by the two configs and the adapter's file, before the model's weights are read.

    Args:
        adapter: folder of the adapter.
        model: folder of the base model; None: the one that the adapter's config names.

    Returns:
        The model with the adapter as `"default"`.

    Raises:
        ConfigError: no model is named, there is no such model, it lacks weights, or a config is damaged.
        AdapterFileError: the adapter is damaged, of another package, or from another model.
    """
    config = StoredConfig.from_pretrained(adapter)
    base = str(model or config.base_model_name_or_path or "")
    if not base:
        raise ConfigError(f"the config of {adapter} does not say which model it is for. Name it: --model FOLDER.")
    options: dict[str, Any] = {}
    if model is None and config.revision:
        options["revision"] = config.revision
    base_config = read_model_config(base, **options)
    check_architecture(config, base_config, adapter, f"the model in {base}", _ADVICE)
    saved = [name for name in SavedAdapter(adapter, {}).shapes if not is_ours(name)]
    named = (config.auto_mapping or {}).get("base_model_class")
    kind = _class_for(base_config, config.task_type, named)
    labels = _labels(adapter, kind, base_config) if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else None
    if labels is not None:
        options["num_labels"] = labels
        base_config.num_labels = labels
    _check_fit(adapter, base, kind, base_config)
    loaded = load_model(base, config.task_type, named, saved_beside=saved, **options)
    return PeftModel.from_pretrained(loaded, adapter)


def load_processor(model: str, revision: str | None = None) -> Any:
    """Load what turns texts, images or sound into the inputs of a model.

    Args:
        model: folder, or a name on the Hub.
        revision: of the name on the Hub.

    Returns:
        The processor, tokenizer, image processor or feature extractor; None if the model has none.

    Raises:
        ConfigError: there are its files, and it does not load.
    """
    # Without its files, some classes make a tokenizer with an empty vocabulary.
    if not any(_has_file(model, name, revision) for name in _PROCESSOR_FILES):
        return None
    failed: list[Exception] = []
    for kind in (AutoProcessor, AutoTokenizer):
        try:
            return kind.from_pretrained(model, revision=revision)
        except Exception as error:  # tokenizers raises plain Exceptions for damaged files
            failed.append(error)
    reasons = " ".join(dict.fromkeys(map(_first_line, failed)))
    raise ConfigError(f"the tokenizer or processor of {model} does not load: {reasons}") from failed[-1]


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of a model.

    Args:
        model: folder, or a name on the Hub.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: it is missing or does not load; the message names `model`.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # tokenizers raises plain Exceptions for damaged files
        raise ConfigError(f"{model} has no tokenizer that loads: {_first_line(error)}") from error


def _check_fit(adapter: str, base: str, kind: Any, config: Any) -> None:
    """Load an adapter into the model on the meta device, so that another size is refused before weights are read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that values are not copied to the meta device
            PeftModel.from_pretrained(_empty(kind, config), adapter)
    except AdapterFileError as error:
        raise AdapterFileError(f"{adapter} does not fit the model in {base}: {error}") from error
    except (RuntimeError, NotImplementedError):
        return  # what the meta device cannot do; loading into the model itself decides


def _empty(kind: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        return kind(config) if issubclass(kind, nn.Module) else kind.from_config(config)


def _class_for(config: Any, task_type: str | None, class_name: str | None) -> Any:
    """The class with the head of a task; without a task, the named class, or the one that the model was saved from."""
    return getattr(transformers, CLASSES.get(str(task_type), class_name or ""), None) or _own_class(config)


def _own_class(config: Any) -> Any:
    """The class that the model was saved from, by its config; `AutoModel` if transformers does not have it."""
    names = getattr(config, "architectures", None) or [""]
    return getattr(transformers, names[0], None) or transformers.AutoModel


def _has_file(model: str, name: str, revision: str | None) -> bool:
    """Whether a folder, or a repository on the Hub, has a file."""
    if Path(model).is_dir():
        return Path(model, name).is_file()
    try:
        hf_hub_download(model, name, revision=revision)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return False
    return True


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _labels(adapter: str, kind: Any, config: Any) -> int | None:
    """Number of labels of the head saved with an adapter; None without a head.

    A head may have several matrices (RoBERTa's has two). That of the labels is the one that grows with their number.
    """
    shapes = SavedAdapter(adapter, {}).shapes
    rows = {k.removeprefix(ROOT): shape[0] for k, shape in shapes.items() if not is_ours(k) and len(shape) == 2}
    if len(set(rows.values())) > 1:
        one, two = (_shapes(kind, config, labels) for labels in (1, 2))
        rows = {name: count for name, count in rows.items() if one.get(name) != two.get(name)} or rows
    return min(rows.values(), default=None)


def _shapes(kind: Any, config: Any, labels: int) -> dict[str, torch.Size]:
    """Shapes of the parameters of a model with so many labels."""
    config = copy.deepcopy(config)
    config.num_labels = labels
    return {name: parameter.shape for name, parameter in _empty(kind, config).named_parameters()}
