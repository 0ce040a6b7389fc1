"""PEFT's stock format from a saved adapter."""

import pytest
import torch
import transformers as hf
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_lntune import LNTuningConfig
from tests import adapted, cases
from tests.cli.saved import combined, refused, run, save_adapter, save_model
from tests.cli.test_merge import outputs, with_adapter

# PEFT warns of every norm it adapts itself.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type.*LayerNorm:UserWarning")


def test_peft_alone_reads_it(tmp_path):
    model = save_model(tmp_path / "model")
    adapter = save_adapter(tmp_path / "a", model)
    result = run("export", adapter, tmp_path / "out")
    assert result.exit_code == 0
    assert result.stdout == f"The adapter in PEFT's format is in {tmp_path / 'out'}.\n"
    assert PeftConfig.from_pretrained(str(tmp_path / "out")).peft_type == "LN_TUNING"
    base = hf.AutoModelForSequenceClassification.from_pretrained(model)
    stock = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(outputs(stock), outputs(with_adapter(model, adapter)), rtol=1e-5, atol=1e-5)


def test_parts_that_are_no_norms(tmp_path):
    adapter = save_adapter(tmp_path / "a", save_model(tmp_path / "model"), config=combined())
    assert refused(run("export", adapter, tmp_path / "out"), "LN_TUNING format cannot hold")
    assert not (tmp_path / "out").exists()


def test_a_stock_adapter_is_no_adapter_of_ours(tmp_path):
    adapter = save_adapter(tmp_path / "a", save_model(tmp_path / "model"))
    run("export", adapter, tmp_path / "out")
    assert refused(run("export", tmp_path / "out", tmp_path / "again"), "not one of peft_lntune")


def save_causal(folder, **options):
    """A tiny Llama with a tokenizer, and an adapter of all 16 entries per norm."""
    save_model(folder / "model")  # for its tokenizer
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**cases._DECODER)).save_pretrained(folder / "model")
    base = hf.AutoModelForCausalLM.from_pretrained(folder / "model")
    ours = get_peft_model(base, LNTuningConfig(task_type="CAUSAL_LM", **options))
    adapted.fill(ours, "default")
    ours.save_pretrained(folder / "adapter")
    return ours.eval(), [folder / "adapter", folder / "out", "--model", folder / "model"]


def test_lora(tmp_path):
    ours, arguments = save_causal(tmp_path)
    (tmp_path / "texts.txt").write_text("the film is very good " * 80)
    result = run("export", "--lora", "--texts", tmp_path / "texts.txt", *arguments)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"LoRA of rank 16 in {tmp_path / 'out'}, exact: no norm has more tuned entries")
    lora = PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "out")
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        torch.testing.assert_close(lora(ids).logits, ours(ids).logits)


def test_lora_of_a_rank_that_is_too_small_says_what_is_lost(tmp_path):
    _, arguments = save_causal(tmp_path)
    result = run("export", "--lora", "--rank", 4, *arguments)
    assert result.exit_code == 0
    assert "truncated" in result.stdout
    assert "\nrank" in result.stdout


@pytest.mark.parametrize(("options", "zeros"), [((), True), (("--tuned-layers",), False)])
def test_lora_of_some_layers(options, zeros, tmp_path):
    _, arguments = save_causal(tmp_path, layers_to_transform=[0], roles=["attention"])
    result = run("export", "--lora", *options, *arguments)
    assert result.exit_code == 0
    assert ("3 linear maps have LoRA of zeros" in result.stdout) == zeros
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("layers.1" in name for name in names) == zeros


def test_options_of_lora(tmp_path):
    result = run("export", "--rank", 4, tmp_path, tmp_path / "out")
    assert result.exit_code == 2
    assert "--rank has no effect without --lora" in result.stderr
    result = run("export", "--tuned-layers", tmp_path, tmp_path / "out")
    assert "--every-layer has no effect without --lora" in result.stderr
    adapter = save_adapter(tmp_path / "a", save_model(tmp_path / "model"))
    assert refused(run("export", "--lora", adapter, tmp_path / "out"), "in ways that LoRA cannot hold")
    assert not (tmp_path / "out").exists()


def test_into_a_gguf_file_and_back(tmp_path):
    pytest.importorskip("gguf", reason="the package gguf is missing: pip install 'peft-lntune[gguf]'")
    from tests.interop.test_gguf_file import adapter_of, model_of, write_gguf

    model = model_of("llama")
    file, adapter, tuned = tmp_path / "m.gguf", tmp_path / "a", tmp_path / "t.gguf"
    before = write_gguf(model, file, "llama").read_bytes()
    adapter_of(model, adapter)
    result = run("export", adapter, "--gguf", file, "--out", tuned)
    assert result.exit_code == 0, result.output
    assert f"{tuned}: 5 norm tensors changed, 160 entries; all other bytes are kept." in result.stdout
    assert refused(run("export", adapter, "--gguf", file, "--out", tuned), "nothing is overwritten")
    result = run("export", adapter, "--gguf", file, "--in-place")
    assert f"peft-lntune export --gguf {file} --undo" in result.stdout
    assert file.read_bytes() == tuned.read_bytes() != before
    assert refused(run("export", adapter, "--gguf", file, "--in-place"), "already holds the adapter")
    result = run("export", "--gguf", file, "--in-place", "--undo")
    assert result.stdout.startswith(f"{file} is restored; the adapter {adapter}")
    assert file.read_bytes() == before
    assert refused(run("export", "--gguf", file, "--undo"), "nothing to undo")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing argument 'ADAPTER'"),
        (["a"], "Missing argument 'OUT'"),
        (["a", "b", "--out", "c"], "--out has no effect without --gguf"),
        (["a", "b", "--in-place"], "--in-place has no effect without --gguf"),
        (["a", "b", "--undo"], "--undo has no effect without --gguf"),
        (["--gguf", "FILE", "--in-place"], "Missing argument 'ADAPTER'"),
        (["a", "--gguf", "FILE"], "needs either --out FILE"),
        (["a", "--gguf", "FILE", "--out", "c", "--in-place"], "needs either --out FILE"),
        (["a", "b", "--gguf", "FILE", "--in-place"], "takes no argument OUT"),
        (["a", "--ln-tuning", "--gguf", "FILE", "--in-place"], "Give one of them"),
        (["a", "--gguf", "FILE", "--undo"], "--undo takes --gguf FILE alone"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, said, tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    result = run("export", *[file if one == "FILE" else one for one in arguments])
    assert result.exit_code == 2
    assert said in result.stderr
