"""Supermasks in files: one bit an entry, bit for bit by every way of loading, with or without the scores."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from peft_lntune import LNTuningConfig, SupermaskConfig, UnifiedConfig, plan
from peft_lntune.core.delta import pack_bits
from peft_lntune.layers.held import supermasks_of
from peft_lntune.storage.adapter_file import WEIGHTS_FILE
from peft_lntune.tuner.supermasks import keep_masks
from tests import adapted
from tests.cases import spread
from tests.plugin.saved import build_base

FAMILY = "bert-classifier"
ANEW = "loaded to be trained, but .* saved as bits alone, so their scores start again"

pytestmark = [
    # PEFT says so of every second adapter that transformers loads by itself.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]


@pytest.fixture(autouse=True)
def _quiet(capfd: pytest.CaptureFixture[str]) -> Any:
    """Progress bars of transformers say nothing here."""
    yield
    capfd.readouterr()


CONFIGS: dict[str, tuple[str, Callable[..., Any]]] = {
    "plain": (FAMILY, lambda **o: SupermaskConfig(task_type="SEQ_CLS", **o)),
    "part": ("gpt2", lambda **o: SupermaskConfig(components=["query", "ffn_down"], **o)),
    "odd": (FAMILY, lambda **o: SupermaskConfig(target_modules=["classifier"], **o)),  # 48 entries
    "unified": (
        FAMILY,
        lambda **o: UnifiedConfig(
            parts=[SupermaskConfig(components=["query"], **o), LNTuningConfig(), {"kind": "BottleneckConfig"}],
            task_type="SEQ_CLS",
        ),
    ),
    "beside-lora": (
        FAMILY,
        lambda **o: UnifiedConfig(
            parts=[SupermaskConfig(components=["key"], **o), *UnifiedConfig(preset="lora").parts], task_type="SEQ_CLS"
        ),
    ),
}


def trained(case: str = "plain", dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """A model whose scores are as after training."""
    family, config = CONFIGS[case]
    model = get_peft_model(adapted.build(family, dtype), config(**options)).eval()
    adapted.fill(model, "default", seed=4)
    return model


def load_second(model: nn.Module, folder: Path, **options: Any) -> PeftModel:
    wrapped = adapted.adapt(model, "first")
    wrapped.load_adapter(folder, "default", **options)
    wrapped.set_adapter("default", inference_mode=not options.get("is_trainable"))
    return wrapped.eval()


def load_over(model: nn.Module, folder: Path, **options: Any) -> PeftModel:
    """Over an adapter that is trained already."""
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    wrapped = get_peft_model(model, dataclasses.replace(config)).eval()
    adapted.fill(wrapped, "default", seed=11)
    wrapped.load_adapter(folder, "default", **options)
    return wrapped


def load_over_bits(model: nn.Module, folder: Path) -> PeftModel:
    """Over one that was loaded for inference."""
    wrapped = PeftModel.from_pretrained(model, folder)
    for mask in supermasks_of(wrapped, "default").values():
        mask.keep.zero_()
    wrapped.load_adapter(folder, "default")
    return wrapped


def load_natively(model: nn.Module, folder: Path, **options: Any) -> nn.Module:
    model.load_adapter(str(folder), **options)
    return model.eval()


# How the model is loaded, and whether it is to be trained then.
WAYS: dict[str, tuple[Callable[[nn.Module, Path], Any], bool]] = {
    "from_pretrained": (PeftModel.from_pretrained, False),
    "from_pretrained-meta": (lambda m, p: PeftModel.from_pretrained(m, p, low_cpu_mem_usage=True), False),
    "from_pretrained-trainable": (lambda m, p: PeftModel.from_pretrained(m, p, is_trainable=True), True),
    "from_pretrained-trainable-meta": (
        lambda m, p: PeftModel.from_pretrained(m, p, is_trainable=True, low_cpu_mem_usage=True),
        True,
    ),
    "load_adapter": (load_second, False),
    "load_adapter-meta": (lambda m, p: load_second(m, p, low_cpu_mem_usage=True), False),
    "load_adapter-trainable": (lambda m, p: load_second(m, p, is_trainable=True), True),
    "load_adapter-over": (load_over, True),
    "load_adapter-over-bits": (load_over_bits, False),
    "native": (load_natively, False),
    "native-trainable": (lambda m, p: load_natively(m, p, is_trainable=True), True),
}
MIXED = {"mixed": (PeftMixedModel.from_pretrained, False)}


def load(way: str, model: nn.Module, folder: Path, warns: bool) -> Any:
    """Load, and see whether the user is told that scores start anew."""
    call, training = (WAYS | MIXED)[way]
    if training and warns:
        with pytest.warns(UserWarning, match=ANEW):
            return call(model, folder).eval()
    return call(model, folder).eval()


@pytest.mark.parametrize(("way", "case", "dtype"), spread(WAYS, CONFIGS, [torch.float32, torch.bfloat16]))
def test_bit_for_bit(way: str, case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family = CONFIGS[case][0]
    batch = adapted.inputs(family, dtype)
    model = trained(case, dtype)
    expected, masks = adapted.output(model, batch), keep_masks(model)
    model.save_pretrained(tmp_path)
    loaded = load(way, adapted.build(family, dtype), tmp_path, warns=True)
    found = keep_masks(loaded)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], keep) for name, keep in masks.items())
    assert torch.equal(adapted.output(loaded, batch), expected)
    for mask in supermasks_of(loaded, "default").values():
        if WAYS[way][1]:
            assert mask.weight.abs().eq(5).all()
            assert mask.weight.dtype == torch.float32
            assert mask.weight.requires_grad
        else:
            assert mask.weight is None
            assert mask.keep.dtype == torch.uint8
    if isinstance(loaded, PeftModel):
        assert loaded.get_model_status().available_adapters[:1] == ["default"]
        loaded.save_pretrained(tmp_path / "again")
        again = load_file(tmp_path / "again" / WEIGHTS_FILE)
        first = load_file(tmp_path / WEIGHTS_FILE)
        assert again.keys() == first.keys()
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.parametrize(("way", "case"), spread(WAYS, ["plain", "part", "unified"]))
def test_scores_are_saved_beside_the_bits(way: str, case: str, tmp_path: Path) -> None:
    family = CONFIGS[case][0]
    model, batch = trained(case, save_scores=True), adapted.inputs(family)
    model.save_pretrained(tmp_path)
    loaded = load(way, adapted.build(family), tmp_path, warns=False)
    assert torch.equal(adapted.output(loaded, batch), adapted.output(model, batch))
    found = supermasks_of(loaded, "default")
    for name, mask in supermasks_of(model, "default").items():
        other = found[name if isinstance(loaded, PeftModel) else name.removeprefix("base_model.model.")]
        assert torch.equal(other.weight, mask.weight) if WAYS[way][1] else other.weight is None


def test_a_mixed_model(tmp_path: Path) -> None:
    model, batch = trained("part"), adapted.inputs("gpt2")
    model.save_pretrained(tmp_path)
    loaded = load("mixed", adapted.build("gpt2"), tmp_path, warns=False)
    assert torch.equal(adapted.output(loaded, batch), adapted.output(model, batch))


def test_pickled_weights(tmp_path: Path) -> None:
    model, batch = trained(), adapted.inputs(FAMILY)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / WEIGHTS_FILE).exists()
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(adapted.build(FAMILY), tmp_path, **options).eval()
        assert torch.equal(adapted.output(loaded, batch), adapted.output(model, batch))


def test_auto_models(tmp_path: Path) -> None:
    build_base().save_pretrained(tmp_path / "base")
    model = get_peft_model(build_base(tmp_path / "base"), SupermaskConfig(task_type="SEQ_CLS")).eval()
    adapted.fill(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    batch = adapted.inputs(FAMILY)
    assert torch.equal(adapted.output(loaded, batch), adapted.output(model, batch))


def test_a_model_saved_by_transformers(tmp_path: Path) -> None:
    model, batch = adapted.build("llama"), adapted.inputs("llama")
    model.add_adapter(SupermaskConfig(save_scores=True))
    adapted.fill(model, "default")
    model.save_pretrained(tmp_path)
    loaded = adapted.build("llama")
    loaded.load_adapter(str(tmp_path), is_trainable=True)
    assert torch.equal(adapted.output(loaded, batch), adapted.output(model, batch))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


class TestSize:
    def test_what_is_in_the_file(self, tmp_path: Path) -> None:
        trained("odd").save_pretrained(tmp_path)
        tensors = load_file(tmp_path / WEIGHTS_FILE)
        assert {name: (value.dtype, value.shape) for name, value in tensors.items()} == {
            "base_model.model.classifier.lntune_supermask.keep": (torch.uint8, (6,))
        }
        (keep,) = keep_masks(trained("odd")).values()
        assert torch.equal(tensors.popitem()[1], pack_bits(keep))

    @pytest.mark.parametrize("case", ["plain", "part"])
    def test_a_bit_an_entry(self, case: str, tmp_path: Path) -> None:
        model = trained(case)
        model.save_pretrained(tmp_path)
        bits = {n: t for n, t in load_file(tmp_path / WEIGHTS_FILE).items() if n.endswith(".lntune_supermask.keep")}
        planned = plan(adapted.build(CONFIGS[case][0]), CONFIGS[case][1]())
        assert sum(value.nbytes for value in bits.values()) == planned.bytes
        assert planned.bytes == sum(-(-mask.weight.numel() // 8) for mask in supermasks_of(model, "default").values())
        assert len(bits) == len(planned.parts)

    def test_scores_are_thirty_two_times_as_large(self, tmp_path: Path) -> None:
        for scores in (False, True):
            trained("part", save_scores=scores).save_pretrained(tmp_path / str(scores))
        bits, both = (load_file(tmp_path / str(scores) / WEIGHTS_FILE) for scores in (False, True))
        sizes = [sum(value.nbytes for value in tensors.values()) for tensors in (bits, both)]
        assert sizes[1] == 33 * sizes[0]

    @pytest.mark.parametrize("save_dtype", ["bfloat16", "float16"])
    def test_the_dtype_of_scores_in_the_file(self, save_dtype: str, tmp_path: Path) -> None:
        model = trained("part", save_scores=True, save_dtype=save_dtype)
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / WEIGHTS_FILE)
        assert {value.dtype for value in tensors.values()} == {torch.uint8, getattr(torch, save_dtype)}
        for options in ({}, {"is_trainable": True}):
            loaded = PeftModel.from_pretrained(adapted.build("gpt2"), tmp_path, **options)
            assert all(torch.equal(keep_masks(loaded)[name], keep) for name, keep in keep_masks(model).items())
        assert {mask.weight.dtype for mask in supermasks_of(loaded, "default").values()} == {torch.float32}

    def test_bert_base_is_below_eleven_megabytes(self) -> None:
        """85 million weights; from the plan of the true shapes, and the names that a safetensors file repeats."""
        with torch.device("meta"):
            model = BertModel(BertConfig())
        found = plan(model, SupermaskConfig())
        assert found.entries == 12 * (4 * 768**2 + 2 * 768 * 3072) == 84_934_656
        names = [f"base_model.model.{name}.lntune_supermask.keep" for name in found.parts]
        entry = len('"":{"dtype":"U8","shape":[],"data_offsets":[,]},') + 3 * len("10616832")
        header = 8 + sum(len(name) + entry for name in names) + 100
        assert found.bytes + header < 10.7e6

    def test_the_header_takes_no_more_than_that(self, tmp_path: Path) -> None:
        """The arithmetic above, held against a true file of as many tensors."""
        config = BertConfig(num_hidden_layers=12, hidden_size=24, intermediate_size=48, vocab_size=9)
        model = get_peft_model(BertModel(config, add_pooling_layer=False), SupermaskConfig())
        model.save_pretrained(tmp_path)
        planned = plan(BertModel(config, add_pooling_layer=False), SupermaskConfig())
        entry = len('"":{"dtype":"U8","shape":[],"data_offsets":[,]},') + 3 * len("10616832")
        names = [f"base_model.model.{name}.lntune_supermask.keep" for name in planned.parts]
        header = 8 + sum(len(name) + entry for name in names) + 100
        size = (tmp_path / WEIGHTS_FILE).stat().st_size
        assert planned.bytes < size <= planned.bytes + header


class TestBitsForTraining:
    def test_the_warning_says_what_to_do(self, tmp_path: Path) -> None:
        model = trained("unified")
        model.save_pretrained(tmp_path)
        with pytest.warns(
            UserWarning, match=r"but 2 of its supermasks .*initial_score.*SupermaskConfig\(save_scores=True"
        ):
            PeftModel.from_pretrained(adapted.build(FAMILY), tmp_path, is_trainable=True)

    def test_with_the_initial_score_of_the_config(self, tmp_path: Path) -> None:
        model = trained("part", initial_score=2)
        model.save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match=ANEW):
            loaded = PeftModel.from_pretrained(adapted.build("gpt2"), tmp_path, is_trainable=True)
        for name, mask in supermasks_of(loaded, "default").items():
            keep = supermasks_of(model, "default")[name].mask()
            assert torch.equal(mask.weight, torch.where(keep, 2.0, -2.0))

    def test_an_adapter_that_was_saved_after_inference_has_bits_alone(self, tmp_path: Path) -> None:
        trained("part", save_scores=True).save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(adapted.build("gpt2"), tmp_path)
        loaded.save_pretrained(tmp_path / "again")
        assert {t.dtype for t in load_file(tmp_path / "again" / WEIGHTS_FILE).values()} == {torch.uint8}

    def test_scores_are_not_made_where_nobody_asks(self, tmp_path: Path) -> None:
        trained("part").save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ANEW)
            loaded = PeftModel.from_pretrained(adapted.build("gpt2"), tmp_path)
        assert [name for name, _ in loaded.named_parameters() if "supermask" in name] == []
        assert loaded.get_nb_trainable_parameters()[0] == 0
        assert loaded.get_layer_status()[0].available_adapters == ["default"]


def test_scores_alone_serve_for_inference(tmp_path: Path) -> None:
    """As in the state dict of a model, whatever wrote it."""
    from peft import set_peft_model_state_dict

    model, batch = trained("part"), adapted.inputs("gpt2")
    scores: dict[str, Tensor] = {
        f"{name}.lntune_supermask.weight": mask.weight.detach()
        for name, mask in supermasks_of(model, "default").items()
    }
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(adapted.build("gpt2"), tmp_path).eval()
    for mask in supermasks_of(loaded, "default").values():
        mask.keep.zero_()
    set_peft_model_state_dict(loaded, scores)
    assert torch.equal(adapted.output(loaded, batch), adapted.output(model, batch))
