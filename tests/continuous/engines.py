"""A tiny causal model whose adapters say different things, small engines, and what each adapter says alone."""

from typing import Any

import torch
import transformers as hf
from peft import PeftModel

from peft_lntune import AdapterBank
from tests.adapted import adapt

NEW = 6
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]  # two full blocks of the cache and one token


def speaking(*adapters: str, seed: int = 0, **options: Any) -> PeftModel:
    """A PeftModel on a Llama with large random weights, so that small changes change the tokens."""
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = hf.LlamaForCausalLM(config).eval().requires_grad_(False)
    return adapt(model, *(adapters or ("a", "b")), std=0.6, task_type="CAUSAL_LM", **options)


def banked(*adapters: str) -> tuple[PeftModel, Any, AdapterBank]:
    """The PeftModel, a plain model of its own, and a bank attached to this one with the same adapters."""
    tuned, plain = speaking(*adapters), speaking("x").unload()
    bank = AdapterBank(plain)
    bank.add_many({name: (tuned, name) for name in tuned.peft_config})
    bank.attach()
    return tuned, plain, bank


def generation(**options: Any) -> hf.GenerationConfig:
    return hf.GenerationConfig(
        **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0, **options}
    )


def small(**options: Any) -> hf.ContinuousBatchingConfig:
    """An engine of few small blocks, so that prompts fill some."""
    return hf.ContinuousBatchingConfig(**{"page_size": 4, "num_blocks": 64, "max_batch_tokens": 64, **options})


def alone(tuned: PeftModel, prompt: list[int], name: str, **options: Any) -> list[int]:
    """The tokens of a greedy run of one prompt with one adapter, by `generate`."""
    config = hf.GenerationConfig(**{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options})
    ids = torch.tensor([prompt])
    if name == "__base__":
        with tuned.disable_adapter():
            return tuned.generate(input_ids=ids, generation_config=config)[0, len(prompt) :].tolist()
    before = tuned.active_adapter
    tuned.set_adapter(name)
    try:
        return tuned.generate(input_ids=ids, generation_config=config)[0, len(prompt) :].tolist()
    finally:
        tuned.set_adapter(before)


def tokens(outputs: dict[str, Any]) -> list[list[int]]:
    """The generated tokens of each request, after checking that none failed."""
    assert [output.error for output in outputs.values()] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs.values()]


def results(manager: Any, *ids: str) -> list[list[int]]:
    """Wait for these requests."""
    found: dict[str, Any] = {}
    while not set(ids) <= found.keys():
        output = manager.get_result(timeout=20)
        assert output is not None, "the engine gave no result"
        found[output.request_id] = output
    return tokens({request: found[request] for request in ids})
