"""Models with the shapes of public ones and random weights, made on the device, so that nothing is downloaded."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from benchmarks.harness.made import made_batch, made_inputs
from benchmarks.harness.models import DTYPES, load_classifier, widen_heads

# The fields of each public config that decide the shape of its weights.
SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "minilm": (
        BertConfig,
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
    ),
    "bert-large": (
        BertConfig,
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    ),
    "llama-3.2-1b": (
        LlamaConfig,
        {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.2-3b": (
        LlamaConfig,
        {
            "vocab_size": 128_256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-0.6b": (
        Qwen3Config,
        {
            "vocab_size": 151_936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
}
# What `--small` makes of each: the same classes, for a CPU and for tests.
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_DECODER = {"vocab_size": 256, "num_key_value_heads": 4, "head_dim": 16}
ENCODERS = ("minilm", "bert-large")


def shape_of(name: str, small: bool, layers: int | None = None) -> PreTrainedConfig:
    """Return the config of a model.

    Args:
        name: a key of `SHAPES`.
        small: the class with tiny sizes instead.
        layers: how many layers; None: as many as the public model has.
    """
    kind, fields = SHAPES[name]
    if small:
        fields = {**fields, **SMALL, **({} if name in ENCODERS else SMALL_DECODER)}
    if layers is not None:
        fields = {**fields, "num_hidden_layers": min(layers, fields["num_hidden_layers"])}
    # No generation ends early, and no token of a made batch is padding.
    return kind(**fields, bos_token_id=None, eos_token_id=None, pad_token_id=0)


def make_model(
    name: str,
    device: torch.device,
    dtype: str,
    *,
    small: bool = False,
    layers: int | None = None,
    checkpoint: str | None = None,
    attention: str = "sdpa",
) -> Any:
    """Return a decoder, or an encoder with a classifier of two classes, in evaluation mode; the same in every call.

    Args:
        name: a key of `SHAPES`.
        device: where the weights are made.
        dtype: `float32`, `bfloat16` or `float16`; the classifier is always float32.
        small: tiny sizes.
        layers: fewer layers than the public model has.
        checkpoint: folder whose weights are loaded in place of random ones.
        attention: transformers' name of the implementation.
    """
    if checkpoint is not None:
        return load_classifier(checkpoint, num_labels=2, dtype=dtype, seed=0, dropout=None).to(device).eval()
    config = shape_of(name, small, layers)
    kind: Any = AutoModelForSequenceClassification if name in ENCODERS else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = kind.from_config(config, dtype=DTYPES[dtype], attn_implementation=attention)
    if name in ENCODERS and dtype != "float32":
        widen_heads(model)
    return model.to(device).eval()


def make_batch(name: str, rows: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Return random tokens with the labels of the model's task: classes, or the tokens themselves."""
    if name in ENCODERS:
        return made_batch(rows, tokens, device)
    inputs = made_inputs(rows, tokens, device)
    return {**inputs, "labels": inputs["input_ids"]}


def vary_gains(model: nn.Module) -> None:
    """Move the gains of norms away from one, as training does; made models start with all of them equal."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data += noise.to(parameter.device, parameter.dtype)
