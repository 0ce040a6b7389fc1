"""The table at the top of a paper's page: each claim of its abstract, and what the rows of every protocol say of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.claims import NOT_YET, Finding
from benchmarks.harness.classification import PROTOCOLS, Protocol
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.finals import Finals, reported
from benchmarks.harness.paired import FAILS, HOLDS, INCONCLUSIVE, LEVEL
from benchmarks.harness.rows import Rows
from benchmarks.harness.tables import NONE, markdown

HEADER = ("claim of the abstract", "measured on", "verdict", f"comparisons ({LEVEL:.0%} interval)", "to decide it")
ABOUT_ANSWERS = (
    "Differences are in points. A claim with several comparisons holds if all of them hold and fails if one of them "
    "fails. `edge` names the methods for which a chosen learning rate was the smallest or largest tried."
)


@dataclass(frozen=True)
class Answer:
    """One claim of an abstract.

    Attributes:
        claim: as the paper makes it.
        findings: of the comparisons that it becomes here; all must hold.
    """

    claim: str
    findings: Sequence[Finding]

    @property
    def measured(self) -> list[Finding]:
        """The comparisons that have rows."""
        return [finding for finding in self.findings if finding.measured is not None]

    @property
    def verdict(self) -> str | None:
        """One word for the claim; None without a measurement."""
        words = {finding.verdict for finding in self.measured}
        if not words:
            return None
        return FAILS if FAILS in words else HOLDS if words == {HOLDS} else INCONCLUSIVE


Answers = Callable[[Comparison], Sequence[Answer]]


def answer_table(settings: Mapping[str, Sequence[Answer]]) -> str:
    """Return the table: a line for each claim and each setting in which some of it was measured.

    Args:
        settings: what was measured on -> an answer for each claim, in the same order everywhere.

    Example:
        >>> print(answer_table({"MiniLM": [Answer("a helps", [Finding("a above b", "1.5", "holds", "1.5 (1 to 2)")])]}))
        | claim of the abstract | measured on | verdict | comparisons (95% interval) | to decide it |
        |---|---|---|---|---|
        | a helps | MiniLM | holds | a above b: 1.5 (1 to 2), holds | - |
    """
    lines: list[list[object]] = []
    for answers in zip(*settings.values(), strict=True):
        ran = [(name, answer) for name, answer in zip(settings, answers, strict=True) if answer.verdict]
        said = answers[0].claim
        for name, answer in ran:
            each = "<br>".join(map(_comparison, answer.measured))
            open_ones = [finding for finding in answer.measured if finding.verdict == INCONCLUSIVE and finding.more]
            named = len(answer.measured) > 1
            more = "<br>".join(f"{f.wanted}: {f.more}" if named else f.more for f in open_ones)
            lines.append([said, name, answer.verdict, each, more or NONE])
            said = ""
        if not ran:
            lines.append([said, NONE, NOT_YET.lower(), NONE, NONE])
    return markdown(HEADER, lines)


def _comparison(finding: Finding) -> str:
    edge = f" (edge: {finding.edge})" if finding.edge else ""
    return f"{finding.wanted}: {finding.short or finding.measured}, {finding.verdict}{edge}"


def measured_settings(
    rows: Rows, protocol: Protocol, tasks: Sequence[str], seeds: Sequence[int], answers: Answers
) -> dict[str, Sequence[Answer]]:
    """Return the answers of a page's own protocol, and of the others of which there are rows.

    Args:
        rows: of the page, those of other pages included.
        protocol: of the page.
        tasks: that averages are over, as far as they were run.
        seeds: planned ones.
        answers: what a comparison says of each claim.
    """
    others = [each for name, each in PROTOCOLS.items() if name != protocol.name]
    found: dict[str, Sequence[Answer]] = {}
    for each in (protocol, *others):
        ran = {cell["task"] for cell in reported(rows, each, every=True)}
        kept = [task for task in tasks if task in ran]
        if kept:
            said = f"{each.said}: {', '.join(kept)}"
            found[said] = answers(Comparison(Finals(rows, each, seeds), kept, kept))
    return found


def answer_section(settings: Mapping[str, Sequence[Answer]]) -> list[str]:
    """Return the paragraphs at the top of a page; none without rows."""
    return ["## The claims of the abstract", answer_table(settings), ABOUT_ANSWERS] if settings else []
