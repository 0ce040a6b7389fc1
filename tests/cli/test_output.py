"""What the commands print: results on stdout alone, 80 columns, JSON; and what happens before torch is imported."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from peft_lntune.cli import main
from peft_lntune.cli.inspect import inspect_adapter
from tests.cli.saved import combined, run, run_at, save_adapter, save_model, task, write_rows
from tests.cli.test_change import moved
from tests.recover.pairs import rounded, teacher_of

ROOT = Path(__file__).parents[2]
PRINTS_A_TABLE = ["plan", "fisher", "change", "closeness", "magnitude", "doctor", "inspect", "recover"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import transformers as hf

    folder = tmp_path_factory.mktemp("cli")
    model = save_model(folder / "model")
    save_adapter(folder / "adapter", model, config=combined())
    save_adapter(folder / "norms", model)
    save_pair(folder, model)
    moved(hf.BertForSequenceClassification.from_pretrained(model)).save_pretrained(folder / "tuned")
    write_rows(folder / "train.jsonl", task())
    return folder


def save_pair(folder, tokenizer):
    """A tiny language model, a rounded copy, and texts."""
    (folder / "words.txt").write_text("good bad film very the a is " * 100)
    for name, model in (("llama", teacher_of()), ("rounded", rounded(teacher_of()))):
        model.save_pretrained(folder / name)
        for file in tokenizer.glob("token*.json"):
            shutil.copy(file, folder / name)


def arguments(name, folder, out):
    model = folder / "model"
    return {
        "plan": ("plan", model, "--adapter", folder / "adapter"),
        "fisher": ("fisher", "--model", model, "--data", folder / "train.jsonl", "--out", out / "m.safetensors"),
        "change": ("change", model, folder / "adapter", "--csv", out / "t.csv"),
        "closeness": ("closeness", model, folder / "tuned", "--csv", out / "t.csv"),
        "magnitude": ("magnitude", model, "--csv", out / "t.csv"),
        "doctor": ("doctor", model, folder / "tuned", "--csv", out / "t.csv"),
        "inspect": ("inspect", folder / "adapter"),
        "recover": (
            *("recover", folder / "rounded", "--teacher", folder / "llama", "--data", folder / "words.txt"),
            *("--out", out / "repaired", "--steps", 12, "--batch-size", 2, "--length", 10, "--learning-rate", 0.01),
        ),
        "merge": ("merge", folder / "norms", out / "merged"),
        "export": ("export", folder / "norms", out / "exported"),
    }[name]


def test_each_command_is_tried():
    assert set(main.commands) == {*PRINTS_A_TABLE, "merge", "export"}


@pytest.mark.parametrize("name", main.commands)
def test_results_are_on_stdout_and_nothing_on_stderr(name, folder, tmp_path):
    result = run_at(80, *arguments(name, folder, tmp_path))
    assert result.exit_code == 0
    if name == "fisher":  # says what it has understood of the data
        assert result.stderr.count("\n") == 1
        assert "12 rows" in result.stderr
    else:
        assert result.stderr == ""
    assert result.stdout.strip()
    long = [line for line in result.stdout.splitlines() if len(line) > 80 and str(tmp_path.parent) not in line]
    assert long == []
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("name", PRINTS_A_TABLE)
def test_json(name, folder, tmp_path):
    result = run(*arguments(name, folder, tmp_path), "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout, parse_constant=lambda value: pytest.fail(f"{value} is no JSON"))
    if (tmp_path / "t.csv").exists():
        with (tmp_path / "t.csv").open() as file:
            written = list(csv.DictReader(file))
        shown = [{key: "" if value is None else str(value) for key, value in row.items()} for row in found["table"]]
        assert shown == written
    if name == "plan":
        assert sum(one["tuned"] for row in found["modules"] for one in row["entries"].values()) == found["entries"]
        assert {row["method"] for row in found["modules"]} == {"prefix", "bottleneck", "delta", "lora"}
        assert found["parameters"] > found["entries"] > 0
    if name == "fisher":
        masks = load_file(found["masks"])
        assert found["tuned"] == sum(int(mask.sum()) for mask in masks.values())
        assert found["source"]["samples"] == 12
    if name == "inspect":
        report = inspect_adapter(folder / "adapter")
        assert found["table"] == report.entries.to_records()
        assert (found["digest"], found["problem"], found["files"]) == ("ok", None, report.file_bytes)
        assert found["tuned"] + found["head"] == sum(report.entries.column("entries"))


def test_what_a_head_starts_from_is_said(tmp_path):
    body = save_model(tmp_path / "body", labels=None)
    data = write_rows(tmp_path / "d.jsonl", task())
    result = run("fisher", "--model", body, "--data", data, "--out", tmp_path / "m.safetensors", "--seed", 3)
    assert f"{body} has no weights for classifier.bias, classifier.weight: random, with seed 3" in result.stderr


# In a process of its own, started as the installed script starts.

_BEFORE_TORCH = """
import sys
import click
from click.testing import CliRunner
import peft_lntune_cli

sys.argv = ["peft-lntune", "--help"]
try:
    peft_lntune_cli.main()
except SystemExit as end:
    assert end.code == 0
from peft_lntune.cli import main

WRONG = [
    ["plan", "m", "--layers", "3-1"],
    ["change", "a", "b", "--plot", "p.txt"],
    ["closeness", "a", "b", "--no-controls", "--seed", "1"],
    ["fisher", "--model", "m", "--density", "2"],
]
for arguments, code in [*([[name, "--help"], 0] for name in main.commands), *([wrong, 2] for wrong in WRONG)]:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, (arguments, result.output)
taken = CliRunner().invoke(main, ["merge", "adapter", "."])
assert taken.exit_code == 1 and "exists and is not an empty folder" in taken.stderr
heavy = {"torch", "transformers", "peft", "numpy", "safetensors", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""


def python(code, *flags):
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_help_and_wrong_options_need_no_torch():
    result = python(_BEFORE_TORCH)
    assert result.returncode == 0, result.stderr
    assert "Commands:" in result.stdout


@pytest.mark.end_to_end
def test_the_script_runs_a_command(folder, tmp_path):
    """The package that was put off registers with PEFT before the command reads an adapter; a pipe gets no bars."""
    code = "import sys, peft_lntune_cli; sys.argv[1:] = {}; peft_lntune_cli.main()"
    command = [str(argument) for argument in arguments("merge", folder, tmp_path)]
    result = python(code.format(command), "-W", "ignore")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"The merged model is in {tmp_path / 'merged'}.\n"
    registered = "import peft, peft_lntune; print('LNTUNE' in peft.PeftType.__members__)"
    assert python(registered).stdout == "True\n"
