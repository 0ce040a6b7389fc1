"""The one warning about modules that look like norms and are not tuned."""

import warnings
from collections import defaultdict
from collections.abc import Mapping

from peft_lntune.norms.find import Missed

__all__ = ["warn_of_missed"]

_NAMED = 20  # modules of one kind that the warning names


def warn_of_missed(missed: Mapping[str, Missed]) -> None:
    """Name modules that a config would tune if they could be tuned as norms, those that are alike with one reason.

    Args:
        missed: by name; nothing is said where there are none.
    """
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, its in missed.items():
        alike[its.module_class, its.reason].append(name)
    groups = []
    for (module_class, reason), names in alike.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        groups.append(f"{', '.join(names[:_NAMED])}{more} ({module_class}): {reason}")
    if groups:
        one = len(missed) == 1
        which = "1 module looks like a norm and is" if one else f"{len(missed)} modules look like norms and are"
        warnings.warn(
            f"{which} not tuned. {'; '.join(groups)}. print(plan(model, config)) lists each. Name it in target_modules "
            "to tune it as any other module, or in exclude_modules to leave it out without this warning.",
            stacklevel=3,
        )
