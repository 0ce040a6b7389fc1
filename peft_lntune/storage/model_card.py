"""The model card says what to import: PEFT alone stops at our adapters with a bare `KeyError: 'LNTUNE'`."""

import os
from pathlib import Path

__all__ = ["IMPORT_LINE", "name_import"]

IMPORT_LINE = "import peft_lntune"

CARD_FILE = "README.md"
_NEW_CARD = "---\nlibrary_name: peft\n---\n"
_SECTION = f"""
## How to load this adapter

PEFT learns this adapter's type from another package, and without it stops with `KeyError: 'LNTUNE'`. So install it,
`pip install peft-lntune`, and put one line before the code that loads the adapter:

```python
{IMPORT_LINE}
```
"""


def name_import(directory: str | os.PathLike) -> None:
    """Let the card in `directory` say `import peft_lntune`; a card is made where there is none. Idempotent."""
    file = Path(directory, CARD_FILE)
    text = file.read_text(encoding="utf-8") if file.exists() else _NEW_CARD
    if IMPORT_LINE not in text.splitlines():
        file.write_text(text.rstrip("\n") + "\n" + _SECTION, encoding="utf-8")
