"""What happens between reading the options of a command and its work."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["load_package", "quiet"]


def load_package() -> None:
    """Run `import peft_lntune`, with torch, transformers and PEFT, if `peft_lntune_cli` has put it off."""
    package = sys.modules["peft_lntune"]
    if not hasattr(package, "__all__") and package.__spec__ is not None and package.__spec__.loader is not None:
        package.__spec__.loader.exec_module(package)


@contextmanager
def quiet() -> Iterator[None]:
    """Load the package, and unless stderr is a terminal, switch off progress bars and reports of libraries.

    What libraries log of missing weights is an error of ours (`peft_lntune.cli.models`). Warnings stay, one line each,
    except those of features that will change: they address the authors of the calling code.

    Yields:
        Nothing; the old settings return when the block ends.
    """
    if sys.stderr.isatty():
        load_package()
        with _one_line_per_warning():
            yield
        return
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        load_package()
        from transformers.utils import logging as bars

        shown = bars.is_progress_bar_enabled()
        bars.disable_progress_bar()
        try:
            with _one_line_per_warning():
                yield
        finally:
            if shown:
                bars.enable_progress_bar()
    finally:
        logging.disable(before)


@contextmanager
def _one_line_per_warning() -> Iterator[None]:
    """Show warnings without the place in the code that gave them."""
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = lambda message, *_, **__: print(f"Warning: {message}", file=sys.stderr)
        yield
