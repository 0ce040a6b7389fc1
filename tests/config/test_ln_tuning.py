"""What a config accepts, and what it says where it does not."""

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, get_peft_config, get_peft_model

from peft_lntune import LNTuningConfig, PeftLNTuneError, __version__
from peft_lntune.config import FORMAT_VERSION, KINDS, LNTuneConfig, StoredConfig
from peft_lntune.errors import ConfigError
from peft_lntune.storage import adapter_file as storage
from tests import cases

# One row a field: a value that is not what the class starts with, and values that are refused, with the message.
FIELDS: dict[str, tuple[Any, list[tuple[Any, str]]]] = {
    "tune": (
        "bias",
        [("gain", "tune='gain' is not allowed; choose one of 'both', 'weight', 'bias'"), (["bias"], "tune=")],
    ),
    "roles": (
        ["attention", "qk"],
        [
            (["norm"], r"roles=\['norm'\]: choose one or more of 'attention', .*'final'"),
            ([], r"roles=\[\]: choose one or more"),
            (3, "roles takes a list of strings or None, but got 3 of type int"),
            ([3], r"roles takes a list of strings or None, but got \[3\] of type list"),
        ],
    ),
    "target_modules": (
        ["query", "value"],
        [
            (3, "target_modules takes a string, a list of strings or None, but got 3 of type int"),
            ([3], r"target_modules takes a string, a list of strings or None, but got \{3\} of type set"),
        ],
    ),
    "exclude_modules": (".*query", [(True, "exclude_modules takes a string, .* but got True of type bool")]),
    "layers_to_transform": (
        [0, 3],
        [
            (-1, "layers_to_transform takes an index .* counted from 0, but got -1. For the last layers"),
            ([0, "1"], r"layers_to_transform takes .*, but got \[0, '1'\]"),
            (True, "layers_to_transform takes .*, but got True"),
            ("all", "layers_to_transform takes .*, but got 'all'"),
        ],
    ),
    "layers_pattern": ("layers", [(3, "layers_pattern takes a string, a list of strings or None, but got 3")]),
    "modules_to_save": (
        ["classifier"],
        [("classifier", "modules_to_save takes a list of strings or None, but got 'classifier' of type str")],
    ),
    "delta_dtype": (
        "float64",
        [
            ("int8", "delta_dtype='int8' is not a floating dtype of torch. Use \"float32\""),
            ("wide", "delta_dtype='wide' is not a floating dtype of torch"),
            ("nn", "delta_dtype='nn' is not a floating dtype of torch"),
            (32, "delta_dtype=32 is not a floating dtype of torch"),
            (torch.int8, "delta_dtype='int8' is not a floating dtype of torch"),
        ],
    ),
    "save_dtype": (
        "float64",
        [
            ("int8", "save_dtype='int8' is not a floating dtype of torch. Use \"float32\""),
            ("wide", "save_dtype='wide' is not a floating dtype of torch"),
            ("nn", "save_dtype='nn' is not a floating dtype of torch"),
            (32, "save_dtype=32 is not a floating dtype of torch"),
            (torch.int8, "save_dtype='int8' is not a floating dtype of torch"),
        ],
    ),
    "init_weights": (False, [("gaussian", "init_weights takes a bool, but got 'gaussian' of type str")]),
    "inference_mode": (True, [(1, "inference_mode takes a bool, but got 1 of type int")]),
    "task_type": ("SEQ_CLS", [("CLASSIFY", "Invalid task type: 'CLASSIFY'. Must be one of")]),  # PEFT's own words
    "format_version": (
        FORMAT_VERSION,
        [
            (2, f"format_version 2, and peft_lntune {__version__} reads 1. Upgrade with `pip install git."),
            ("1", "format_version '1', and peft_lntune .* reads 1"),
        ],
    ),
    "manifest": (
        {"digest": "0", "tuned": {"norm.lntune_weight": 3, "norm.lntune_bias": None}},
        [
            ("digest", "manifest takes a dict, but got 'digest' of type str"),
            *(
                ({"tuned": wrong}, rf"manifest\['tuned'\] holds a number of entries, .*, but got {said}")
                for wrong, said in (({"a": 0}, 0), ({"a": "3"}, "'3'"), ({"a": True}, "True"), (["a"], r"\['a'\]"))
            ),
        ],
    ),
    "mask_source": (
        {"made": "fisher", "samples": 3, "of": ["a", "b"]},
        [
            ("union", "mask_source takes a dict, but got 'union' of type str"),
            ({"scores": torch.ones(2)}, "mask_source=.* cannot be saved: .*not JSON serializable"),
        ],
    ),
}
REFUSED = [(name, value, message) for name, (_, refused) in FIELDS.items() for value, message in refused]
# Fields that go together with others.
NEEDS = {"layers_pattern": {"layers_to_transform": [0]}}
FILLED_IN = {"kind", "peft_lntune_version", "peft_type", "peft_version", "auto_mapping", "revision"}
FILLED_IN |= {"base_model_name_or_path"}


