"""PEFT's generic tests pass for our configs, and what they skip is known."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .fetch import fetch_tests
from .run import Outcome, build_hub, run_suite

# One row a kind of config: its name in expected.json, the class, and what the class is always called with. A kind is
# run on the suites that expected.json lists for it: PEFT's custom models have no place for every part.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LNTuningConfig": ("peft_lntune:LNTuningConfig", {}),
    "UnifiedConfig": ("peft_lntune:UnifiedConfig", {"preset": "lora+ln"}),
}
# For each kind and suite: how many tests pass at least, and for which reasons the others are skipped.
EXPECTED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("expected.json").read_text())

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], Future[Outcome]]]:
    """The suites that are asked for, one process a core, in the order of the tests, the longest first."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    fetch_tests()
    build_hub()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wanted = [(call["kind"], call["suite"]) for call in calls if call.keys() == {"kind", "suite"}]
        yield {(kind, suite): pool.submit(run_suite, suite, *KINDS[kind]) for kind, suite in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("kind", "suite"), [(kind, suite) for kind in KINDS for suite in EXPECTED[kind]])
def test_suite_passes(outcomes: dict[tuple[str, str], Future[Outcome]], kind: str, suite: str) -> None:
    outcome = outcomes[kind, suite].result()
    expected = EXPECTED[kind][suite]
    if outcome.failed:
        pytest.fail("\n\n".join(f"{name}\n{text}" for name, text in outcome.failed.items()), pytrace=False)
    assert sorted(outcome.skipped) == sorted(expected["skips"])
    # Fewer would mean that tests were left out unnoticed, as after a renamed column in one of PEFT's tables.
    assert outcome.passed >= expected["passed"]


def test_a_failing_config_is_noticed() -> None:
    """PEFT's own LN tuning knows no targets for RoBERTa, so a run that does not fail tests nothing."""
    outcome = run_suite("token-classification", "peft:LNTuningConfig")
    assert any("Please specify `target_modules`" in text for text in outcome.failed.values())
