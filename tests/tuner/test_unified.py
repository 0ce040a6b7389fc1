"""Combined adapters beyond the contract table: generation, weighted sums, files, and parts that cannot be together."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_lntune import (
    BottleneckConfig,
    FisherLNConfig,
    LNTuningConfig,
    PrefixConfig,
    UnifiedConfig,
    fit_fisher_masks,
    load_lora,
    plan,
)
from peft_lntune.errors import AdapterFileError, ConfigError, NoMatchError, UnsupportedError
from tests import adapted
from tests.cases import few

DECODERS = ["gpt2", "llama", "qwen3", "gemma"]
FAMILIES = ["bert", "roberta", "distilbert", "electra", *DECODERS, "t5", "bart", "whisper", "vit"]
PRESET = "prefix+mha-adapter+lora+ln"
KINDS = {"prefix": ".lntune_prefix.", "bottleneck": ".lntune_down.", "lora": ".lora_A.", "norm": ".lntune_weight."}


def unified(family: str, *names: str, preset: str = PRESET, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The tiny model of a family with filled combined adapters; the first is active."""
    first, *others = names or ("default",)
    model = get_peft_model(adapted.build(family, dtype), UnifiedConfig(preset=preset), adapter_name=first)
    for name in others:
        model.add_adapter(name, UnifiedConfig(preset=preset))
    for seed, name in enumerate((first, *others)):
        fill(model, name, seed)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module, name: str, seed: int = 0) -> None:
    """Random values in every tensor of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{name}." in key and (".lntune_" in key or ".lora_" in key or ".modules_to_save." in key):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", few([*DECODERS, "t5", "bart", "whisper"]))
def test_generation_with_and_without_a_cache_and_in_a_mixed_batch(family: str) -> None:
    model = unified(family, "a", "b")
    x = {k: v for k, v in adapted.inputs(family, batch=3).items() if not k.startswith(("decoder", "encoder"))}
    if family in DECODERS:
        x["attention_mask"][0, :3] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**x, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**x, **options, use_cache=False))
    beams = model.generate(**x, **options, num_beams=2, adapter_names=["a", "b", "a"])
    for row, name in enumerate(["a", "b", "a"]):
        model.set_adapter(name)
        alone = model.generate(**x, **options, num_beams=2)
        width = min(alone.shape[1], beams.shape[1])
        assert torch.equal(alone[row, :width], beams[row, :width])


def test_padding_changes_no_row() -> None:
    model = unified("llama")
    x = adapted.inputs("llama", batch=1)
    ids = x["input_ids"]
    alone = adapted.output(model, x)
    left = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1),
        "attention_mask": torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], 1),
    }
    left["position_ids"] = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(adapted.output(model, left)[:, 3:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["mha-adapter+lora+ln", "lora+ln", "mha-adapter"])
@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_a_weighted_sum_is_exact(family: str, preset: str) -> None:
    x = adapted.inputs(family)
    model = unified(family, "a", "b", preset=preset)
    # The effects of several active adapters are summed, so weights of one must give just that.
    model.base_model.set_adapter(["a", "b"])
    together = adapted.output(model, x)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(adapted.output(model, x), together, rtol=1e-4, atol=1e-5)
    model.add_weighted_adapter(["a", "b"], [1.0, 0.0], "first")
    model.set_adapter("first")
    first = adapted.output(model, x)
    model.set_adapter("a")
    torch.testing.assert_close(first, adapted.output(model, x), rtol=1e-4, atol=1e-5)


def test_a_weighted_sum_saves_and_loads(tmp_path: Path) -> None:
    x = adapted.inputs("bert")
    model = unified("bert", "a", "b", preset="mha-adapter+lora+ln")
    model.add_weighted_adapter(["a", "b"], [0.7, -0.2], "sum")
    model.set_adapter("sum")
    expected = adapted.output(model, x)
    model.save_pretrained(str(tmp_path), selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(adapted.build("bert"), str(tmp_path / "sum"))
    assert torch.equal(adapted.output(loaded.eval(), x), expected)


def test_prefixes_have_no_weighted_sum() -> None:
    model = unified("bert", "a", "b")
    with pytest.raises(UnsupportedError, match="'a' has a prefix"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    assert list(model.peft_config) == ["a", "b"]


def test_a_head_is_saved_once_and_norms_in_it_are_left_alone(tmp_path: Path) -> None:
    config = UnifiedConfig(preset="prefix+ln+mha-adapter", task_type="SEQ_CLS")
    model = get_peft_model(adapted.build("roberta-classifier"), config)
    fill(model, "default")
    x = adapted.inputs("roberta-classifier")
    expected = adapted.output(model.eval(), x)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(adapted.build("roberta-classifier"), str(tmp_path))
    assert torch.equal(adapted.output(loaded.eval(), x), expected)


def test_an_adapter_in_the_dtype_of_the_base() -> None:
    with pytest.warns(UserWarning, match="keeps what adapter 'default' trains in bfloat16"):
        model = get_peft_model(
            adapted.build("llama", torch.bfloat16), UnifiedConfig(preset=PRESET), autocast_adapter_dtype=False
        )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("family", few(FAMILIES))
def test_the_plan_lists_every_part_and_counts_what_is_trained(family: str) -> None:
    config = UnifiedConfig(preset=PRESET)
    planned = plan(adapted.build(family), config)
    model = get_peft_model(adapted.build(family), config)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert planned.entries == sum(trained.values())
    assert all(any(mark in name for name in trained) for mark in KINDS.values())
    assert {part.method for part in planned.parts.values()} == {"delta", "bottleneck", "prefix", "lora"}
    assert all(method in str(planned) for method in ("bottleneck", "prefix", "lora"))


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ([LoraConfig(target_modules=["attention.output.dense"]), BottleneckConfig()], "LoraConfig and Bottleneck"),
        ([PrefixConfig(), PrefixConfig(num_virtual_tokens=3)], "PrefixConfig and PrefixConfig"),
        ([BottleneckConfig(), BottleneckConfig(position="parallel", roles=["ffn"])], "BottleneckConfig and Bottleneck"),
        ([LNTuningConfig(), FisherLNConfig(roles=["ffn"])], "LNTuningConfig and FisherLNConfig"),
        ([LNTuningConfig(target_modules=["query"]), LoraConfig(target_modules=["query"])], "LNTuningConfig and Lora"),
    ],
)
def test_two_parts_on_one_place(parts: list, names: str) -> None:
    model = adapted.build("bert")
    before, modules = adapted.snapshot(model), len(list(model.modules()))
    with pytest.raises(ConfigError, match=f"two parts want one place: {names}"):
        get_peft_model(model, UnifiedConfig(parts=parts))
    adapted.assert_unchanged(model, before)
    assert len(list(model.modules())) == modules


def test_what_a_model_cannot_take() -> None:
    for family, preset, error in [
        ("mamba", "prefix", UnsupportedError),
        ("mamba", "mha-adapter", NoMatchError),
        ("deberta-v2", "prefix+ln", UnsupportedError),
    ]:
        model = adapted.build(family)
        modules = len(list(model.modules()))
        with pytest.raises(error):
            get_peft_model(model, UnifiedConfig(preset=preset))
        assert len(list(model.modules())) == modules


class Unmeasured(nn.Module):
    """A linear map that does not say how wide it is."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias


