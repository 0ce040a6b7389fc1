"""What a bank holds is its rows and nothing that grows with the adapters beside them, so its memory can be computed."""

import torch
import transformers as hf

from benchmarks.harness.counting import PeakBytes
from peft_lntune import AdapterBank
from tests.adapted import adapt

MANY = 10_000


def test_minilm_takes_its_rows_and_no_more():
    config = hf.BertConfig(  # the norms of all-MiniLM-L6-v2, and little else
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=8, vocab_size=9
    )
    model = hf.BertModel(config, add_pooling_layer=False).eval()
    source = adapt(hf.BertModel(config, add_pooling_layer=False), "a")
    alive = {}
    for size in (20, 60):
        with PeakBytes() as counter:
            bank = AdapterBank(model, capacity=size)
            bank.add_many({str(number): (source, "a") for number in range(size)})
            alive[size] = counter.alive
        assert len(bank) == size
    row = (alive[60] - alive[20]) // 40
    assert alive[60] - alive[20] == 40 * row
    assert row == 4 * 2 * 13 * 384 == bank.row_bytes
    assert alive[20] == 21 * row  # one for the base model
    assert (MANY + 1) * row <= 0.4e9


def test_a_llama_of_3b_in_bfloat16():
    """On the meta device, which has sizes and no memory; a bank beside it is as large as beside the real model."""
    config = hf.LlamaConfig(  # Llama 3.2 3B
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    assert round(model.num_parameters() / 1e9, 1) == 3.2
    bank = AdapterBank(model, capacity=MANY, dtype=torch.bfloat16)
    assert bank.row_bytes == 2 * (2 * 28 + 1) * 3072 == 350_208
    held = sum(stack.values.untyped_storage().nbytes() for stack in bank._stacks)
    assert held == (MANY + 1) * bank.row_bytes <= 4e9
