"""A score that is registered is known to Python and to the command line by its name."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from peft_lntune.errors import ConfigError
from peft_lntune.selection import find_score, magnitude_scores, random_scores, register_score, select
from peft_lntune.selection.parameters import find_parameters
from peft_lntune.selection.scores import SCORES
from tests.cli.saved import refused, run, save_model, task, write_rows


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model", labels=2)


@pytest.fixture
def last_entries(monkeypatch):
    """A new score, in a registry of its own: the place of an entry in its parameter."""
    monkeypatch.setattr("peft_lntune.selection.scores.SCORES", dict(SCORES))

    @register_score("last")
    def last_scores(model, parameters=None, seed=0):
        found = find_parameters(model, parameters)
        return {name: torch.arange(value.numel()).view(value.shape) + float(seed) for name, value in found.items()}

    return last_scores


def test_a_new_score_from_python_and_from_the_command_line(last_entries, model, tmp_path):
    assert find_score("last") is last_entries
    masks, scores = tmp_path / "m.safetensors", tmp_path / "s.safetensors"
    options = ("--score", "last", "--count", 1, "--scope", "tensor", "--seed", 3, "--out", masks, "--scores", scores)
    result = run("fisher", "--model", model, *options)
    assert result.exit_code == 0
    assert "chosen by last" in result.stdout
    wanted = last_entries(AutoModel.from_pretrained(model), seed=3)
    found = {name.removeprefix("bert."): value for name, value in load_file(scores).items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    for mask in load_file(masks).values():
        assert mask.nonzero().tolist() == [[len(mask) - 1]]


@pytest.mark.parametrize(("name", "score"), [("magnitude", magnitude_scores), ("random", random_scores)])
def test_scores_without_data(name, score, model, tmp_path):
    out = tmp_path / "m.safetensors"
    assert run("fisher", "--model", model, "--score", name, "--out", out).exit_code == 0
    wanted = select(score(AutoModel.from_pretrained(model)), density=0.2)
    found = {key.removeprefix("bert."): mask for key, mask in load_file(out).items()}
    assert sum(int(mask.sum()) for mask in found.values()) == sum(int(mask.sum()) for mask in wanted.values())
    if name == "magnitude":  # a random number depends on the parameter's whole name
        assert all(torch.equal(found[key], mask) for key, mask in wanted.items())


def test_a_name_is_taken_once(last_entries):
    with pytest.raises(ConfigError, match="a score 'last' already"):
        register_score("last")(last_entries)


def test_unknown_names(model, tmp_path):
    with pytest.raises(ConfigError, match=r"score='size': choose one of 'magnitude', .*'fisher'"):
        find_score("size")
    assert refused(run("fisher", "--model", model, "--score", "size", "--out", tmp_path / "m"), "score='size'")


def test_options_that_mean_nothing_to_a_score(model, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", task())
    for option, value in (("--data", data), ("--kind", "mc"), ("--seed", 1), ("--batch-size", 3)):
        result = run("fisher", "--model", model, "--score", "magnitude", option, value, "--out", tmp_path / "m")
        assert result.exit_code == 2
        assert f"--score magnitude does not use {option}" in result.stderr
    result = run("fisher", "--model", model, "--out", tmp_path / "m")
    assert result.exit_code == 2
    assert "Give labelled texts with --data" in result.stderr
