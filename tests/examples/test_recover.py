"""The example that repairs a pruned model."""

import pytest
import recover
from demo_data import sentences


def text(file, count):
    file.write_text(" ".join(row["sentence"] for row in sentences("train", count, seed=0)))
    return file


@pytest.mark.end_to_end
def test_a_pruned_model_is_repaired(tiny_llama, tmp_path, capsys):
    file = text(tmp_path / "texts.txt", 200)
    recover.main(["--model", tiny_llama, "--text", str(file), "--length", "16", "--max-steps", "10", "--lr", "1e-3"])
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    assert float(lines["repaired"][2]) < float(lines["damaged"][2])
    assert abs(float(lines["teacher"][2])) < 1e-6
    assert "80 entries of norms tuned" in shown
    before, after = (
        float(part.split("%")[0].split()[-1]) for part in shown.splitlines()[-1].split("zeros in")[1].split(",")
    )
    assert before == after == 50.0
    assert (tmp_path / "runs/recover/adapter_model.safetensors").is_file()


def test_too_little_text(tiny_llama, tmp_path):
    file = text(tmp_path / "texts.txt", 3)
    with pytest.raises(SystemExit, match="at least 20 are needed"):
        recover.main(["--model", tiny_llama, "--text", str(file), "--length", "8"])
