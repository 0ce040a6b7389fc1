"""Deltas in the norms of GGUF files. The oracle is torch's own merge of the same adapter."""

import sys

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from peft_lntune import LNTuningConfig, UnifiedConfig
from peft_lntune.errors import AdapterFileError, ConfigError, UnsupportedError
from peft_lntune.interop import edit_gguf, restore_gguf, to_gguf
from peft_lntune.interop.gguf_file import ARCHITECTURES
from peft_lntune.storage.byte_edits import undo_file
from tests import adapted

gguf = pytest.importorskip("gguf", reason="the package gguf is missing: pip install 'peft-lntune[gguf]'")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
KINDS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES)),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**SIZES)),
    "olmo2": (hf.Olmo2ForCausalLM, hf.Olmo2Config(**SIZES)),
    "nemotron": (hf.NemotronForCausalLM, hf.NemotronConfig(**SIZES)),
    "command-r": (hf.CohereForCausalLM, hf.CohereConfig(**SIZES, use_qk_norm=True)),
    "bert": (
        hf.BertForSequenceClassification,
        hf.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
    ),
}


# Written down here too, as the table is what is tested.
SHIFTS = {"gemma": 1.0, "gemma2": 1.0, "gemma3": 1.0, "nemotron": 1.0}


def model_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    made, config = KINDS[kind]
    model = made(config)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            torch.nn.init.normal_(parameter, 0.7, 0.2)
    return model