@pytest.mark.parametrize("position", ["sequential", "parallel"])
@pytest.mark.parametrize("leaf", ["intermediate", "output"])
class TestALeafOfUnknownWidth:
    def model(self, leaf: str) -> nn.Module:
        model = adapted.build("bert")
        last = model.bert.encoder.layer[-1].get_submodule(leaf)
        last.dense = Unmeasured(last.dense)
        return model

    def test_it_is_left_out_with_the_reason(self, leaf: str, position: str) -> None:
        model, config = self.model(leaf), BottleneckConfig(roles=["ffn"], position=position)
        planned = plan(model, config)
        assert list(planned.parts) == ["bert.encoder.layer.0.output.dense"]
        assert planned.left_out == {"bert.encoder.layer.1.output.dense": "the width of its leaves is not known"}
        with pytest.warns(UserWarning, match=r"layer\.1\.output\.dense.*the width of its leaves is not known"):
            tuned = get_peft_model(model, config)
        trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
        assert trained
        assert all(".layer.0." in name for name in trained)

    def test_it_is_refused_where_no_place_remains_before_anything_changed(self, leaf: str, position: str) -> None:
        model = self.model(leaf)
        before, modules = adapted.snapshot(model), list(model.modules())
        config = BottleneckConfig(roles=["ffn"], position=position, layers_to_transform=[1])
        for call in (plan, get_peft_model):
            with pytest.raises(UnsupportedError, match=r"layer\.1\.output\.dense needs .* wide .* but Unmeasured"):
                call(model, config)
        adapted.assert_unchanged(model, before)
        assert list(model.modules()) == modules


