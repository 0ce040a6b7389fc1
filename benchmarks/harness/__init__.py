"""The harness of every experiment: tasks, arms, training, result rows, tables and plots."""

import sys
from pathlib import Path

# The examples are scripts that import each other by bare names. What they read and score is read and scored by the
# same code here; they stand last on the path, so that they hide nothing that is installed.
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