def write_gguf(model, file, architecture, shift=0.0, norm_type=None, endianess=None, sizes=None, **fields):
    """As the converter does it: matrices in Q4_0, norms in float32, the shift added to the weights of norms."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], 2)
    writer = gguf.GGUFWriter(file, architecture, endianess=endianess or gguf.GGUFEndian.LITTLE)
    writer.add_block_count(2)
    for field, value in (sizes or {}).items():  # for transformers, which makes a model of the file
        writer.add_uint32(f"{architecture}.{field}", value)
    for field, value in fields.items():
        writer.add_uint16(field.replace("_", "."), value)
    for name, tensor in model.state_dict().items():
        own = names.get_name(name.removeprefix("bert."), (".weight", ".bias"))
        if own is None:
            continue
        if "norm" in own and own.endswith("weight"):
            tensor = tensor + shift
        kind = gguf.GGMLQuantizationType.F32 if tensor.dim() == 1 or "norm" in own else gguf.GGMLQuantizationType.Q4_0
        if norm_type is not None and "norm" in own:
            kind = norm_type
        writer.add_tensor(own, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def adapter_of(model, folder, config=None, masks=None, base=None):
    adapter = get_peft_model(model, config or LNTuningConfig())
    adapter.peft_config["default"].base_model_name_or_path = base and str(base)
    if masks is not None:
        adapter.set_masks(masks)
    adapted.fill(adapter, "default")
    adapter.save_pretrained(folder)
    return adapter


def tensors(file):
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(file).tensors}


def changed_bytes(one, other):
    """Positions of the bytes that differ between two files."""
    a, b = one.read_bytes(), other.read_bytes()
    assert len(a) == len(b)
    return {at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y}


@pytest.mark.parametrize("kind", KINDS)
def test_the_norms_are_those_of_the_merged_model(kind, tmp_path):
    shift = SHIFTS.get(kind, 0.0)
    model = model_of(kind)
    model.save_pretrained(tmp_path / "base")
    file = write_gguf(model, tmp_path / "base.gguf", kind, shift)
    adapter = adapter_of(model, tmp_path / "a", base=tmp_path / "base")
    done = to_gguf(tmp_path / "a", file, tmp_path / "tuned.gguf")
    merged = adapter.merge_and_unload()
    oracle = tensors(write_gguf(merged, tmp_path / "merged.gguf", kind, shift))
    found, before = tensors(tmp_path / "tuned.gguf"), tensors(file)
    norms = {name for name in before if "norm" in name}
    assert {name for name in before if before[name] != found[name]} == norms
    assert (done.tensors, done.rounded_away, done.base_checked) == (len(norms), 0, True)
    assert done.entries == sum(len(before[name]) // 4 for name in norms)
    if not shift:
        assert found == oracle
        return
    for name in norms:  # (w + d) + 1 and (w + 1) + d round at different places
        a, b = (torch.frombuffer(bytearray(one[name]), dtype=torch.float32) for one in (found, oracle))
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


def test_masked_deltas_touch_their_entries_alone(tmp_path):
    model = model_of("llama")
    file = write_gguf(model, tmp_path / "base.gguf", "llama")
    mask = torch.zeros(32, dtype=torch.bool)
    mask[[3, 17]] = True
    adapter_of(model, tmp_path / "a", masks={"model.layers.1.input_layernorm.weight": mask})
    done = to_gguf(tmp_path / "a", file, tmp_path / "tuned.gguf")
    assert (done.tensors, done.entries, done.base_checked) == (1, 2, False)
    at = next(int(t.data_offset) for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.attn_norm.weight")
    assert {(byte - at) // 4 for byte in changed_bytes(file, tmp_path / "tuned.gguf")} == {3, 17}
    assert "were not compared" in str(done)


def test_in_place_and_back(tmp_path):
    model = model_of("llama")
    file = write_gguf(model, tmp_path / "m.gguf", "llama")
    before = file.read_bytes()
    adapter_of(model, tmp_path / "a")
    to_gguf(tmp_path / "a", file, tmp_path / "tuned.gguf")
    edit_gguf(tmp_path / "a", file)
    assert file.read_bytes() == (tmp_path / "tuned.gguf").read_bytes() != before
    for again in (lambda: edit_gguf(tmp_path / "a", file), lambda: to_gguf(tmp_path / "a", file, tmp_path / "b.gguf")):
        with pytest.raises(ConfigError, match="already holds the adapter"):
            again()
    assert str(tmp_path / "a") in restore_gguf(file)
    assert file.read_bytes() == before
    assert not undo_file(file).exists()


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_norms_in_half_precision_are_rounded_once(name, tmp_path):
    model = model_of("llama")
    file = write_gguf(model, tmp_path / "m.gguf", "llama", norm_type=gguf.GGMLQuantizationType[name])
    adapter = adapter_of(model, tmp_path / "a")
    with torch.no_grad():
        adapter.base_model.model.model.norm.lntune_weight["default"].weight.fill_(1e-6)
    adapter.save_pretrained(tmp_path / "a")
    done = to_gguf(tmp_path / "a", file, tmp_path / "tuned.gguf")
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[name]
    pairs = [
        [
            torch.frombuffer(bytearray(one[own]), dtype=dtype)
            for one in (tensors(file), tensors(tmp_path / "tuned.gguf"))
        ]
        for own in tensors(file)
        if "norm" in own
    ]
    assert done.rounded_away == sum(int((a == b).sum()) for a, b in pairs) >= 32  # all deltas differ from 0
    assert f"{done.rounded_away} entries did not change" in str(done)
    own, delta = "model.layers.0.input_layernorm", adapter.base_model.model.model.layers[0].input_layernorm
    expected = (
        (
            model_of("llama").get_submodule(own).weight.to(dtype).double()
            + delta.deltas("weight")["default"].weight.double()
        )
        .to(torch.float32)
        .to(dtype)
    )
    found = torch.frombuffer(bytearray(tensors(tmp_path / "tuned.gguf")["blk.0.attn_norm.weight"]), dtype=dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def other_base(tmp_path, model):
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    model.save_pretrained(tmp_path / "other")
    return {"model": tmp_path / "other"}


LORA = UnifiedConfig(parts=[LNTuningConfig(), LoraConfig(target_modules=["q_proj"])])
REFUSED = {
    "lora": ({"config": LORA}, {}, UnsupportedError, r"more than deltas of norms: LoraConfig"),
    "head": ({"config": LNTuningConfig(modules_to_save=["lm_head"])}, {}, UnsupportedError, "more than .*: lm_head"),
    "no norm": (
        {"config": LNTuningConfig(target_modules=["q_proj"], tune="weight")},
        {},
        AdapterFileError,
        r"tunes model.layers.0.self_attn.q_proj.weight, for which .* has no norm",
    ),
    "quantized norms": (
        {},
        {"norm_type": gguf.GGMLQuantizationType.Q8_0},
        UnsupportedError,
        "is Q8_0, and a delta can be added to float32",
    ),
    "split": ({}, {"split_count": 3}, UnsupportedError, "one of 3 parts .*llama-gguf-split --merge"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case, tmp_path):
    options, fields, error, said = REFUSED[case]
    model = model_of("llama")
    file = write_gguf(model, tmp_path / "m.gguf", "llama", **fields)
    before = file.read_bytes()
    adapter_of(model, tmp_path / "a", **options)
    for call in (lambda: edit_gguf(tmp_path / "a", file), lambda: to_gguf(tmp_path / "a", file, tmp_path / "t.gguf")):
        with pytest.raises(error, match=said):
            call()
    assert file.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "m.gguf"]


def test_another_model(tmp_path):
    model = model_of("llama")
    file = write_gguf(model, tmp_path / "m.gguf", "llama")
    olmo = write_gguf(model_of("olmo2"), tmp_path / "o.gguf", "olmo2")
    wide = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, "hidden_size": 64}))
    wide = write_gguf(wide, tmp_path / "w.gguf", "llama")
    unknown = write_gguf(model, tmp_path / "p.gguf", "plamo2")
    (tmp_path / "x.gguf").write_bytes(file.read_bytes()[:5000])
    adapter_of(model, tmp_path / "a")
    cases = [
        (olmo, AdapterFileError, "type 'llama', and .* of architecture 'olmo2', which is olmo2 or olmo3"),
        (wide, AdapterFileError, r"shape \(32,\), and this file holds one of shape \(64,\)"),
        (unknown, UnsupportedError, "'plamo2'. Its conversion changes norms: it adds another constant"),
        (tmp_path / "x.gguf", AdapterFileError, "is not a GGUF file, or is damaged"),
        (tmp_path / "missing.gguf", ConfigError, "is not a file"),
    ]
    for one, error, said in cases:
        with pytest.raises(error, match=said):
            to_gguf(tmp_path / "a", one, tmp_path / "t.gguf")
    with pytest.raises(
        AdapterFileError, match=r"output_norm.weight in .* differs from model.norm.weight .* by up to 0.00"
    ):
        to_gguf(tmp_path / "a", file, tmp_path / "t.gguf", **other_base(tmp_path, model_of("llama")))
    with pytest.raises(ConfigError, match="is not a folder on this machine"):
        to_gguf(tmp_path / "a", file, tmp_path / "t.gguf", model=tmp_path / "nowhere")
    assert not (tmp_path / "t.gguf").exists()


def test_a_file_of_another_machine(tmp_path):
    model = model_of("llama")
    file = write_gguf(model, tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    adapter_of(model, tmp_path / "a")
    with pytest.raises(UnsupportedError, match="byte order of another machine"):
        to_gguf(tmp_path / "a", file, tmp_path / "t.gguf")


def test_deltas_of_zero_are_not_lost(tmp_path):
    model = model_of("llama")
    file = write_gguf(model, tmp_path / "m.gguf", "llama", norm_type=gguf.GGMLQuantizationType.BF16)
    adapter = adapter_of(model, tmp_path / "a")
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    adapter.base_model.model.model.norm.lntune_weight["default"].weight.data[3] = 1e-9
    adapter.save_pretrained(tmp_path / "a")
    assert to_gguf(tmp_path / "a", file, tmp_path / "t.gguf").rounded_away == 1


def test_a_half_precision_file_of_a_float32_base(tmp_path):
    model = model_of("llama")
    model.save_pretrained(tmp_path / "base")
    file = write_gguf(model, tmp_path / "m.gguf", "llama", norm_type=gguf.GGMLQuantizationType.F16)
    adapter_of(model, tmp_path / "a", base=tmp_path / "base")
    assert to_gguf(tmp_path / "a", file, tmp_path / "t.gguf").base_checked


def test_other_shapes(tmp_path):
    wide = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, "hidden_size": 64}))
    wide.save_pretrained(tmp_path / "wide")
    mask = torch.zeros(32, dtype=torch.bool)
    mask[3] = True
    file = write_gguf(model_of("llama"), tmp_path / "m.gguf", "llama")
    adapter_of(model_of("llama"), tmp_path / "a")
    with pytest.raises(AdapterFileError, match=r"of shape \(64,\), and this file holds one of shape \(32,\)"):
        to_gguf(tmp_path / "a", file, tmp_path / "t.gguf", model=tmp_path / "wide")
    adapter_of(model_of("llama"), tmp_path / "b", masks={"model.norm.weight": mask})
    with pytest.raises(AdapterFileError, match=r"mask should be of shape \(8,\), .* but is of shape \(4,\)"):
        to_gguf(tmp_path / "b", write_gguf(wide, tmp_path / "w.gguf", "llama"), tmp_path / "t.gguf")


def test_two_parameters_that_are_one_tensor(tmp_path):
    model = torch.nn.Module()
    model.norm, model.model = torch.nn.RMSNorm(32), torch.nn.Module()
    model.model.norm = torch.nn.RMSNorm(32)
    adapter_of(model, tmp_path / "a")
    file = write_gguf(model_of("llama"), tmp_path / "m.gguf", "llama")
    with pytest.raises(AdapterFileError, match="two parameters that are one tensor"):
        to_gguf(tmp_path / "a", file, tmp_path / "t.gguf")


def test_a_named_base_without_weights(tmp_path):
    """Without weights nothing is compared: as the user has named the folder, that is an error."""
    model = model_of("llama")
    file = write_gguf(model, tmp_path / "m.gguf", "llama")
    model.config.save_pretrained(tmp_path / "empty")
    adapter_of(model, tmp_path / "a", base=tmp_path / "empty")
    assert not to_gguf(tmp_path / "a", file, tmp_path / "t.gguf").base_checked
    with pytest.raises(UnsupportedError, match="holds neither model"):
        to_gguf(tmp_path / "a", file, tmp_path / "u.gguf", model=tmp_path / "empty")


def test_every_architecture_of_the_table_is_one_of_gguf():
    assert {name: row.shift for name, row in ARCHITECTURES.items() if row.shift} == SHIFTS
    assert set(ARCHITECTURES) <= set(gguf.MODEL_ARCH_NAMES.values())
    known = set(hf.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    assert {name for row in ARCHITECTURES.values() for name in row.model_types} <= known


def test_without_the_package(tmp_path, monkeypatch):
    adapter_of(model_of("llama"), tmp_path / "a")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-lntune\[gguf\]'"):
        to_gguf(tmp_path / "a", tmp_path / "m.gguf", tmp_path / "t.gguf")
