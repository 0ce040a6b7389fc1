"""A tiny encoder with its tokenizer, and two tiny tasks, as folders."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, LlamaConfig, LlamaForCausalLM

WORDS = ("good", "bad", "film", "what", "who", "is", "the", "a", "not", "very")


# What PEFT and transformers say of their own code or of the stock method, which the arms run as it is.
THIRD_PARTY = (
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:Unsupported layer type:UserWarning",
    "ignore:Detected that the base layer has no bias term:UserWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for line in THIRD_PARTY:
                item.add_marker(pytest.mark.filterwarnings(line))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    # A folder of its own, since protocols are named after the model's and other tests make one of this name too.
    folder = tmp_path_factory.mktemp("models") / "tiny_bert0"
    folder.mkdir()
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)))
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256,  # the cost benchmarks make ids up
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_causal(tiny_bert: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny decoder with the tiny encoder's words."""
    folder = tmp_path_factory.mktemp("tiny_causal")
    BertTokenizerFast.from_pretrained(tiny_bert).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=32, pad_token_id=0, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_data")
    generator = torch.Generator().manual_seed(0)
    for task, column in (("sst2", "sentence"), ("trec", "text")):
        (folder / task).mkdir()
        for part, size in (("train", 40), ("validation", 12)):
            rows = [_row(column, generator) for _ in range(size)]
            (folder / task / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def _row(column: str, generator: torch.Generator) -> dict[str, object]:
    length = int(torch.randint(2, 8, (), generator=generator))
    words = [WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator)]
    return {column: " ".join(words), "label": int("good" in words)}
