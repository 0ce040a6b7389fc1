"""The tables that drive the tests: tiny models of many families, and norm classes.

A case is a lambda, so a table costs nothing to import. `build` and `inputs` run it, seeded.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import product
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

LAYERS = 2
VOCAB = 40

_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BODY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
_ENCODER = dict(_BODY, vocab_size=VOCAB, pad_token_id=0, max_position_embeddings=24)
_DECODER = dict(_BODY, **_TOKENS, num_key_value_heads=1, max_position_embeddings=24)
_SEQ2SEQ = dict(
    d_model=16,
    encoder_layers=LAYERS,
    decoder_layers=LAYERS,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    decoder_start_token_id=1,
    **_TOKENS,
)


def _words(batch: int) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (batch, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pairs(batch: int) -> dict[str, Tensor]:
    return {**_words(batch), "decoder_input_ids": torch.randint(3, VOCAB, (batch, 5))}


def _crossed(batch: int) -> dict[str, Tensor]:
    return {**_words(batch), "encoder_hidden_states": torch.randn(batch, 3, 16)}


def _images(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 8, 8)}


def _sounds(batch: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(batch, 8, 12), "decoder_input_ids": torch.randint(3, VOCAB, (batch, 5))}


@dataclass(frozen=True)
class Family:
    """A tiny model with random weights, `LAYERS` layers deep, and what it takes as inputs."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]] = _words


def _causal(name: str, **options: Any) -> Family:
    config, model = getattr(hf, f"{name}Config"), getattr(hf, f"{name}ForCausalLM")
    return Family(lambda: model(config(**{**_DECODER, **options})))


def _clip() -> nn.Module:
    text = dict(_BODY, **_TOKENS, max_position_embeddings=24, projection_dim=8)
    vision = dict(_BODY, image_size=8, patch_size=4, projection_dim=8)
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


FAMILIES: dict[str, Family] = {
    # Encoders
    "bert": Family(lambda: hf.BertForMaskedLM(hf.BertConfig(**_ENCODER))),
    "bert-crossed": Family(
        lambda: hf.BertLMHeadModel(hf.BertConfig(**_ENCODER, is_decoder=True, add_cross_attention=True)), _crossed
    ),
    "roberta": Family(lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_ENCODER))),
    "xlm-roberta": Family(lambda: hf.XLMRobertaForMaskedLM(hf.XLMRobertaConfig(**_ENCODER))),
    "distilbert": Family(
        lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(dim=16, hidden_dim=24, n_layers=LAYERS, n_heads=2, vocab_size=VOCAB)
        )
    ),
    "electra": Family(lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**_ENCODER, embedding_size=8))),
    "deberta-v2": Family(
        lambda: hf.DebertaV2ForMaskedLM(
            hf.DebertaV2Config(
                **_ENCODER,
                relative_attention=True,
                norm_rel_ebd="layer_norm",
                conv_kernel_size=3,
                conv_act="gelu",
                pos_att_type=["p2c", "c2p"],
            )
        )
    ),
    "modernbert": Family(
        lambda: hf.ModernBertForMaskedLM(
            hf.ModernBertConfig(
                **_ENCODER, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, attn_implementation="eager"
            )
        )
    ),
    # Decoders
    "gpt2": Family(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=16, n_layer=LAYERS, n_head=2, n_positions=24, add_cross_attention=True, **_TOKENS)
        ),
        _crossed,
    ),
    "gpt-neox": Family(lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_BODY, **_TOKENS))),
    "gpt-neox-sequential": Family(
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_BODY, **_TOKENS, use_parallel_residual=False))
    ),
    "opt": Family(
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                hidden_size=16,
                ffn_dim=24,
                num_hidden_layers=LAYERS,
                num_attention_heads=2,
                word_embed_proj_dim=16,
                max_position_embeddings=24,
                **_TOKENS,
            )
        )
    ),
    "llama": _causal("Llama"),
    "mistral": _causal("Mistral"),
    "mixtral": _causal("Mixtral", num_local_experts=2),
    "qwen2": _causal("Qwen2"),
    "qwen3": _causal("Qwen3", head_dim=8),
    "gemma": _causal("Gemma", head_dim=8),
    "gemma2": _causal("Gemma2", head_dim=8),
    "gemma3": Family(lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_DECODER, head_dim=8))),
    "phi3": _causal("Phi3"),
    "olmo": _causal("Olmo"),
    "olmo2": _causal("Olmo2"),
    "cohere": _causal("Cohere", use_qk_norm=True),
    "mamba": Family(
        lambda: hf.MambaForCausalLM(hf.MambaConfig(hidden_size=16, num_hidden_layers=LAYERS, **_TOKENS)),
        lambda batch: {"input_ids": torch.randint(3, VOCAB, (batch, 7))},
    ),
    "mamba2": Family(
        lambda: hf.Mamba2ForCausalLM(
            hf.Mamba2Config(
                hidden_size=16,
                num_hidden_layers=LAYERS,
                num_heads=4,
                head_dim=8,
                expand=2,
                n_groups=2,
                state_size=8,
                chunk_size=4,
                **_TOKENS,
            )
        ),
        lambda batch: {"input_ids": torch.randint(3, VOCAB, (batch, 7))},
    ),
    # Encoder and decoder
    "t5": Family(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                d_model=16, d_ff=24, num_layers=LAYERS, num_heads=2, d_kv=8, decoder_start_token_id=0, **_TOKENS
            )
        ),
        _pairs,
    ),
    "bart": Family(
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_SEQ2SEQ, max_position_embeddings=24)), _pairs
    ),
    "whisper": Family(
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(**_SEQ2SEQ, num_mel_bins=8, max_source_positions=6, max_target_positions=24)
        ),
        _sounds,
    ),
    # Vision
    "vit": Family(lambda: hf.ViTForImageClassification(hf.ViTConfig(**_BODY, image_size=8, patch_size=4)), _images),
    "clip": Family(_clip, lambda batch: {**_words(batch), **_images(batch)}),
}


