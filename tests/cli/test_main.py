"""The script as a whole: help, exit codes, one message an error."""

import importlib
import runpy
import sys
from pathlib import Path

import click
import pytest

import peft_lntune
from peft_lntune.cli import main
from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.storage.folders import new_folder
from tests.cli.saved import refused, run, run_at

ROOT = Path(__file__).parents[2]


def test_the_script_is_this_function():
    written = (ROOT / "pyproject.toml").read_text()
    name = written.partition("[project.scripts]\npeft-lntune = ")[2].partition("\n")[0].strip('"')
    module, _, function = name.partition(":")
    assert (module, function) == ("peft_lntune_cli", "main")
    assert callable(getattr(importlib.import_module(module), function))


def test_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peft_lntune.cli", "--version"])
    monkeypatch.delitem(sys.modules, "peft_lntune.cli.__main__", raising=False)  # another test may have imported it
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("peft_lntune.cli", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out == f"peft-lntune, version {peft_lntune.__version__}\n"


def test_one_command_a_file():
    assert list(main.commands) == [
        "plan",
        "fisher",
        "change",
        "closeness",
        "magnitude",
        "doctor",
        "inspect",
        "recover",
        "merge",
        "export",
    ]
    for name, command in main.commands.items():
        assert importlib.import_module(f"peft_lntune.cli.commands.{name}").command is command


def test_help_names_all_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert all(f"  {name} " in result.stdout for name in main.commands)
    assert "Exit codes: 0" in result.stdout
    assert run("-h").stdout == result.stdout


@pytest.mark.parametrize("name", main.commands)
def test_help_of_each_command(name):
    command = main.commands[name]
    shown = run_at(80, name, "--help").stdout
    assert "Example" in shown
    assert f"peft-lntune {name}" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert (command.short_help or "").endswith(".")
    silent = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert silent == []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            assert parameter.name.upper() in (command.help or "")  # arguments have no help of their own


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("plan",),
        ("plan", "m", "--nonsense"),
        ("plan", "m", "--layers", "1-x"),
        ("plan", "m", "--preset", "ln", "--tune", "bias"),
        ("closeness", "a"),
        ("closeness", "a", "b", "--by", "layer", "--no-layers"),
        ("closeness", "a", "b", "--by", "tensor", "--plot", "p.png"),
        ("change", "a", "b", "--no-layers", "--plot", "p.png"),
        ("magnitude",),
        ("magnitude", "a", "--no-layers", "--plot", "p.png"),
        ("magnitude", "a", "--measure", "entries"),
        ("magnitude", "a", "--deviations", "0"),
        ("magnitude", "a", "--overlap", "o.csv"),
        ("fisher", "--model", "m"),
        ("fisher", "--model", "m", "--data", "nowhere.jsonl"),
        ("fisher", "--model", "m", "--data", __file__, "--density", "1.5"),
        ("fisher", "--model", "m", "--data", __file__, "--count", "0"),
        ("fisher", "--model", "m", "--data", __file__, "--encoding", "utf-9"),
        ("fisher", "--model", "m", "--data", __file__, "--text-column", "label"),
        ("fisher", "--model", "m", "--data", __file__, "--out", "nowhere/m.safetensors"),
        ("fisher", "--model", "m", "--data", __file__, "--out", "m", "--scores", "m"),
        ("change", "a", "b", "--csv", "nowhere/c.csv"),
        ("change", "a", "b", "--csv", "."),
        ("change", "a", "b", "--plot", "p.txt"),
        ("change", "a", "b", "--measure", "mean_change"),
        ("closeness", "a", "b", "--measure", "angle"),
        ("closeness", "a", "b", "--no-controls", "--seed", "1"),
        ("closeness", "a", "b", "--init-std", "0"),
        ("magnitude", "a", "--measure", "std"),
        ("plan", "m", "--layers", "3-1"),
        ("recover", "m", "--teacher", "t", "--data", __file__),
        ("recover", "m", "--teacher", "t", "--data", __file__, "--out", "o", "--steps", "0"),
        ("recover", "m", "--teacher", "t", "--data", __file__, "--out", "o", "--learning-rate", "0"),
        ("recover", "m", "--teacher", "t", "--data", __file__, "--out", "o", "--encoding", "utf-9"),
        ("fisher", "--model", "m", "--data", __file__, "--density", "0.1", "--count", "3"),
        ("fisher", "--model", "m", "--data", __file__, *("--text-column", "a") * 3),
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: peft-lntune")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "nowhere"), "nowhere holds no adapter_config.json"),
        (("closeness", "nowhere", "else"), "nowhere does not exist"),
        (("change", "nowhere", "else"), "nowhere does not exist"),
        (("magnitude", "nowhere", "--csv", "c.csv", "--outliers", "o.csv"), "nowhere does not exist"),
        (("merge", "nowhere", "out"), "nowhere"),
        (("export", "nowhere", "out"), "nowhere"),
        (("plan", "nowhere/at/all"), "nowhere/at/all"),
        (("recover", "nowhere", "--teacher", "not-here", "--data", __file__, "--out", "o"), "not-here"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_errors_are_one_message(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert refused(result, said)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_traceback_where_it_is_asked_for(tmp_path):
    with pytest.raises(AdapterFileError, match="holds no adapter_config"):
        run("--traceback", "inspect", tmp_path)


def test_a_mistake_of_ours_is_not_hidden(monkeypatch, tmp_path):
    monkeypatch.setattr("peft_lntune.cli.inspect.SavedAdapter", lambda folder: {}["nothing"])
    with pytest.raises(KeyError):
        run("inspect", tmp_path)


# Outputs appear whole or not at all.


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "a" / "b"
    with new_folder(target) as made:
        (made / "x").write_text("1")
        assert not target.exists()
    assert [file.name for file in target.iterdir()] == ["x"]
    assert list(target.parent.iterdir()) == [target]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "b").mkdir()
    with new_folder(tmp_path / "b") as made:
        (made / "x").write_text("1")
    assert (tmp_path / "b" / "x").is_file()


def test_after_an_error_there_is_nothing(tmp_path):
    def fail():
        with new_folder(tmp_path / "b") as made:
            (made / "x").write_text("1")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_overwritten(kind, tmp_path):
    taken = tmp_path / "b"
    if kind == "file":
        taken.write_text("1")
    else:
        taken.mkdir()
        (taken / "x").write_text("1")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"), new_folder(taken):
        pass
