"""A run that is killed with SIGKILL, at any moment and again and again, ends bit-equal to one that was not."""

import random
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest

from peft_lntune import PeftLNTuneError, last_whole_checkpoint
from peft_lntune.storage import WEIGHTS_FILE
from tests.resume.worker import CASES, LAST, TASKS, build, run

SEED = 6


def files_in(folder: Path) -> dict[str, bytes]:
    """What a run ends with, and what training would go on from."""
    last = [folder / LAST / name for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")]
    found = [*last, *(folder / LAST).rglob("*.safetensors"), *(folder / "final").rglob("adapter_*")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found if file.is_file()}


def look_at_newest(case: str, folder: Path, whole: Path, scratch: Path) -> str:
    """Load the newest checkpoint as Trainer would, torn or not: it is refused, or is that of the uninterrupted run."""
    numbers = [int(place.name.rpartition("-")[2]) for place in folder.glob("checkpoint-*")]
    if not numbers:
        return "no checkpoint yet"
    with warnings.catch_warnings(record=True) as passed_over:
        warnings.simplefilter("always")
        last_whole_checkpoint(folder)
    newest = f"checkpoint-{max(numbers)}"
    model = build(case)
    refused = False
    for name in TASKS if case == "tasks" else ["default"]:
        own = name if case == "tasks" else "."
        try:
            model.load_adapter(str(folder / newest / own), name, is_trainable=True)
        except PeftLNTuneError:
            refused = True
        else:
            model.save_pretrained(str(scratch), selected_adapters=[name])
            loaded, expected = (root / own / WEIGHTS_FILE for root in (scratch, whole / newest))
            assert loaded.read_bytes() == expected.read_bytes(), f"{newest}/{own} is torn, and was loaded"
    assert passed_over or not refused
    return "torn, adapter refused" if refused else "torn behind the adapter" if passed_over else "whole"


def kill_again_and_again(case: str, folder: Path, kills: int) -> Counter[str]:
    """Kill runs at random moments, and compare each that comes to its end; return what the kills have left."""
    whole, own = folder / "whole", folder / "killed-0"
    run(case, folder / "first")  # it waits for the server
    begin = time.perf_counter()
    run(case, whole)
    seconds = time.perf_counter() - begin
    assert files_in(folder / "first") == files_in(whole)
    drawn, moments, left = random.Random(f"{SEED} {case}"), [], Counter[str]()
    while True:
        done = len(moments) == kills
        moment = drawn.uniform(0, seconds)
        if run(case, own, None if done else moment):
            moments.append(round(moment, 4))
            left[look_at_newest(case, own, whole, folder / "scratch")] += 1
            continue
        found, expected = files_in(own), files_in(whole)
        other = [name for name in expected if found.get(name) != expected[name]]
        assert not other, f"{case}: {other} in {own} differ after kills at {moments} of {seconds:.2f} s, seed {SEED}"
        if done:
            return left
        own = folder / f"killed-{len(moments)}"


def test_two_random_moments(tmp_path: Path) -> None:
    for case in ("ln", "tasks"):  # one test, since each process of the test run would start a server of its own
        assert kill_again_and_again(case, tmp_path / case, 2).total() == 2


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_fifty_random_moments(case: str, tmp_path: Path) -> None:
    left = kill_again_and_again(case, tmp_path, 50)
    print(f"{case}: of {left.total()} kills {dict(left)}")
    assert left.total() == 50
