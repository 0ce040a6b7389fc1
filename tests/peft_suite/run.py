"""Run PEFT's tests for a config class, each suite in its own process.

By hand, in the project's folder: `python -m tests.peft_suite.run peft_lntune:LNTuningConfig [SUITE ...]`.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .fetch import CACHE, PACKAGE, fetch_tests

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
SUITES: dict[str, str] = {
    "custom": "test_custom_models.py",
    "decoder": "test_decoder_models.py",
    "encoder-decoder": "test_encoder_decoder_models.py",
    "feature-extraction": "test_feature_extraction_models.py",
    "sequence-classification": "test_seq_classifier.py",
    "token-classification": "test_token_classification_qa.py",
    "config": "test_config.py",
    "mixed": "mixed_checks.py",  # ours; the others are PEFT's
}


@dataclass
class Outcome:
    """What became of one suite: how many tests passed, and why the others did not."""

    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)  # reason: how often


def run_suite(suite: str, config: str, kwargs: dict[str, Any] | None = None, extra: tuple[str, ...] = ()) -> Outcome:
    """Run the tests of `SUITES[suite]` for the class `config`, written `module:Class`, called with `kwargs`.

    Raises:
        SuiteUnavailableError: PEFT's tests could not be had.
        RuntimeError: pytest ended without a report.
    """
    root = fetch_tests()
    environment = suite_environment(root, build_hub())
    folder = HERE if SUITES[suite] == "mixed_checks.py" else root / PACKAGE
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", str(folder / SUITES[suite]), "-p", "tests.peft_suite.plugin"]
        command += ["-c", str(root / "pytest.ini"), "--rootdir", str(root), "--noconftest", "-p", "no:cacheprovider"]
        command += ["--disable-warnings", "--tb=short", "-q", f"--junitxml={report}", f"--basetemp={scratch}/tmp"]
        command += ["--tuner", config, "--tuner-kwargs", json.dumps(kwargs or {}), *extra]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
        if not report.is_file():
            raise RuntimeError(f"PEFT's suite {suite} did not run:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return read_report(report)


def build_hub() -> Path:
    """The private Hub cache with the tiny models; built anew when the models or transformers change."""
    source = HERE / "tiny_models.py"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    home = CACHE / f"hub-{version('transformers')}-{digest}"
    if not home.is_dir():
        command = [sys.executable, "-m", "tests.peft_suite.tiny_models", str(home)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(PROJECT)}, capture_output=True)
    return home


def suite_environment(root: Path, home: Path) -> dict[str, str]:
    """Offline, on the CPU, with this checkout and PEFT's tests on the path, without the calling pytest's settings."""
    hidden = ("PYTHONWARNINGS", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return environment | {
        "PYTHONPATH": os.pathsep.join([str(PROJECT), str(root)]),
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # the models are tiny, and suites run side by side
        "TOKENIZERS_PARALLELISM": "false",
    }


def read_report(report: Path) -> Outcome:
    """Sum up pytest's JUnit file."""
    outcome = Outcome()
    for case in ElementTree.parse(report).iter("testcase"):
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skip = case.find("skipped")
        if bad is not None:
            outcome.failed[f"{case.get('classname')}::{case.get('name')}"] = bad.text or ""
        elif skip is not None:
            # the module a class lives in says nothing about why
            reason = re.sub(r"<class '[\w.]+'>", "<the class>", skip.get("message", ""))
            outcome.skipped[reason] = outcome.skipped.get(reason, 0) + 1
        else:
            outcome.passed += 1
    return outcome


def main() -> None:
    """Print the outcome of the named suites, or of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", metavar="MODULE:CLASS")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--kwargs", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("-k", dest="expression", metavar="EXPRESSION", help="only these tests, as in pytest")
    arguments = parser.parse_args()
    extra = ("-k", arguments.expression) if arguments.expression else ()
    for suite in arguments.suites or SUITES:
        start = time.perf_counter()
        outcome = run_suite(suite, arguments.config, arguments.kwargs, extra)
        counts = f"{outcome.passed} passed, {len(outcome.failed)} failed, {sum(outcome.skipped.values())} skipped"
        print(f"{suite}: {counts} in {time.perf_counter() - start:.0f} s")
        for reason, times in sorted(outcome.skipped.items()):
            print(f"  skipped {times}: {reason}")
        for name, text in outcome.failed.items():
            print(f"  FAILED {name}\n{text}")


if __name__ == "__main__":
    main()
