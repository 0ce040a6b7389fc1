"""Model cards that name the import, because PEFT alone fails on our adapters with a bare `KeyError: 'LNTUNE'`."""

import os
from pathlib import Path

from peft_lntune.version import INSTALL

__all__ = ["IMPORT_LINE", "name_import"]

IMPORT_LINE = "import peft_lntune"

CARD_FILE = "README.md"
_NEW_CARD = "---\nlibrary_name: peft\n---\n"
_SECTION = f"""
## How to load this adapter

This adapter's type comes from the package peft_lntune; without it, PEFT fails with `KeyError: 'LNTUNE'`. The package is
not on PyPI yet: install it with `{INSTALL}`, and put one line before the code that loads the adapter:

```python
{IMPORT_LINE}
```
"""


def name_import(directory: str | os.PathLike) -> None:
    """Add `import peft_lntune` to the model card in a folder, or make a card. Calling it again changes nothing.

    Args:
        directory: the folder of the adapter.
    """
    file = Path(directory, CARD_FILE)
    text = file.read_text(encoding="utf-8") if file.exists() else _NEW_CARD
    if IMPORT_LINE not in text.splitlines():
        file.write_text(text.rstrip("\n") + "\n" + _SECTION, encoding="utf-8")
