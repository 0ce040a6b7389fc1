"""Tiny models and data for the tests of other libraries."""

import torch
import transformers as hf
from torch.utils.data import Dataset

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


def llama(cls=hf.LlamaForCausalLM, **sizes):
    """A random two-layer Llama, the same at every call."""
    torch.manual_seed(0)
    return cls(hf.LlamaConfig(**{**SIZES, "max_position_embeddings": 64, "pad_token_id": 0, **sizes}))


def bert():
    """A random two-layer BERT with a head of two classes and no dropout, the same at every call."""
    torch.manual_seed(0)
    config = hf.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return hf.BertForSequenceClassification(config)


def tokens(rows=3, length=7):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def fill(model, std=0.1):
    """Give what is trained values other than zero, the same for the same names."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (p for _, p in sorted(model.named_parameters()) if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


class Sentences(Dataset):
    """Sixteen sentences of random tokens and their labels."""

    def __init__(self):
        self.ids = tokens(16, 6)
        self.labels = torch.arange(16) % 2

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(6, dtype=torch.int64), "labels": self.labels[i]}
