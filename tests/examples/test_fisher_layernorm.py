"""The Fisher example from end to end, on a tiny model."""

import datasets
import fisher_layernorm
import numpy as np
import pytest
from fisher_layernorm import main

# PEFT reads transformers' gradient checkpointing property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_fisher_layernorm(tiny_bert, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    out = tmp_path / "fisher"
    options = ["--model", tiny_bert, "--num-samples", "64", "--max-steps", "3", "--out", str(out)]
    told = []
    monkeypatch.setattr(fisher_layernorm, "warn_of_chance", lambda *arguments: told.append(arguments))
    main([*options, "--density", "0.25", "--head-learning-rate", "0.02"])
    ((_, rate, chance, trainer),) = told
    rates = {group["name"].partition(" ")[0]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rate == rates["fisher-ln.weight"] == rates["fisher-ln.bias"] == 1e-3
    assert rates["head"] == 0.02
    assert chance == pytest.approx(np.log(2), abs=0.01)  # half of the demo's sentences praise
    printed = capsys.readouterr().out
    assert "40 of 160" in printed  # 5 norms of 16, weight and bias
    assert "accuracy" in printed
    assert "bit-equal" in printed
    assert (out / "adapter_model.safetensors").exists()


def test_no_such_data(tmp_path):
    with pytest.raises(SystemExit, match="no such file"):
        main(["--data-dir", str(tmp_path)])
