"""The plugin for vLLM, here without vLLM: settings, names, conversion, memory. `make test-vllm` runs it in vLLM."""

import asyncio
import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import peft_lntune_vllm
from peft_lntune import LNTuningConfig
from peft_lntune_vllm import NormResolver, Settings, convert

ENTRIES = 3


@pytest.fixture
def base(tmp_path):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, vocab_size=40
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def save_adapter(base, folder, seed=0, roles=("attention", "ffn")):
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LNTuningConfig(task_type="CAUSAL_LM", roles=list(roles))
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in model.parameters():
            if delta.requires_grad:
                delta[:ENTRIES] = torch.randn(ENTRIES, generator=generator)
    model.save_pretrained(folder)


@pytest.fixture
def resolver(base, tmp_path, monkeypatch):
    """A resolver whose conversions run in this process and are counted."""
    request = ModuleType("vllm.lora.request")
    request.LoRARequest = SimpleNamespace
    for name, module in {"vllm": ModuleType("vllm"), "vllm.lora": ModuleType("vllm.lora")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    (tmp_path / "adapters").mkdir()
    made = NormResolver(Settings(tmp_path / "adapters", (), 8, False, tmp_path / "cache"))
    made.conversions = 0

    async def here(base, folder, target):
        made.conversions += 1
        convert(base, str(folder), str(target), made.settings.max_rank, made.settings.truncate)

    made._convert = here
    return made


def ask(resolver, base, name):
    return asyncio.run(resolver.resolve_lora(base, name))


def logits(base, adapter):
    ids = torch.arange(9)[None]
    with torch.no_grad():
        return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()(ids).logits.double()


def test_an_adapter_becomes_lora_with_its_answers(resolver, base, tmp_path):
    save_adapter(base, tmp_path / "adapters" / "french")
    found = ask(resolver, base, "french")
    assert found.lora_name == "french"
    config = json.loads((tmp_path / "cache" / found.lora_path.rpartition("/")[2] / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["rank_pattern"]) == ("LORA", 8, {})
    wanted = logits(base, tmp_path / "adapters" / "french")
    torch.testing.assert_close(logits(base, found.lora_path), wanted, rtol=0, atol=1e-6)  # float32, two layers
    assert (wanted - LlamaForCausalLM.from_pretrained(base)(torch.arange(9)[None]).logits).abs().max() > 1e-3


def test_it_is_converted_once_until_it_changes(resolver, base, tmp_path):
    save_adapter(base, tmp_path / "adapters" / "french")
    first = ask(resolver, base, "french").lora_path
    assert ask(resolver, base, "french").lora_path == first
    assert resolver.conversions == 1
    save_adapter(base, tmp_path / "adapters" / "french", seed=1)
    assert ask(resolver, base, "french").lora_path != first
    assert resolver.conversions == 2


def test_a_refusal_is_logged_once_until_the_adapter_changes(resolver, base, tmp_path, caplog):
    object.__setattr__(resolver.settings, "max_rank", 4)
    save_adapter(base, tmp_path / "adapters" / "french")
    assert ask(resolver, base, "french") is None
    assert ask(resolver, base, "french") is None
    assert resolver.conversions == 1
    assert [record.getMessage() for record in caplog.records if "exact at rank 8" in record.getMessage()]
    assert not list((tmp_path / "cache").iterdir())
    save_adapter(base, tmp_path / "adapters" / "french", seed=1)
    ask(resolver, base, "french")
    assert resolver.conversions == 2


def test_truncation_is_asked_for(base, tmp_path):
    save_adapter(base, tmp_path / "a")
    assert "truncated" in convert(base, str(tmp_path / "a"), str(tmp_path / "made"), 2, True)
    ranks = {
        len(tensor)
        for name, tensor in load_file(tmp_path / "made" / "adapter_model.safetensors").items()
        if "_A" in name
    }
    assert ranks == {2}


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../adapters/french", "/french", "french/..", "french\n", "missing", "lora"]
)
def test_names_that_are_none_of_ours(resolver, base, tmp_path, name):
    save_adapter(base, tmp_path / "adapters" / "french")
    (tmp_path / "adapters" / "lora").mkdir()
    (tmp_path / "adapters" / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert ask(resolver, base, name) is None
    assert resolver.conversions == 0


def test_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("VLLM_LORA_RESOLVER_HF_REPO_LIST", "org/one, org/two")
    monkeypatch.setenv("PEFT_LNTUNE_MAX_RANK", "64")
    monkeypatch.setenv("PEFT_LNTUNE_CACHE", str(tmp_path / "cache"))
    assert Settings.from_environment() == Settings(tmp_path, ("org/one", "org/two"), 64, False, tmp_path / "cache")
    for name, value in {"PEFT_LNTUNE_MAX_RANK": "many", "PEFT_LNTUNE_TRUNCATE": "yes"}.items():
        with monkeypatch.context() as context:
            context.setenv(name, value)
            with pytest.raises(ValueError, match=f"{name}='{value}' should be"):
                Settings.from_environment()


def test_the_module_imports_the_standard_library_alone():
    code = (
        "import sys; before = set(sys.modules); import peft_lntune_vllm; "
        "more = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(more - set(sys.stdlib_module_names) - {'__mp_main__'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['peft_lntune_vllm']"
    assert peft_lntune_vllm.register.__module__ == "peft_lntune_vllm"
