"""Small random models under the Hub names that PEFT's tests load, in a private cache.

Built by `python -m tests.peft_suite.tiny_models HOME`. The tests then run with HF_HUB_OFFLINE=1 and find the models as
if they had been downloaded.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from .fetch import move

REVISION = "0" * 40  # stands where a commit hash stands in a real cache

Sizes = dict[str, Any]
SIZES: Sizes = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
BERT: Sizes = SIZES | {"pad_token_id": 0}
DEBERTA: Sizes = BERT | {"relative_attention": True, "position_biased_input": True, "pos_att_type": ["c2p"]}
LLAMA: Sizes = SIZES | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GEMMA: Sizes = LLAMA | {"head_dim": 8}
GPT2: Sizes = {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
GPTJ: Sizes = GPT2 | {"rotary_dim": 4}
OPT: Sizes = SIZES | {"word_embed_proj_dim": 32, "ffn_dim": 64}
T5: Sizes = {
    "vocab_size": 1024,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART: Sizes = {"vocab_size": 1024, "d_model": 32, "max_position_embeddings": 128} | {
    f"{half}_{size}": number
    for half in ("encoder", "decoder")
    for size, number in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}

# Hub name: class in transformers, arguments of its config
MODELS: dict[str, tuple[str, Sizes]] = {
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", GEMMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", LLAMA),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", BERT),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", DEBERTA),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", GPTJ),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", OPT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", BERT),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", T5),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", LLAMA),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
}
LORA_CONFIG = (
    "peft-internal-testing/tiny-opt-lora-revision"  # test_config.py loads this adapter's config, branch `test`
)


def build_hub(home: Path) -> None:
    """Fill `home` with the layout of a Hugging Face cache; an interrupted call leaves nothing behind."""
    if home.is_dir():
        return
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
        new = Path(scratch, "home")
        for name, (architecture, sizes) in MODELS.items():
            _write_model(_snapshot(new, name, "main"), architecture, sizes)
        adapter = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"]}
        (_snapshot(new, LORA_CONFIG, "test") / "adapter_config.json").write_text(json.dumps(adapter))
        move(new, home)


def _snapshot(home: Path, name: str, branch: str) -> Path:
    repository = home / "hub" / ("models--" + name.replace("/", "--"))
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / branch).write_text(REVISION)
    return snapshot


def _write_model(folder: Path, architecture: str, sizes: Sizes) -> None:
    import torch  # here, so that the names above can be read in no time
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.ndim > 1
            ):  # the usual 0.02 makes so small a model nearly constant, and the tests compare outputs
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)


if __name__ == "__main__":
    build_hub(Path(sys.argv[1]))
