"""The sweep: a table line, an adapter and a point in the plot for each rate, and rates that differ."""

import re

import datasets
import pytest
from demo_data import write_data
from peft import PeftModel
from safetensors.torch import load_file
from sweep_learning_rates import RATES, main
from transformers import AutoModelForSequenceClassification

pytestmark = [
    # PEFT reads transformers' gradient checkpointing property under its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def test_sixteen_rates_span_three_decades():
    assert len(RATES) == len(set(RATES)) == 16
    assert sorted(RATES) == RATES
    assert RATES[0] == 1e-4
    assert RATES[-1] == 1e-1


def change_of(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return sum(value.abs().sum().item() for name, value in tensors.items() if ".lntune_" in name)


@pytest.mark.end_to_end
def test_a_sweep(tiny_bert, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data, out = write_data(tmp_path / "data", "sentiment", 32, 8), tmp_path / "out"
    flags = ["--max-steps", "4", "--batch-size", "6", "--model", tiny_bert, "--out", str(out)]
    main(["--data-dir", str(data), "--rates", "1e-4", "0.03", "0.3", *flags])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["learning", "rate", "loss", "accuracy"]
    table = {line.split()[0]: line.split()[1:] for line in lines[1:4]}
    assert list(table) == ["0.0001", "0.03", "0.3"]
    changes = [change_of(out / name) for name in ("1_0e-04", "3_0e-02", "3_0e-01")]
    assert 0 < changes[0] < changes[1] < changes[2]  # each at its own rate
    assert re.search(r"3 rates at once, 2 rows each: \d+ ms a step; one alone with 6 rows: \d+ ms", lines[4])
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    PeftModel.from_pretrained(base, out / "3_0e-02")


def test_errors_end_the_script_with_their_text(tmp_path):
    with pytest.raises(SystemExit, match=r"error: no such file, looked for"):
        main(["--data-dir", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
