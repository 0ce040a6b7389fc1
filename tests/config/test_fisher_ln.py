"""What a config of Fisher masks accepts, and that it comes back as what it was."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, get_peft_model

from peft_lntune import FisherLNConfig, LNTuningConfig
from peft_lntune.config import KINDS, LNTuneConfig
from peft_lntune.errors import ConfigError
from tests import cases

from .test_ln_tuning import DUPLICATES, NEEDS
from .test_ln_tuning import FIELDS as LN_FIELDS

# One row a field that LNTuningConfig does not have; as its table.
FIELDS: dict[str, tuple[Any, list[tuple[Any, str]]]] = {
    "density": (
        0.05,
        [
            (0, "density=0 should be a number above 0 and at most 1"),
            (1.5, "density=1.5 should be a number above 0 and at most 1"),
            (-0.1, "density=-0.1 should be"),
            (float("nan"), "density=nan should be"),
            (True, "density=True should be"),
            ("0.2", "density='0.2' should be"),
            (None, "density=None should be"),
        ],
    ),
    "fisher": ("mc", [("true", "fisher='true' is not allowed; choose one of 'empirical', 'mc', 'exact'")]),
    "scope": ("layer", [("module", "scope='module' is not allowed; choose one of 'global', 'tensor', 'layer'")]),
    "num_samples": (
        7,
        [
            (0, "num_samples=0 should be at least 1"),
            (1.5, "num_samples takes an int, but got 1.5 of type float"),
            (True, "num_samples takes an int, but got True of type bool"),
        ],
    ),
    "max_per_norm": (
        8,
        [
            (0, "max_per_norm=0 should be a whole number of entries, at least 1"),
            (1.5, "max_per_norm=1.5 should be a whole number"),
            (True, "max_per_norm=True should be"),
        ],
    ),
    "seed": (3, [("one", "seed takes an int, but got 'one' of type str"), (None, "seed takes an int, but got None")]),
}
REFUSED = [(name, value, message) for name, (_, refused) in FIELDS.items() for value, message in refused]


def test_every_field_is_in_the_table() -> None:
    own, inherited = ({field.name for field in dataclasses.fields(cls)} for cls in (FisherLNConfig, LNTuningConfig))
    assert own - inherited == FIELDS.keys()


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_refused_values(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FisherLNConfig(**{name: value})


@pytest.mark.parametrize("name", [*FIELDS, *LN_FIELDS])
def test_it_comes_back(name: str, tmp_path: Path) -> None:
    value = (FIELDS | LN_FIELDS)[name][0]
    config = FisherLNConfig(**{name: value}, **NEEDS.get(name, {}))
    config.save_pretrained(tmp_path)
    for load in (PeftConfig.from_pretrained, LNTuneConfig.from_pretrained, FisherLNConfig.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is FisherLNConfig
        assert loaded == config
    for way, duplicate in DUPLICATES.items():
        if way != "to_dict":  # which names the class
            assert duplicate(config) == config
    assert KINDS["FisherLNConfig"] is type(dataclasses.replace(config))


def test_before_it_is_fitted_it_tunes_what_ln_tuning_does() -> None:
    counts = [
        get_peft_model(cases.build("llama"), kind(exclude_modules=["model.norm"])).get_nb_trainable_parameters()
        for kind in (FisherLNConfig, LNTuningConfig)
    ]
    assert counts[0] == counts[1]


def test_what_is_recorded_is_copied() -> None:
    """As it comes back from JSON, and not changed from outside."""
    source = {"of": ("a", "b"), 1: "one"}
    config = LNTuningConfig(mask_source=source)
    source["of"] = torch.ones(1)
    assert config.mask_source == {"of": ["a", "b"], "1": "one"}
