"""What a config would tune, told without weights."""

import pytest
import transformers as hf

from peft_lntune import LNTuningConfig, UnifiedConfig, plan
from peft_lntune.cli.plan import plan_model
from tests.cases import build
from tests.cli.saved import refused, run, save_adapter, save_model
from tests.cli.test_inspect import masks


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model", num_hidden_layers=4)


def loaded(model):
    return hf.BertForSequenceClassification.from_pretrained(model)


OPTIONS = {
    "": LNTuningConfig(),
    "--tune bias": LNTuningConfig(tune="bias"),
    "--role ffn --role embedding": LNTuningConfig(roles=["ffn", "embedding"]),
    "--layers 0,2-3": LNTuningConfig(layers_to_transform=[0, 2, 3]),
    "--target query --target key": LNTuningConfig(target_modules=["query", "key"]),
    "--preset mha-adapter+ln": UnifiedConfig(preset="mha-adapter+ln"),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_as_with_weights(options, model):
    result = run("plan", model, *options.split())
    assert result.exit_code == 0
    found, size = plan(loaded(model), OPTIONS[options]), sum(p.numel() for p in loaded(model).parameters())
    shown, _, last = result.stdout.rstrip("\n").rpartition("\n\n")
    assert shown == str(found)
    assert last == f"{found.entries:,} trainable entries beside {size:,} parameters ({found.entries / size:.3%})."


def test_no_weights_are_needed(model):
    (model / "model.safetensors").unlink()
    assert plan_model(str(model), LNTuningConfig())[0].entries > 0


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_families(family, tmp_path):
    own = build(family)
    own.save_pretrained(tmp_path)
    found, size = plan_model(str(tmp_path), LNTuningConfig())
    assert str(found) == str(plan(own, LNTuningConfig()))
    assert size == sum(p.numel() for p in own.parameters())


def test_what_an_adapter_tunes(model, tmp_path):
    folder = save_adapter(tmp_path / "a", model, masks=masks())
    result = run("plan", model, "--adapter", folder)
    assert result.exit_code == 0
    assert "16 trainable entries" in result.stdout
    assert "weight 3 of 16" in result.stdout


def test_nothing_to_tune(model):
    assert refused(run("plan", model, "--role", "cross_attention"), "selects none of the 9 norms")
    assert refused(run("plan", model, "--preset", "nonsense"), "nonsense")
