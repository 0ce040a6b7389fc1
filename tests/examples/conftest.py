"""Makes the examples importable as scripts import each other, and the tiny models they run on here."""

import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    logging,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the demo's training sentences."""
    from demo_data import sentences

    words = sorted({word for row in sentences("train", 200, seed=0) for word in row["sentence"].split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> str:
    """The folder of a random two-layer BERT with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_bert")
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **SMALL)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    """The folder of a random two-layer Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, **SMALL)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    """Examples write into the test's folder and quieten the libraries for their own run only."""
    monkeypatch.chdir(tmp_path)
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()