def make(name: str, value: Any) -> LNTuningConfig:
    return LNTuningConfig(**{name: value}, **NEEDS.get(name, {}))


def test_every_field_is_in_the_table() -> None:
    assert {field.name for field in dataclasses.fields(LNTuningConfig)} == FIELDS.keys() | FILLED_IN


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_refused_values(name: str, value: Any, message: str) -> None:
    # What PEFT checks itself, it refuses with an error of its own.
    with pytest.raises(ValueError if name == "task_type" else ConfigError, match=message):
        make(name, value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers_pattern": "layers"}, "layers_pattern='layers' says where .* Give both, or neither"),
        (
            {"layers_to_transform": [0], "target_modules": ".*q"},
            r"layers_to_transform=\[0\] cannot narrow the regular expression target_modules='\.\*q'",
        ),
        (
            {"roles": ["ffn"], "target_modules": ["q"]},
            r"roles=\['ffn'\] narrows the search for norms, but target_modules=\{'q'\} replaces that search",
        ),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LNTuningConfig(**fields)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"delta_dtype": torch.bfloat16}, {"delta_dtype": "bfloat16"}),
        ({"roles": "ffn"}, {"roles": ["ffn"]}),
        ({"target_modules": ["q", "q"]}, {"target_modules": {"q"}}),
        ({"target_modules": ("q",)}, {"target_modules": {"q"}}),
        ({"layers_to_transform": range(2)}, {"layers_to_transform": [0, 1]}),
        ({"layers_to_transform": 0}, {"layers_to_transform": 0}),
        ({"kind": "Other"}, {"kind": "LNTuningConfig"}),
    ],
)
def test_what_is_written_otherwise(given: dict[str, Any], kept: dict[str, Any]) -> None:
    config = LNTuningConfig(**given)
    assert {name: getattr(config, name) for name in kept} == kept
    json.dumps({name: list(v) if isinstance(v, set) else v for name, v in config.to_dict().items()})


def test_alone_it_is_complete() -> None:
    model = get_peft_model(cases.build("llama"), LNTuningConfig())
    tuned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    norms = [name for name, module in cases.build("llama").named_modules() if "norm" in type(module).__name__.lower()]
    assert tuned == {f"base_model.model.{name}.lntune_weight.default.weight" for name in norms}


def test_errors_are_value_errors() -> None:
    assert issubclass(ConfigError, PeftLNTuneError)
    assert issubclass(PeftLNTuneError, ValueError)


DUPLICATES: dict[str, Callable[[LNTuningConfig], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)),
    "replace": dataclasses.replace,
    "to_dict": lambda config: LNTuningConfig(**config.to_dict()),
    "stored": lambda config: StoredConfig(**config.to_dict()),
    "get_peft_config": lambda config: get_peft_config(config.to_dict()),
    "from_peft_type": lambda config: PeftConfig.from_peft_type(**config.to_dict()),
    "stored-deepcopy": lambda config: copy.deepcopy(StoredConfig(**config.to_dict())),
    "stored-pickle": lambda config: pickle.loads(pickle.dumps(StoredConfig(**config.to_dict()))),
}


