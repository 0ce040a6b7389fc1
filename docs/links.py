"""Rewriting the links of a Markdown page: for the site (conf.py), and for the long description (setup.py)."""

import re
from collections.abc import Callable

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def relink(text: str, to: Callable[[str], str | None]) -> str:
    """Give the links of a page other targets; code stays as it is.

    Args:
        text: a page in Markdown.
        to: from the target of a link to the new one; None: no target, so the link becomes its text and an image goes.

    Returns:
        The page.

    Example:
        >>> relink("See [the docs](docs/a.md).", lambda target: None)
        'See the docs.'
    """

    def new(match: re.Match[str]) -> str:
        image, words, target = match.groups()
        found = to(target)
        if found is None:
            return "" if image else relink(words, to)
        return f"{image}[{words if image else relink(words, to)}]({found})"

    fences = re.split(r"(```.*?```)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(new, part) for part in fences)
