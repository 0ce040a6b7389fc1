"""An adapter loads bit for bit as it was saved, whichever way it is saved and loaded."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from peft_lntune import FisherLNConfig, LNTuningConfig
from peft_lntune.errors import AdapterFileError, ConfigError, UnsupportedError
from tests import adapted, cases

from .saved import HEADS, State, adapt, build_base, logits, mask_half

pytestmark = [
    # PEFT says so of every second adapter that transformers loads by itself.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]
DTYPES = [torch.float32, torch.bfloat16]
Loader = Callable[[nn.Module, Path], nn.Module]


@pytest.fixture(autouse=True)
def _quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Progress bars of transformers say nothing here."""
    yield
    capfd.readouterr()


def load_second(model: nn.Module, folder: Path, **options: Any) -> PeftModel:
    """Load beside an adapter that is there already, and take its place."""
    wrapped = adapt(model, "first", seed=7)
    wrapped.load_adapter(folder, "default", **options)
    wrapped.set_adapter("default")
    return wrapped


def load_over(model: nn.Module, folder: Path, **options: Any) -> PeftModel:
    """Load over an adapter that is there already, of the same shape."""
    wrapped = PeftModel.from_pretrained(model, folder)
    adapted.fill(wrapped, "default", seed=11)
    wrapped.load_adapter(folder, "default", **options)
    return wrapped


def load_natively(model: nn.Module, folder: Path) -> nn.Module:
    model.load_adapter(str(folder))
    return model


def load_natively_second(model: nn.Module, folder: Path) -> nn.Module:
    model.add_adapter(LNTuningConfig(modules_to_save=HEADS), "first")
    model.load_adapter(str(folder))
    model.set_adapter("default")  # PEFT makes the deltas of the second one active, and leaves the first one's head so
    return model


WAYS: dict[str, Loader] = {
    "from_pretrained": PeftModel.from_pretrained,
    "from_pretrained-meta": lambda model, path: PeftModel.from_pretrained(model, path, low_cpu_mem_usage=True),
    "from_pretrained-trainable": lambda model, path: PeftModel.from_pretrained(model, path, is_trainable=True),
    "from_pretrained-config": lambda model, path: PeftModel.from_pretrained(
        model, path, config=LNTuningConfig(task_type="SEQ_CLS")
    ),
    "from_pretrained-subfolder": lambda model, path: PeftModel.from_pretrained(model, path.parent, subfolder=path.name),
    "load_adapter": load_second,
    "load_adapter-meta": lambda model, path: load_second(model, path, low_cpu_mem_usage=True),
    "load_adapter-trainable": lambda model, path: load_second(model, path, is_trainable=True),
    "load_adapter-over": load_over,
    "load_adapter-over-meta": lambda model, path: load_over(model, path, low_cpu_mem_usage=True),
    "native": load_natively,
    "native-second": load_natively_second,
}