class TestCopies:
    """A config is the same after every way of copying and saving it."""

    @pytest.fixture(params=FIELDS)
    def config(self, request: pytest.FixtureRequest) -> LNTuningConfig:
        return make(request.param, FIELDS[request.param][0])

    @pytest.mark.parametrize("way", DUPLICATES)
    def test_in_memory(self, config: LNTuningConfig, way: str) -> None:
        other = DUPLICATES[way](config)
        assert type(other) is LNTuningConfig
        assert other == config
        assert other is not config

    @pytest.mark.parametrize(
        "load",
        [PeftConfig.from_pretrained, LNTuneConfig.from_pretrained, LNTuningConfig.from_pretrained],
        ids=["PeftConfig", "LNTuneConfig", "LNTuningConfig"],
    )
    def test_on_disk(self, config: LNTuningConfig, load: Any, tmp_path: Path) -> None:
        config.save_pretrained(tmp_path)
        loaded = load(tmp_path)
        assert type(loaded) is LNTuningConfig
        assert loaded == config

    def test_replace_changes_only_what_is_named(self, config: LNTuningConfig) -> None:
        other = dataclasses.replace(config, base_model_name_or_path="other")
        assert other.base_model_name_or_path == "other"
        assert dataclasses.replace(other, base_model_name_or_path=None) == config


class TestSaved:
    def test_provenance(self, tmp_path: Path) -> None:
        LNTuningConfig().save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        expected = {
            "kind": "LNTuningConfig",
            "format_version": 1,
            "peft_lntune_version": __version__,
            "peft_type": "LNTUNE",
        }
        assert expected.items() <= saved.items()

    def test_the_file_appears_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        LNTuningConfig().save_pretrained(tmp_path)
        before = (tmp_path / "adapter_config.json").read_bytes()

        def fail(*args: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(storage.os, "replace", fail)
        with pytest.raises(OSError, match=r"no space left"):
            LNTuningConfig(tune="bias").save_pretrained(tmp_path)
        assert (tmp_path / "adapter_config.json").read_bytes() == before
        assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "adapter_config.json"]

    def test_a_file_in_place_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "taken").touch()
        with pytest.raises(AssertionError, match=r"should be a directory, not a file"):
            LNTuningConfig().save_pretrained(tmp_path / "taken")


class TestStored:
    """The JSON of another version."""

    def edited(self, folder: Path, **fields: Any) -> Path:
        LNTuningConfig(tune="bias", roles=["ffn"], delta_dtype="float64").save_pretrained(folder)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return folder

    @pytest.fixture(params=[PeftConfig, LNTuneConfig, LNTuningConfig], ids=lambda cls: cls.__name__)
    def load(self, request: pytest.FixtureRequest) -> Any:
        return request.param.from_pretrained

    def test_unknown_fields_warn_and_lose_nothing(self, load: Any, tmp_path: Path) -> None:
        folder = self.edited(tmp_path, new_field=1, another={"x": 2})
        # PEFT's sentence: its own tests match it.
        sentence = (
            r"Unexpected keyword arguments \['another', 'new_field'\] for class LNTuningConfig, these are ignored. "
            ".* highly recommended to upgrade"
        )
        with pytest.warns(UserWarning, match=sentence) as caught:
            config = load(folder)
        assert len(caught) == 1
        assert (config.tune, config.roles, config.delta_dtype) == ("bias", ["ffn"], "float64")

    @pytest.mark.parametrize("kind", ["FutureConfig", None, ["LNTuningConfig"]])
    def test_unknown_kinds(self, load: Any, kind: Any, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"of kind .*, and peft_lntune .* knows BottleneckConfig, .*, UnifiedConfig. Upgrade with"
        ):
            load(self.edited(tmp_path, kind=kind))

    def test_another_format(self, load: Any, tmp_path: Path) -> None:
        # Before all else: in a newer format kinds and fields may be other ones too.
        with pytest.raises(ConfigError, match=r"format_version 7, and peft_lntune .* reads 1"):
            load(self.edited(tmp_path, format_version=7, kind="FutureConfig", new_field=1))

    def test_broken_json(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text("{")
        with pytest.raises(ConfigError, match=r"adapter_config.json is damaged: Expecting .* Get a good copy"):
            LNTuningConfig.from_pretrained(tmp_path)

    def test_no_config(self, load: Any, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
            load(tmp_path)

    def test_every_kind_is_there_under_its_name(self) -> None:
        assert all(cls.__name__ == name and issubclass(cls, LNTuneConfig) for name, cls in KINDS.items())
        needed = {"UnifiedConfig": {"preset": "ln"}, "ModuleTuningConfig": {"preset": "bitfit"}}
        assert all(type(StoredConfig(kind=name, **needed.get(name, {}))) is cls for name, cls in KINDS.items())
