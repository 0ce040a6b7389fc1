"""`fit_fisher_masks` in two processes that are not alike ends the same in both, and none waits for the other."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from peft_lntune import fit_fisher_masks
from tests.processes.fitting import batches, model

pytestmark = pytest.mark.end_to_end  # two processes that import everything; one process is in tests/tuner
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitting")
    command = [sys.executable, "-W", "ignore", "-m", "tests.processes.fitting"]
    runs = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [run.communicate(timeout=240)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("scenario", "samples", "given"),
    [("alike", 4, 2), ("a sample for one alone", 1, 1), ("batches for one alone", 2, 1)],
)
def test_both_choose_what_one_process_chooses_from_all_samples(scenario, samples, given, found):
    one, two = (process[scenario] for process in found)
    assert one == two
    alone = model(num_samples=samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = fit_fisher_masks(alone, batches(given)).masks
    assert one == ["masks", samples, {name: mask.tolist() for name, mask in masks.items()}]


@pytest.mark.parametrize(
    ("scenario", "kinds", "says"),
    [
        ("no batches", ["DataError", "DataError"], "no sample has been seen"),
        ("one raises", ["PeftLNTuneError", "OSError"], "the disk is gone"),
        ("one has no labels", ["DataError", "DataError"], "labels"),
        ("densities differ", ["ConfigError", "ConfigError"], "process 1 fits another adapter than process 0"),
        ("one is not active", ["ConfigError", "ConfigError"], "is not active"),
    ],
)
def test_an_error_in_one_is_an_error_in_both_and_nothing_has_changed(scenario, kinds, says, found):
    both = [process[scenario] for process in found]
    assert [kind for kind, _, _ in both] == kinds
    assert all(says in text for _, text, _ in both)
    assert all(untouched for _, _, untouched in both)
