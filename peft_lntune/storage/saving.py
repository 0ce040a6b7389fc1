"""An adapter is two files, and a save may be killed between them: what is in a folder is at all times one adapter.

The weights and the config that belongs to them cannot change places in one step. So the new config comes first, with
the old one inside it; then the weights; then the new config alone. Whoever reads in between takes the config whose
digest is that of the weights, see `saved_adapter.read_config`.
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
    """A folder to save into, whose files take their places in `directory` when all of them are written.

    Args:
        directory: of one adapter, or of several in folders of their own; made if it is missing.
        names: of those folders.
    """
    target = Path(directory)
    with staging(target) as folder:
        for name in ("", *names):
            if (target / name / _CARD).is_file():  # which whoever saves adds to
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
    for stale in {WEIGHTS_FILE, PICKLED_FILE} - {weights.name}:  # PEFT would read the one that it likes better
        (target / stale).unlink(missing_ok=True)
    put(config, target / CONFIG_FILE)


def _announce(config: Path, target: Path) -> None:
    """Put the new config in place of the old one, which is kept inside it while the old weights are still there."""
    new = json.loads(config.read_text(encoding="utf-8"))
    old = current_config(target)
    if not isinstance(new.get("manifest"), dict):
        return
    if old is not None:
        new["manifest"][PREVIOUS] = old
    announced = config.with_suffix(".both")
    announced.write_text(json.dumps(new, indent=2, sort_keys=True), encoding="utf-8")
    put(announced, target / CONFIG_FILE)
