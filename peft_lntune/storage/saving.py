"""Saving an adapter's two files so that the folder holds a complete adapter at all times, even if the save is killed.

Weights and config cannot be replaced together in one step. So the new config is written first, with the old one inside
it; then the weights; then the new config alone. `saved_adapter.read_config` takes the config that matches the weights.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peft_lntune.storage.adapter_file import CONFIG_FILE, PICKLED_FILE, WEIGHTS_FILE
from peft_lntune.storage.atomic import put, staging
from peft_lntune.storage.manifest import PREVIOUS, seal_file
from peft_lntune.storage.saved_adapter import current_config

__all__ = ["new_adapters"]

_CARD = "README.md"


@contextmanager
def new_adapters(directory: str | os.PathLike, names: Iterable[str] = ()) -> Iterator[Path]:
    """Make a folder to save into, whose files are moved to `directory` when the block ends.

    Args:
        directory: the folder of one adapter, or of several adapters in subfolders; made if it is missing.
        names: names of the subfolders.

    Yields:
        The folder to save into.
    """
    target = Path(directory)
    with staging(target) as folder:
        for name in ("", *names):
            if (target / name / _CARD).is_file():  # saving adds to the card
                (folder / name).mkdir(exist_ok=True)
                (folder / name / _CARD).write_bytes((target / name / _CARD).read_bytes())
        yield folder
        for made in [folder, *sorted(entry for entry in folder.rglob("*") if entry.is_dir())]:
            _put_folder(made, target / made.relative_to(folder))


def _put_folder(made: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    weights = next((made / name for name in (WEIGHTS_FILE, PICKLED_FILE) if (made / name).is_file()), None)
    config = made / CONFIG_FILE
    pair = {weights, config} if weights is not None and config.is_file() else set()
    for file in sorted(entry for entry in made.iterdir() if entry.is_file() and entry not in pair):
        put(file, target / file.name)
    if not pair or weights is None:
        return
    seal_file(config, weights)
    if (target / CONFIG_FILE).exists():
        _announce(config, target)
    put(weights, target / weights.name)
    for stale in {WEIGHTS_FILE, PICKLED_FILE} - {weights.name}:  # PEFT may prefer the old file
        (target / stale).unlink(missing_ok=True)
    put(config, target / CONFIG_FILE)


def _announce(config: Path, target: Path) -> None:
    """Replace the old config by the new one, with the old one inside it while the old weights are in place."""
    new = json.loads(config.read_text(encoding="utf-8"))
    old = current_config(target)
    if not isinstance(new.get("manifest"), dict):
        return
    if old is not None:
        new["manifest"][PREVIOUS] = old
    announced = config.with_suffix(".both")
    announced.write_text(json.dumps(new, indent=2, sort_keys=True), encoding="utf-8")
    put(announced, target / CONFIG_FILE)