def test_lora_at_what_is_no_linear_map() -> None:
    for targets, message in [(["encoder"], "matches bert.encoder "), (["LayerNorm"], "matches bert.embeddings.Layer")]:
        model = adapted.build("bert")
        modules = len(list(model.modules()))
        parts = [LNTuningConfig(roles=["ffn"]), LoraConfig(target_modules=targets)]
        with pytest.raises(ConfigError, match=message):
            get_peft_model(model, UnifiedConfig(parts=parts))
        assert len(list(model.modules())) == modules


def test_an_ffn_adapter_with_norms_warns() -> None:
    with pytest.warns(UserWarning, match="2211.08682"):
        get_peft_model(adapted.build("bert"), UnifiedConfig(preset="ffn-adapter+ln"))
    get_peft_model(adapted.build("bert"), UnifiedConfig(preset="mha-adapter+ln"))  # a warning here is an error


def test_plain_kinds_are_adapters_too(tmp_path: Path) -> None:
    x = adapted.inputs("bert")
    for number, config in enumerate((BottleneckConfig(), PrefixConfig(reparametrize=8))):
        model = get_peft_model(adapted.build("bert"), config)
        fill(model, "default")
        expected = adapted.output(model.eval(), x)
        folder = tmp_path / str(number)
        model.save_pretrained(str(folder))
        loaded = PeftModel.from_pretrained(adapted.build("bert"), str(folder)).eval()
        torch.testing.assert_close(adapted.output(loaded, x), expected)
        assert type(loaded.peft_config["default"]) is type(config)
        # Over an adapter that is still trained through its network, as Trainer loads its best checkpoint.
        model.load_adapter(str(folder), "default")
        torch.testing.assert_close(adapted.output(model, x), expected)