def own(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the adapter `default`, by their names in the base model."""
    named = {name.removeprefix("base_model.model."): value for name, value in model.state_dict().items()}
    return {name: value for name, value in named.items() if ".default." in name}


@pytest.fixture(scope="module", params=DTYPES, ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=["dense", "masked"])
def source(
    request: pytest.FixtureRequest, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PeftModel, Path]:
    """A model with an adapter, and the folder it is saved in."""
    model = adapt(build_base(dtype=dtype), masked=request.param == "masked")
    folder = tmp_path_factory.mktemp("source") / "adapter"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("way", WAYS)
def test_bit_for_bit(way: str, source: tuple[PeftModel, Path], dtype: torch.dtype) -> None:
    model, folder = source
    loaded = WAYS[way](build_base(dtype=dtype), folder)
    want, have = own(model), own(loaded)
    assert have.keys() == want.keys()
    assert all(have[name].dtype == value.dtype and torch.equal(have[name], value) for name, value in want.items())
    assert {value.dtype for name, value in have.items() if name.endswith(".weight") and ".lntune_" in name} == {
        torch.float32
    }
    assert torch.equal(logits(loaded), logits(model))
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    if way.startswith("from_pretrained"):
        assert bool(trainable) == ("trainable" in way)
    assert type(loaded.peft_config["default"]) is LNTuningConfig


@pytest.mark.parametrize("way", WAYS)
def test_a_newer_config_warns_and_loads(way: str, good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "adapter"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"from_the_future": 1}))
    with pytest.warns(
        UserWarning, match=r"Unexpected keyword arguments \['from_the_future'\] for class LNTuningConfig"
    ):
        loaded = WAYS[way](build_base(), folder)
    assert torch.equal(logits(loaded), logits(adapt(build_base())))


@pytest.fixture(scope="module")
def several(base_folder: Path) -> PeftModel:
    """Three adapters, the last one on other parameters, and masked."""
    model = adapt(build_base(base_folder), "default", "b")
    model.add_adapter("c", LNTuningConfig(task_type="SEQ_CLS", tune="bias"))
    mask_half(model, "c", seed=3)
    adapted.fill(model, "c", seed=3)
    return model


class TestSeveralAdapters:
    NAMES = ("default", "b", "c")

    def test_saved_in_one_call(self, several: PeftModel, tmp_path: Path) -> None:
        several.save_pretrained(tmp_path)
        folders = {"default": tmp_path, "b": tmp_path / "b", "c": tmp_path / "c"}
        loaded = PeftModel.from_pretrained(build_base(), tmp_path)
        for name in ("b", "c"):
            loaded.load_adapter(folders[name], name)
        for name in self.NAMES:
            loaded.set_adapter(name)
            several.set_adapter(name)
            assert torch.equal(logits(loaded), logits(several))
            alone = PeftModel.from_pretrained(build_base(), tmp_path, subfolder=None if name == "default" else name)
            assert torch.equal(logits(alone), logits(several))

    def test_selected(self, several: PeftModel, tmp_path: Path) -> None:
        several.save_pretrained(tmp_path, selected_adapters=["b"])
        assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "b"]
        loaded = PeftModel.from_pretrained(build_base(), tmp_path / "b", "other")
        several.set_adapter("b")
        assert torch.equal(logits(loaded), logits(several))
        with pytest.raises(ValueError, match=r"invalid `selected_adapters` .* got \['x'\]"):
            several.save_pretrained(tmp_path, selected_adapters=["x"])

    @pytest.mark.parametrize("trainable", [True, False])
    def test_the_active_one_stays(self, good: Path, trainable: bool) -> None:
        model = adapt(build_base(), "first").train()
        before = State.of(model)
        model.load_adapter(good, "second", is_trainable=trainable)
        assert model.active_adapters == ["first"]
        assert torch.equal(logits(model), before.logits)
        flags = {name: p.requires_grad for name, p in model.named_parameters() if ".second." in name}
        assert set(flags.values()) == {trainable}

    def test_a_config_serves_twice(self, source: tuple[PeftModel, Path], dtype: torch.dtype) -> None:
        model, folder = source
        config = PeftConfig.from_pretrained(folder)
        for given in (config, config, dataclasses.replace(config)):
            loaded = PeftModel.from_pretrained(build_base(dtype=dtype), folder, config=given)
            assert torch.equal(logits(loaded), logits(model))


# Names that stand in our prefix, in names of tensors, or in names of modules of the base.
NAMES = ["weight", "lntune_weight", "l", "LayerNorm", "0", "modules_to_save"]
ALIKE = ["bias", "mask", "lntune", "tune", "layer", "base_layer", "model"]
PREFIX_WARNING = "Adapter name .* should not be contained in the prefix 'lntune_'"


@pytest.mark.filterwarnings(f"ignore:{PREFIX_WARNING}:UserWarning")  # PEFT's advice; here nothing goes wrong
@pytest.mark.parametrize(
    ("name", "masked"),
    [
        *((name, False) for name in NAMES),
        *((name, True) for name in ("mask", "lntune_bias")),
        *(pytest.param(name, False, marks=pytest.mark.full) for name in ALIKE),
        *(pytest.param(name, True, marks=pytest.mark.full) for name in ("weight", "0")),
    ],
)
def test_any_name_will_do(name: str, masked: bool, tmp_path: Path) -> None:
    model = adapt(build_base(), "first", name, masked=masked)
    model.set_adapter(name)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build_base(), tmp_path / name, name)
    assert torch.equal(logits(again), logits(model))
    beside = adapt(build_base(), "other", seed=9)
    beside.load_adapter(tmp_path / name, name)
    beside.load_adapter(tmp_path / "first", "first")
    beside.set_adapter(name)
    assert torch.equal(logits(beside), logits(model))
    native = build_base()
    native.load_adapter(str(tmp_path / name), name)
    assert torch.equal(logits(native), logits(model))
    model.set_adapter("first")
    beside.set_adapter("first")
    assert torch.equal(logits(beside), logits(model))


class TestHeads:
    def test_saved_and_restored(self, tmp_path: Path) -> None:
        model = adapt(build_base())
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert {name for name in saved if "lntune" not in name} == {
            "base_model.model.classifier.weight",
            "base_model.model.classifier.bias",
        }
        head = model.base_model.model.classifier
        assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
        loaded = PeftModel.from_pretrained(build_base(), tmp_path).base_model.model.classifier
        assert torch.equal(loaded.modules_to_save["default"].weight, head.modules_to_save["default"].weight)
        assert torch.equal(loaded.original_module.weight, head.original_module.weight)


class TestAutoModels:
    def test_sequence_classification(self, good: Path) -> None:
        model = AutoPeftModelForSequenceClassification.from_pretrained(good, num_labels=3)
        assert type(model.peft_config["default"]) is LNTuningConfig
        assert torch.equal(logits(model), logits(adapt(build_base())))

    def test_causal_lm(self, tmp_path: Path) -> None:
        base = cases.build("llama")
        base.save_pretrained(tmp_path / "base")
        base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
        model = get_peft_model(base, LNTuningConfig(task_type="CAUSAL_LM")).eval()
        adapted.fill(model, "default")
        model.save_pretrained(tmp_path / "adapter")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        batch = cases.inputs("llama")
        assert torch.equal(adapted.output(loaded, batch), adapted.output(model, batch))


@pytest.mark.parametrize("version", ["5.17.3", "5.9.0.dev0"])
def test_heads_need_a_newer_transformers(version: str, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_base()
    before = State.of(model)
    with monkeypatch.context() as patch:
        patch.setattr(transformers, "__version__", version)
        with pytest.raises(UnsupportedError, match=rf"transformers {version} does not .* Install transformers>=5\.18"):
            model.load_adapter(str(good))
    before.assert_same(model)


class TestNative:
    """transformers' own verbs, without a PeftModel."""

    @pytest.fixture
    def model(self, good: Path, masked: Path) -> nn.Module:
        model = build_base()
        model.load_adapter(str(good), "good")
        model.load_adapter(str(masked), "masked")
        return model

    def test_second_leaves_the_first_alone(self, model: nn.Module) -> None:
        model.set_adapter("good")
        assert torch.equal(logits(model), logits(adapt(build_base())))
        model.set_adapter("masked")
        assert torch.equal(logits(model), logits(adapt(build_base(), masked=True, seed=5)))

    def test_trainable_only_where_asked(self, good: Path) -> None:
        model = build_base()
        model.load_adapter(str(good), is_trainable=True)
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert {name for name, flag in flags.items() if flag} == {name for name in flags if ".default." in name}

    def test_disable_and_enable(self, model: nn.Module) -> None:
        model.set_adapter("masked")
        with_adapter = logits(model)
        model.disable_adapters()
        assert torch.equal(logits(model), logits(build_base()))
        model.enable_adapters()
        model.classifier.enable_adapters(True)  # transformers disables heads, and does not enable them again
        assert torch.equal(logits(model), with_adapter)

    def test_delete(self, model: nn.Module) -> None:
        model.set_adapter("masked")  # or PEFT fails over the heads, which have no active adapter after a second load
        with pytest.warns(UserWarning, match="Adapter masked was active which is now deleted. Setting active .* good"):
            model.delete_adapter("masked")
        assert list(model.peft_config) == ["good"]
        assert not any(".masked." in name for name in model.state_dict())
        model.set_adapter("good")
        assert torch.equal(logits(model), logits(adapt(build_base())))
        model.delete_adapter("good")
        assert not hasattr(model, "peft_config")
        assert torch.equal(logits(model), logits(build_base()))

    @pytest.mark.parametrize("name", ["good", "masked"])
    def test_save(self, model: nn.Module, name: str, tmp_path: Path) -> None:
        model.set_adapter(name)
        model.save_pretrained(tmp_path)
        for way in ("from_pretrained", "native"):
            loaded = WAYS[way](build_base(), tmp_path)
            assert torch.equal(logits(loaded), logits(model))

    @pytest.mark.parametrize("name", ["good", "masked"])
    def test_from_pretrained_of_an_adapter_folder(self, name: str, request: pytest.FixtureRequest) -> None:
        folder = request.getfixturevalue(name)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
        want = adapt(build_base(), masked=name == "masked", seed=5 if name == "masked" else 0)
        assert torch.equal(logits(model), logits(want))

    def test_a_state_dict_instead_of_a_folder(self, good: Path) -> None:
        tensors = load_file(good / "adapter_model.safetensors")
        model = build_base()
        config = LNTuningConfig(modules_to_save=HEADS)
        model.load_adapter(adapter_state_dict=tensors, peft_config=config)
        assert torch.equal(logits(model), logits(adapt(build_base())))

    def test_a_state_dict_that_is_packed(self, masked: Path) -> None:
        tensors = load_file(masked / "adapter_model.safetensors")
        model = build_base()
        model.load_adapter(adapter_state_dict=tensors, peft_config=PeftConfig.from_pretrained(masked))
        assert torch.equal(logits(model), logits(adapt(build_base(), masked=True, seed=5)))

    def test_a_packed_state_dict_needs_a_config_that_knows_its_sizes(self, masked: Path) -> None:
        tensors = load_file(masked / "adapter_model.safetensors")
        model = build_base()
        before = State.of(model)
        with pytest.raises(AdapterFileError, match=r"the state dict for adapter 'x' holds masked deltas, but .* dense"):
            model.load_adapter(adapter_name="x", adapter_state_dict=tensors, peft_config=LNTuningConfig())
        before.assert_same(model)

    @pytest.mark.parametrize("name", ["good", "masked"])
    def test_a_config_that_is_passed(self, name: str, request: pytest.FixtureRequest) -> None:
        model = build_base()
        model.load_adapter(str(request.getfixturevalue(name)), peft_config=LNTuningConfig(modules_to_save=HEADS))
        want = adapt(build_base(), masked=name == "masked", seed=5 if name == "masked" else 0)
        assert torch.equal(logits(model), logits(want))

    @pytest.mark.parametrize("argument", ["adapter_kwargs", "download_kwargs"])
    @pytest.mark.parametrize("name", ["good", "masked"])
    def test_a_subfolder(self, name: str, argument: str, request: pytest.FixtureRequest) -> None:
        folder = request.getfixturevalue(name)
        model = build_base()
        model.load_adapter(str(folder.parent), **{argument: {"subfolder": folder.name}})
        want = adapt(build_base(), masked=name == "masked", seed=5 if name == "masked" else 0)
        assert torch.equal(logits(model), logits(want))

    def test_names_are_unique(self, model: nn.Module, good: Path) -> None:
        before = State.of(model)
        with pytest.raises(ValueError, match="Adapter with name good already exists"):
            model.load_adapter(str(good), "good")
        before.assert_same(model)


class TestTrainer:
    @pytest.fixture
    def trainer(self, tmp_path: Path, base_folder: Path) -> Trainer:
        batch = {name: value.repeat(2, 1) for name, value in adapted.inputs("bert-classifier").items()}
        rows = [{**{name: value[i] for name, value in batch.items()}, "labels": torch.tensor(i % 3)} for i in range(6)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            num_train_epochs=3,
            per_device_train_batch_size=6,
            learning_rate=0.1,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            greater_is_better=True,  # so that the first checkpoint is taken, after further training
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        return Trainer(adapt(build_base(base_folder)).train(), arguments, train_dataset=rows, eval_dataset=rows)

    def test_the_best_checkpoint_comes_back(self, trainer: Trainer) -> None:
        """It is loaded over an adapter that was trained on, so nothing may be compared with the last save."""
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        saved = load_file(best / "adapter_model.safetensors")
        assert best.name != f"checkpoint-{trainer.state.global_step}"
        names = {
            name.replace(".default", "").replace("modules_to_save.", ""): v for name, v in own(trainer.model).items()
        }
        assert {f"base_model.model.{name}" for name in names} == saved.keys()
        assert all(torch.equal(saved[f"base_model.model.{name}"], value) for name, value in names.items())

    def test_a_run_is_taken_up_again(self, trainer: Trainer) -> None:
        trainer.train()
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 3


@pytest.mark.parametrize("way", WAYS)
def test_a_fisher_adapter_comes_back_as_one(way: str, tmp_path: Path) -> None:
    model = get_peft_model(build_base(), FisherLNConfig(task_type="SEQ_CLS", density=0.1, scope="layer")).eval()
    mask_half(model, "default", seed=2)
    adapted.fill(model, "default")
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    loaded = WAYS[way](build_base(), folder)
    assert torch.equal(logits(loaded), logits(model))
    config = loaded.peft_config["default"]
    assert config.mask_source == {"made": "by hand"}
    if not way.endswith("config"):  # there the user named another class
        assert type(config) is FisherLNConfig
        assert (config.density, config.scope) == (0.1, "layer")


def test_unknown_formats_on_every_path(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "adapter"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 12}))
    for load in WAYS.values():
        with pytest.raises(ConfigError, match=r"format_version 12, and peft_lntune .* reads 1"):
            load(build_base(), folder)
    with pytest.raises(ConfigError, match=r"format_version 12, and peft_lntune .* reads 1"):
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
