"""Merging into the safetensors files of quantized models: norms change, every other byte stays."""

import json

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_lntune import LNTuningConfig, UnifiedConfig
from peft_lntune.cli.merge import merge_adapter
from peft_lntune.errors import AdapterFileError, ConfigError, UnsupportedError
from peft_lntune.interop import merge_into_safetensors
from peft_lntune.interop.safetensors_files import tensors_of
from tests import adapted
from tests.cli.saved import refused, run

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
INT = {"dtype": torch.int32}
# What each library writes in the place of a Linear's weight of 32 x 32 or so; the values do not matter here.
LAYOUTS = {
    "awq": lambda: {
        "qweight": torch.randint(9, (32, 4), **INT),
        "qzeros": torch.randint(9, (1, 4), **INT),
        "scales": torch.rand(1, 32).half(),
    },
    "gptq": lambda: {
        "qweight": torch.randint(9, (4, 32), **INT),
        "qzeros": torch.randint(9, (1, 4), **INT),
        "scales": torch.rand(1, 32).half(),
        "g_idx": torch.zeros(32, **INT),
    },
    "compressed-tensors": lambda: {
        "weight_packed": torch.randint(9, (32, 4), **INT),
        "weight_scale": torch.rand(32, 1).bfloat16(),
        "weight_shape": torch.tensor([32, 32]),
    },
    "fp8": lambda: {
        "weight": torch.rand(32, 32).to(torch.float8_e4m3fn),
        "weight_scale": torch.rand(32, 1),
        "input_scale": torch.rand(1),
    },
    "bitsandbytes": lambda: {
        "weight": torch.randint(255, (512, 1), dtype=torch.uint8),
        "weight.absmax": torch.rand(16),
        "weight.quant_map": torch.rand(16),
        "weight.quant_state.bitsandbytes__nf4": torch.randint(255, (80,), dtype=torch.uint8),
        "SCB": torch.rand(32),
    },
}
METHODS = {"bitsandbytes": "bitsandbytes", "awq": "awq", "gptq": "gptq", "fp8": "compressed-tensors"}


