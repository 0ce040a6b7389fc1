"""Each figure of the README and the docs is what its row says, and a figure without a source does not slip in.

`docs/figures.toml` says where each figure comes from; its head explains how to add one.
"""

import bisect
import re
import tomllib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pytest

from tests.figures import matches, rendered

ROOT = Path(__file__).parent.parent
SOURCES = tomllib.loads((ROOT / "docs/figures.toml").read_text(encoding="utf-8"))
PAGES = [
    "README.md",
    *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md")),
    *(sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/methods/*.md"))),
]

NUMBER = re.compile(r"(?<![\w.,/^-])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?![\w/^])")
UNIT = re.compile(
    r"\s?(?:%|±|points?\b|times\b|bytes\b|[kKMG]B\b|milliseconds|ms\b|operations\b|entries\b|adapters per second)"
)
# What holds no figure: tolerances and rates (1e-3), bounds, code, addresses, and names of papers, versions and models.
NO_FIGURE = re.compile(
    r"\d+e-\d+|\bwithin \d+ points?|\bat (?:least|most) [\d.,]*\d"
    r"|`[^`]*`|\]\([^)]*\)|<[^<>]*>|arXiv:? ?[\d.]+|#\d+|\bv?\d+(?:\.\d+){2,}"
    r"|(?:Python|PyTorch|torch|transformers|TRL|diffusers|bitsandbytes|optuna|Lightning|DeepSpeed|liger-kernel|Llama|Qwen"
    r"|sentence-transformers|Gemma|OLMo|GPT-|SD|FSDP|ZeRO) \d[\d.]*(?: and \d)?"
)


def flat(page: str) -> str:
    """A page as one line, without its blocks of code: where a line breaks does not matter."""
    text = re.sub(r"^( *)```.*?^ *```$", " ", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?m)^    (?![ -]).*$", lambda line: line[0] if re.match(r" *[-*|\d]", line[0]) else " ", text)
    return re.sub(r"\s+", " ", text)


def templates(page: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every template of a page, with the names that its expressions may use."""
    sources = SOURCES["pages"].get(page, {})
    for template in sources.get("figures", []):
        yield template, {}
    for table in sources.get("tables", []):
        for label, values in table["rows"].items():
            yield f"| {label} | {table['cells']} |", dict(zip(table["names"], values, strict=True))


def figures(text: str) -> Iterator[tuple[int, int]]:
    """Where a text has numbers that look measured: with a decimal point, thousands, a unit, or alone in a table."""
    barred = [found.span() for found in NO_FIGURE.finditer(text)]
    for found in NUMBER.finditer(text):
        start, end = found.span()
        if any(first <= start < last for first, last in barred):
            continue
        alone = text[:start].rstrip(" *+-").endswith("|") and text[end:].lstrip(" *").startswith("|")
        if re.search(r"[.,]\d", found[0]) or UNIT.match(text, end) or text[:start].endswith("± ") or alone:
            yield start, end


@pytest.mark.parametrize("page", PAGES)
def test_figures_are_those_of_the_rows(page: str) -> None:
    text, sourced, wrong = flat(page), [], []
    for template, names in templates(page):
        said, places = rendered(re.sub(r"\s+", " ", template.strip()), names)
        found = list(matches(text, said))
        sourced += [(start + first, start + last) for start in found for first, last in places]
        if not found:
            near = get_close_matches(said, windows(text, len(said)), n=1, cutoff=0)
            wrong.append(f"  the rows say:   {said}\n  {page} says: {''.join(near)}")
    assert not wrong, f"{page} differs from the rows (see docs/figures.toml):\n" + "\n".join(wrong)
    for given in SOURCES["pages"].get(page, {}).get("given", []):
        assert given["why"], f"a figure without a row needs its reason: {given}"
        found = list(matches(text, given["text"]))
        assert found, f"docs/figures.toml quotes what {page} does not say: {given['text']!r}"
        sourced += [(start, start + len(given["text"])) for start in found]
    sourced.sort()
    unknown = []
    for start, end in figures(text):
        if not any(first <= start and end <= last for first, last in sourced):
            unknown.append(f"  {text[start:end]:>10}   in: {text[max(0, start - 60) : end + 40]}")
    assert not unknown, (
        f"{page} has {len(unknown)} figures without a source; say in docs/figures.toml which row they come from:\n"
        + "\n".join(unknown)
    )


def windows(text: str, length: int) -> list[str]:
    """Pieces of a text of a length, from the beginning of each word."""
    starts = [0, *(found.end() for found in re.finditer(r" ", text))]
    return [text[start : start + length] for start in starts[: bisect.bisect(starts, len(text) - length) or 1]]


def test_every_page_of_the_list_exists() -> None:
    assert set(SOURCES["pages"]) <= set(PAGES), set(SOURCES["pages"]) - set(PAGES)


def test_a_figure_without_a_source_is_seen() -> None:
    seen = lambda text: [text[start:end] for start, end in figures(text)]  # noqa: E731
    assert seen("It reaches 81.4 on sst2, 3 points more, at 100 %.") == ["81.4", "3", "100"]
    assert seen("| ln | **30** | 43,464 bytes |") == ["30", "43,464"]
    assert not seen("Two rows of 16 with `x = 0.5`, arXiv 2211.08682, Python 3.11, [a](b_1.5.md), 1e-3.")


def test_a_number_within_a_longer_one_is_no_match() -> None:
    assert list(matches("81.45 and 181.4 and 81.4.", "81.4")) == [20]
