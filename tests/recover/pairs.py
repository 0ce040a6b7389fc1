"""A tiny language model and a damaged copy of it."""

import copy
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from benchmarks.harness.damage import round_to_bits
from peft_lntune.recover import logits_of

VOCAB = 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig),
    "gpt2": (hf.GPT2LMHeadModel, lambda **_: hf.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2)),
}


def teacher_of(kind: str = "llama") -> nn.Module:
    """A model with random norms, biases included."""
    torch.manual_seed(0)
    made, config = KINDS[kind]
    model = made(config(**SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif kind == "gpt2" and "ln" not in name:
                parameter.mul_(8)  # GPT-2 starts with small weights whatever the config says
    return model.requires_grad_(False)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear maps but the head, by class name: no code of ours is asked."""
    kinds = ("Linear", "Conv1D")
    return {n: m for n, m in model.named_modules() if type(m).__name__ in kinds and "head" not in n}


@torch.no_grad()
def rounded(teacher: nn.Module, bits: int = 2, group: int = 8) -> nn.Module:
    """A copy with rounded linear maps."""
    student = copy.deepcopy(teacher)
    for module in linears(student).values():
        module.weight.copy_(round_to_bits(module.weight, bits, group))
    return student


def rows(count: int = 8, length: int = 10, seed: int = 1) -> list[dict[str, Tensor]]:
    """Batches of two rows of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCAB, (2, length), generator=generator)} for _ in range(count)]


def answers_of(teacher: nn.Module) -> Any:
    return lambda batch: logits_of(teacher, batch)
