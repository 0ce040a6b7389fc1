"""Numbers of numpy and torch are numbers in every config, and what is saved is plain JSON that loads."""

import json

import numpy as np
import pytest
import torch
from peft import PeftConfig

from peft_lntune import (
    BottleneckConfig,
    FisherLNConfig,
    LNTuningConfig,
    ModuleTuningConfig,
    PrefixConfig,
    SupermaskConfig,
    UnifiedConfig,
)
from peft_lntune.errors import ConfigError

INTS = [np.int64, np.int32, np.uint8, torch.tensor]
FLOATS = [np.float64, np.float32, np.float16, torch.tensor]
GIVEN = {
    "layers": lambda i, f: LNTuningConfig(layers_to_transform=[i(1), 0], inference_mode=np.bool_(True)),
    "one layer": lambda i, f: LNTuningConfig(layers_to_transform=i(1)),
    "array of layers": lambda i, f: LNTuningConfig(layers_to_transform=np.arange(3)),
    "tensor of layers": lambda i, f: ModuleTuningConfig(preset="l0-close", layers_to_exclude=torch.arange(2)),
    "array of names": lambda i, f: LNTuningConfig(target_modules=np.array(["a", "b"]), init_weights=np.bool_(True)),
    "fisher": lambda i, f: FisherLNConfig(density=f(0.25), num_samples=i(4), seed=i(7)),
    "fraction of one": lambda i, f: FisherLNConfig(density=i(1)),
    "bottleneck": lambda i, f: BottleneckConfig(bottleneck_size=i(4), scale=f(2.0), dropout=f(0.5)),
    "factor": lambda i, f: BottleneckConfig(reduction_factor=f(4.0), layers_to_transform=(i(1), i(2))),
    "prefix": lambda i, f: PrefixConfig(num_virtual_tokens=i(3), reparametrize=i(8)),
    "supermask": lambda i, f: SupermaskConfig(
        initial_sparsity=f(0.5), initial_score=f(3.0), layers_to_exclude={int(i(1))}, save_scores=np.bool_(True)
    ),
    "part": lambda i, f: UnifiedConfig(parts=[PrefixConfig(num_virtual_tokens=i(3)), LNTuningConfig()]),
    "provenance": lambda i, f: LNTuningConfig(mask_source={"made": "by hand", "density": f(0.5), "of": [i(1)]}),
}


@pytest.mark.parametrize(("i", "f"), [*zip(INTS, FLOATS, strict=True)], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("case", GIVEN)
def test_they_are_as_pythons_own(case, i, f, tmp_path):
    config, expected = GIVEN[case](i, f), GIVEN[case](int, float)
    assert config == expected
    config.save_pretrained(str(tmp_path))
    text = (tmp_path / "adapter_config.json").read_text()
    expected.save_pretrained(str(tmp_path))
    assert text == (tmp_path / "adapter_config.json").read_text()
    assert json.loads(text)
    assert type(PeftConfig.from_json_file(str(tmp_path / "adapter_config.json"))) is dict


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FisherLNConfig(density=np.float64(2)), "density=2.0 should be a number above 0"),
        (lambda: FisherLNConfig(density=np.float64("nan")), "density=nan should be a number above 0"),
        (lambda: FisherLNConfig(num_samples=np.float64(4)), "num_samples takes an int"),
        (lambda: FisherLNConfig(num_samples=np.bool_(True)), "num_samples takes an int"),
        (lambda: FisherLNConfig(density=np.ones(2)), "density=.* should be a number above 0"),
        (lambda: LNTuningConfig(layers_to_transform=np.array([0.5])), "an index or a list of indices"),
        (lambda: LNTuningConfig(layers_to_transform=torch.tensor([-1])), "an index or a list of indices"),
    ],
)
def test_what_is_wrong_stays_wrong(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