QUICK = ("bert", "gpt2", "llama", "t5", "vit", "mixtral")
"""A family of each kind: what a table of many families runs on in the quick tests."""


def few(cases: Iterable[Any], quick: Sequence[str] = QUICK) -> list[Any]:
    """Parameters, each a family or beginning with one: those of families that are not in `quick` for the full run."""
    return [
        case if values[0] in quick else pytest.param(*values, marks=pytest.mark.full)
        for case in cases
        for values in [case if isinstance(case, tuple) else (case,)]
    ]


def spread(*axes: Iterable[Any]) -> list[Any]:
    """Parameters, every combination: quick ones in which each value occurs, the others for the full run."""
    values = [list(axis) for axis in axes]
    longest = max(map(len, values))
    quick = {tuple(place % len(axis) for axis in values) for place in range(longest)}
    return [
        pytest.param(
            *(value for _, value in each), marks=() if tuple(n for n, _ in each) in quick else pytest.mark.full
        )
        for each in product(*map(enumerate, values))
    ]


def seed_cpu(seed: int) -> None:
    """Seed what a CPU draws from. `torch.manual_seed` also keeps a stack trace for each device there is not: 2 ms."""
    torch.default_generator.manual_seed(seed)


def build(family: str, seed: int = 0) -> nn.Module:
    """The tiny model of a family, in evaluation mode, the same for the same seed."""
    seed_cpu(seed)
    return FAMILIES[family].model().eval()


def inputs(family: str, batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Inputs for the model of a family, the same for the same seed."""
    seed_cpu(seed)
    return FAMILIES[family].inputs(batch)


class UnheardOfNorm(nn.Module):
    """A user's own norm: by the mean absolute value, zero-centred, with a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() - x.float().median(-1, keepdim=True).values
        wide = wide / (wide.abs().mean(-1, keepdim=True) + 1e-6)
        return (wide * (1 + self.weight.float()) + self.bias.float()).to(x.dtype)


@dataclass(frozen=True)
class NormCase:
    """A norm, how wide a sample of its input is, and what `find_norms` must say of it."""

    norm: Callable[[], nn.Module]
    sample: tuple[int, ...] = (5, 24)
    offset: float = 0.0
    axis: int = -1
    gated: bool = False
    # What the fused kernel of torch computes in one pass differs from xhat * weight + bias in its last bit.
    fused: bool = False


def _hf_norm(model: str, name: str, *args: Any, **kwargs: Any) -> nn.Module:
    return getattr(getattr(hf.models, model), f"modeling_{model}").__dict__[name](*args, **kwargs)


def _mamba2_norm() -> nn.Module:
    """In groups, which transformers has since 5.20."""
    norm = hf.models.mamba2.modeling_mamba2.MambaRMSNormGated
    return norm(24, 8) if "group_size" in signature(norm).parameters else norm(24)


NORMS: dict[str, NormCase] = {
    "LayerNorm": NormCase(lambda: nn.LayerNorm(24), fused=True),
    "LayerNorm-2d": NormCase(lambda: nn.LayerNorm((4, 6)), sample=(5, 4, 6), fused=True),
    "LayerNorm-no-bias": NormCase(lambda: nn.LayerNorm(24, bias=False), fused=True),
    "RMSNorm": NormCase(lambda: nn.RMSNorm(24), fused=True),
    "GroupNorm": NormCase(lambda: nn.GroupNorm(4, 24), sample=(24, 5), axis=1, fused=True),
    "Llama": NormCase(lambda: _hf_norm("llama", "LlamaRMSNorm", 24)),
    "Gemma": NormCase(lambda: _hf_norm("gemma", "GemmaRMSNorm", 24), offset=1.0),
    "T5": NormCase(lambda: _hf_norm("t5", "T5LayerNorm", 24)),
    "OLMo2": NormCase(lambda: _hf_norm("olmo2", "Olmo2RMSNorm", 24)),
    "Cohere-heads": NormCase(lambda: _hf_norm("cohere", "CohereLayerNorm", (4, 6)), sample=(5, 4, 6)),
    "Mamba2-gated": NormCase(_mamba2_norm),
    "Qwen3Next-gated": NormCase(lambda: _hf_norm("qwen3_next", "Qwen3NextRMSNormGated", 24), gated=True, fused=True),
    "unheard-of": NormCase(lambda: UnheardOfNorm(24), offset=1.0),
}


def build_norm(case: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The norm of a case with random parameters."""
    seed_cpu(seed)
    norm = NORMS[case].norm().to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def norm_inputs(case: str, dtype: torch.dtype = torch.float32, batch: int = 3, seed: int = 1) -> tuple[Tensor, ...]:
    """Positional arguments for the norm of a case: its input and, if it wants one, its gate."""
    seed_cpu(seed)
    x = 2 * torch.randn(batch, *NORMS[case].sample)
    return tuple(t.to(dtype) for t in ((x, torch.randn_like(x)) if NORMS[case].gated else (x,)))