@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(f, marks=pytest.mark.end_to_end) for f in ("llama", "gpt2", "t5"))]
)
def test_it_compiles_in_one_graph(family: str) -> None:
    model = unified(family)
    x = adapted.inputs(family)
    expected = adapted.output(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(adapted.output(compiled, x), expected, rtol=1e-4, atol=1e-5)


def test_fisher_masks_in_a_combined_adapter(tmp_path: Path) -> None:
    config = UnifiedConfig(
        parts=[FisherLNConfig(density=0.2, num_samples=4), LoraConfig(r=2, target_modules=["query"])],
        task_type="SEQ_CLS",
    )
    model = get_peft_model(adapted.build("bert-classifier"), config)
    x = adapted.inputs("bert-classifier", batch=4)
    fit = fit_fisher_masks(model, [{**x, "labels": torch.tensor([0, 1, 2, 0])}])
    tuned = sum(p.numel() for n, p in model.named_parameters() if ".lntune_" in n)
    assert tuned == sum(int(mask.sum()) for mask in fit.masks.values())
    assert model.peft_config["default"].parts[0].mask_source["made"] == "fisher"
    fill(model, "default")
    expected = adapted.output(model.eval(), x)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(adapted.build("bert-classifier"), str(tmp_path))
    assert torch.equal(adapted.output(loaded.eval(), x), expected)
    assert loaded.peft_config["default"].parts[0].mask_source == model.peft_config["default"].parts[0].mask_source
    native = adapted.build("bert-classifier")
    native.load_adapter(str(tmp_path))
    assert torch.equal(adapted.output(native.eval(), x), expected)


def test_lora_of_peft_as_a_part(tmp_path: Path) -> None:
    x = adapted.inputs("bert")
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=["query", "value"])
    alone = get_peft_model(adapted.build("bert"), lora)
    fill(alone, "default")
    expected = adapted.output(alone.eval(), x)
    alone.save_pretrained(str(tmp_path))
    parts = [LNTuningConfig(), LoraConfig.from_pretrained(str(tmp_path))]
    model = get_peft_model(adapted.build("bert"), UnifiedConfig(parts=parts)).eval()
    load_lora(model, tmp_path)
    assert torch.equal(adapted.output(model, x), expected)
    other = get_peft_model(adapted.build("bert"), UnifiedConfig(preset="ln+lora"))
    with pytest.raises(ConfigError, match="was saved with r=2"):
        load_lora(other, tmp_path)
    with pytest.raises(ConfigError, match="has no LoRA part"):
        load_lora(get_peft_model(adapted.build("bert"), LNTuningConfig()), tmp_path)
    wrong = LoraConfig(r=2, lora_alpha=3, target_modules=["query"])
    narrow = get_peft_model(adapted.build("bert"), UnifiedConfig(parts=[wrong]))
    with pytest.raises(AdapterFileError, match="does not fit the LoRA part"):
        load_lora(narrow, tmp_path)


def test_damaged_files_are_refused_and_leave_no_trace(tmp_path: Path) -> None:
    unified("bert").save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for damage in ("lora", "bottleneck", "prefix"):
        mark = KINDS[damage].strip(".")
        name = next(key for key in tensors if mark in key)
        changed = {key: value for key, value in tensors.items() if key != name}
        for value in (None, tensors[name].repeat_interleave(2, 0), tensors[name] * 0):
            content = changed if value is None else {**changed, name: value}
            save_file(content, file, {"format": "pt"})
            model = get_peft_model(adapted.build("bert"), LNTuningConfig())
            with pytest.raises(AdapterFileError):
                model.load_adapter(str(tmp_path), "other")
            assert list(model.peft_config) == ["default"]
            assert not any(".other" in key for key in model.state_dict())
    save_file(tensors, file, {"format": "pt"})
    model.load_adapter(str(tmp_path), "other")


def test_two_adapters_around_one_module_keep_their_names_in_files(tmp_path: Path) -> None:
    x = adapted.inputs("bert")
    full = UnifiedConfig(parts=[LNTuningConfig(target_modules=["query"])])
    lora = UnifiedConfig(parts=[LoraConfig(r=2, target_modules=["query"])])
    model = get_peft_model(adapted.build("bert"), full, adapter_name="full")
    model.add_adapter("lora", lora)
    fill(model, "full")
    fill(model, "lora")
    model.eval()
    for name in ("full", "lora"):
        model.set_adapter(name)
        expected = adapted.output(model, x)
        model.save_pretrained(str(tmp_path), selected_adapters=[name])
        loaded = PeftModel.from_pretrained(adapted.build("bert"), str(tmp_path / name)).eval()
        assert torch.equal(adapted.output(loaded, x), expected)
    model.set_adapter("full")
    expected = adapted.output(model, x)
    torch.testing.assert_close(adapted.output(model.merge_and_unload(), x), expected, rtol=1e-4, atol=1e-5)