def write_model(folder, layout, dtype=torch.bfloat16, shards=1, seed=0):
    """A Llama in the layout of a quantizer."""
    torch.manual_seed(seed)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).to(dtype)
    state = {}
    for name, tensor in model.state_dict().items():
        module = name.rpartition(".")[0]
        if module.endswith("_proj"):
            state.update({f"{module}.{end}": value for end, value in LAYOUTS[layout]().items()})
        else:
            state[name] = torch.rand_like(tensor) if "norm" in name else tensor
    folder.mkdir()
    config = model.config.to_dict()
    config["quantization_config"] = {"quant_method": METHODS.get(layout, layout)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.pt").write_bytes(b"stale weights")
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    # One layer a shard, so that a shard without norms is there too.
    groups = {"1": "layers.0", "2": "layers.1.mlp", "3": ""}
    placed = {name: next(n for n, part in groups.items() if part in name) for name in state}
    for number in groups:
        save_file({k: v for k, v in state.items() if placed[k] == number}, folder / f"model-{number}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"model-{number}.safetensors" for name, number in placed.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(folder, base=None, config=None, dtype=torch.bfloat16, masks=None):
    adapter = get_peft_model(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).to(dtype), config or LNTuningConfig())
    adapter.peft_config["default"].base_model_name_or_path = base and str(base)
    if masks is not None:
        adapter.set_masks(masks)
    adapted.fill(adapter, "default")
    adapter.save_pretrained(folder)
    return adapter


def all_tensors(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_norms_change_and_nothing_else(layout, shards, tmp_path):
    base = write_model(tmp_path / "base", layout, shards=shards)
    adapter = write_adapter(tmp_path / "a", base)
    done = merge_into_safetensors(tmp_path / "a", base, tmp_path / "out")
    before, after = all_tensors(base), all_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    deltas = {k: v for k, v in adapter.state_dict().items() if ".lntune_weight.default.weight" in k}
    assert done.tensors == len(deltas) == 5
    assert done.entries == 160
    for name in before:
        key = f"base_model.model.{name.removesuffix('.weight')}.lntune_weight.default.weight"
        if key in deltas:
            expected = (before[name].double() + deltas[key].double()).float().bfloat16()
            torch.testing.assert_close(after[name], expected, rtol=0, atol=0)
        else:
            assert after[name].view(torch.uint8).equal(before[name].view(torch.uint8)), name
    names = {file.name for file in base.iterdir()} - {"notes.pt"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    for name in names:
        one, other = (base / name).read_bytes(), (tmp_path / "out" / name).read_bytes()
        differing = sum(a != b for a, b in zip(one, other, strict=True))
        assert differing <= 2 * 160
        assert differing == 0 or "norm" in str(list(load_file(base / name)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_sum_is_rounded_as_merging_does_it(dtype, tmp_path):
    """The same norms, merged by torch in a model and by us in a file."""
    base = write_model(tmp_path / "base", "gptq", dtype)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).to(dtype)
    model.load_state_dict({k: v for k, v in all_tensors(base).items() if "norm" in k}, strict=False)
    adapter = get_peft_model(model, LNTuningConfig())
    adapted.fill(adapter, "default")
    adapter.save_pretrained(tmp_path / "a")
    merge_into_safetensors(tmp_path / "a", base, tmp_path / "out")
    merged, found = adapter.merge_and_unload().state_dict(), all_tensors(tmp_path / "out")
    for name in merged:
        if "norm" in name:
            torch.testing.assert_close(found[name], merged[name], rtol=0, atol=0)


def test_masked_deltas_and_what_rounding_takes(tmp_path):
    base = write_model(tmp_path / "base", "awq")
    mask = torch.arange(32) < 3
    adapter = write_adapter(tmp_path / "a", base, masks={"model.norm.weight": mask})
    with torch.no_grad():
        adapter.base_model.model.model.norm.lntune_weight["default"].weight.fill_(1e-9)
    adapter.save_pretrained(tmp_path / "a")
    done = merge_into_safetensors(tmp_path / "a", base, tmp_path / "out")
    assert (done.tensors, done.entries, done.rounded_away) == (1, 3, 3)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_the_command_merges_by_bytes_what_is_quantized(tmp_path):
    base = write_model(tmp_path / "base", "compressed-tensors")
    write_adapter(tmp_path / "a", base)
    result = run("merge", tmp_path / "a", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "5 norm tensors changed, 160 entries; all other bytes are kept" in result.stdout
    assert merge_adapter(str(tmp_path / "a"), tmp_path / "again") == tmp_path / "again"
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second != (base / "model.safetensors").read_bytes()
    assert refused(run("merge", tmp_path / "a", tmp_path / "out"), "is not an empty folder")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (UnifiedConfig(parts=[LNTuningConfig(), LoraConfig(target_modules=["q_proj"])]), "norms: LoraConfig"),
        (LNTuningConfig(modules_to_save=["lm_head"]), "norms: lm_head"),
    ],
)
def test_more_than_norms(config, said, tmp_path):
    base = write_model(tmp_path / "base", "gptq")
    write_adapter(tmp_path / "a", base, config)
    with pytest.raises(UnsupportedError, match=said):
        merge_into_safetensors(tmp_path / "a", base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantized_weight_takes_no_delta(tmp_path):
    config = LNTuningConfig(target_modules=["q_proj"], tune="weight")
    write_adapter(tmp_path / "a", config=config)
    for layout, error, said in (("fp8", UnsupportedError, "is F8_E4M3"), ("gptq", AdapterFileError, "are not there")):
        base = write_model(tmp_path / layout, layout)
        with pytest.raises(error, match=said):
            merge_into_safetensors(tmp_path / "a", base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Norms that a base model on this machine holds quantized are read before anything else.
    place = next(p for p in tensors_of([tmp_path / "fp8/model.safetensors"]).values() if p.dtype is None)
    with pytest.raises(UnsupportedError, match="is F8_E4M3, and a delta can be added to float32"):
        place.read()


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_awq_moves_scales_into_norms(tmp_path):
    """So an adapter that was trained on the model before quantization does not fit the norms after it."""
    original = write_model(tmp_path / "original", "gptq")
    quantized = write_model(tmp_path / "awq", "awq", seed=1)
    write_adapter(tmp_path / "a", original)
    with pytest.raises(AdapterFileError, match=r"is not the norm that .* was trained on.*AWQ and SmoothQuant"):
        merge_into_safetensors(tmp_path / "a", quantized, tmp_path / "out")
    write_adapter(tmp_path / "b", "some/model")  # not on this machine: nothing to compare with
    with pytest.raises(UnsupportedError, match="quantized by AWQ, which moves scales into norms"):
        merge_into_safetensors(tmp_path / "b", quantized, tmp_path / "out")
    assert not merge_into_safetensors(tmp_path / "b", original, tmp_path / "out").base_checked
    write_adapter(tmp_path / "c", quantized)
    assert merge_into_safetensors(tmp_path / "c", quantized, tmp_path / "out2").base_checked


def test_names_with_another_prefix(tmp_path):
    """A checkpoint of the model alone, and one that wraps it."""
    base = write_model(tmp_path / "base", "gptq")
    write_adapter(tmp_path / "a")
    expected = None
    for number, (cut, put) in enumerate((("model.", ""), ("model.", "model.language_model."))):
        state = {put + k.removeprefix(cut) if k.startswith(cut) else k: v for k, v in all_tensors(base).items()}
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        merge_into_safetensors(tmp_path / "a", folder, tmp_path / f"out{number}")
        found = {k.removeprefix(put): v for k, v in all_tensors(tmp_path / f"out{number}").items() if "norm" in k}
        expected = expected or found
        assert all(found[k].equal(expected[k]) for k in expected)


def test_several_places_or_none(tmp_path):
    write_adapter(tmp_path / "a", config=LNTuningConfig(target_modules=["model.norm"]))
    for number, names in enumerate((["a.model.norm.weight", "b.model.norm.weight"], ["decoder.ln_f.weight"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({name: torch.ones(32) for name in names}, folder / "model.safetensors")
        said = "may be a.model.norm.weight and b.model" if number == 0 else "1 of its 1 tuned parameters are not there"
        with pytest.raises(AdapterFileError, match=said):
            merge_into_safetensors(tmp_path / "a", folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        ("cut", AdapterFileError, "is damaged or cut off"),
        ("header", AdapterFileError, "header is longer than the file"),
        ("shard", AdapterFileError, "which is not a file beside it"),
        ("outside", AdapterFileError, "names ../model-1.safetensors"),
        ("overlap", AdapterFileError, "share bytes"),
        ("none", UnsupportedError, "holds neither model.safetensors"),
        ("type", AdapterFileError, "from a model of type 'llama', and .* of type 'qwen2'"),
        ("folder", ConfigError, "is not a folder on this machine"),
        ("overflow", UnsupportedError, "cannot hold base plus delta"),
    ],
)
def test_damaged_and_wrong_models(damage, error, said, tmp_path):
    base = write_model(tmp_path / "base", "gptq", torch.float16, shards=3)
    adapter = write_adapter(tmp_path / "a", dtype=torch.float16)
    shard, index = base / "model-1.safetensors", base / "model.safetensors.index.json"
    content = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(content[:-10])
    elif damage == "header":
        shard.write_bytes(b"\xff" * 7 + b"\x00" + content[8:])
    elif damage == "shard":
        shard.unlink()
    elif damage == "outside":
        index.write_text(index.read_text().replace("model-1", "../model-1"))
    elif damage == "overlap":
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        norms = [name for name in header if "layernorm" in name][:2]
        header[norms[0]]["data_offsets"] = header[norms[1]]["data_offsets"]
        listed = json.dumps(header).encode()
        shard.write_bytes(len(listed).to_bytes(8, "little") + listed + content[8 + size :])
    elif damage == "none":
        index.unlink()
    elif damage == "type":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    elif damage == "overflow":
        with torch.no_grad():
            adapter.base_model.model.model.norm.lntune_weight["default"].weight.fill_(1e6)
        adapter.save_pretrained(tmp_path / "a")
    with pytest.raises(error, match=said):
        merge_into_safetensors(tmp_path / "a", tmp_path / "no" if damage == "folder" else base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_metadata_stays(tmp_path):
    base = write_model(tmp_path / "base", "awq")
    write_adapter(tmp_path / "a", base)
    merge_into_safetensors(tmp_path / "a", base, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.end_to_end
def test_a_model_that_torchao_quantized(tmp_path):
    """Saved by transformers, merged by bytes, loaded again: the logits of torch's own merge."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is missing")
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).bfloat16().save_pretrained(tmp_path / "plain")
    config = hf.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    options = {"device_map": "cpu", "dtype": torch.bfloat16}
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, **options)
    model.save_pretrained(tmp_path / "base")
    adapter = get_peft_model(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options), LNTuningConfig())
    adapted.fill(adapter, "default")
    adapter.eval().save_pretrained(tmp_path / "a")
    merge_adapter(str(tmp_path / "a"), tmp_path / "out", str(tmp_path / "base"))
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        plain = adapter.merge_and_unload()(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, plain, rtol=0, atol=0)


def test_two_shards_with_one_tensor(tmp_path):
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file in files:
        save_file({"norm.weight": torch.ones(2)}, file)
    with pytest.raises(AdapterFileError, match=r"both hold norm\.weight"):
        tensors_of(files)
