"""A small synthetic data set: sentences about meals, hotel rooms, films and books, with two labels each.

Task. An adjective is stated ("the soup was bland"), refuted ("nobody could say that the soup was bland") or
outweighed ("although the soup was bland, the waiter was kind, and that is what counts": the clause that the speaker
calls decisive gives the label). So the same words occur under both labels, and a classifier over fixed features has to
recognize the construction.

Held out. No aspect, adjective or template of the validation part occurs in the training part; the domains
(restaurant, hotel, film, book), the classes and the three constructions are shared.

Two tasks label the same sentences: `sentiment` (0 negative, 1 positive) and `topic` (0 a place, 1 a story). Columns
are those of GLUE's sst2: sentence, label, idx. Equal seeds give equal bytes.

The data is made to show a difference in minutes, not to measure: the templates were chosen for what a small model can
infer. Results on real tasks are in benchmarks/.

    python examples/demo_data.py --out runs/demo/data
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TASKS = ("sentiment", "topic")
LABEL_NAMES = {"sentiment": ("negative", "positive"), "topic": ("place", "story")}
PARTS = ("train", "validation")
NEGATIVE, POSITIVE = 0, 1


@dataclass(frozen=True)
class Kind:
    """Aspects one can speak of with the same adjectives; word lists are those of (train, validation)."""

    topic: int
    domain: str
    aspects: tuple[str, str]
    praise: tuple[str, str]
    blame: tuple[str, str]

    def words(self, field: str, part: str) -> list[str]:
        """The words of one field in one part of the data."""
        return getattr(self, field)[PARTS.index(part)].split(", ")


KINDS = (
    Kind(
        topic=0,
        domain="restaurant",
        aspects=(
            "soup, bread, pasta, salad, steak, dessert, chicken, pizza",
            "curry, pie, fish, risotto, sandwich, omelette",
        ),
        praise=("delicious, tasty, fresh, excellent, wonderful", "flavourful, delightful, perfect, superb, appetising"),
        blame=("bland, greasy, nasty, awful, disgusting", "revolting, tasteless, terrible, inedible, dreadful"),
    ),
    Kind(
        topic=0,
        domain="restaurant",
        aspects=("waiter, manager, cook", "waitress, barman, chef"),
        praise=("friendly, helpful, polite, kind", "attentive, courteous, charming, welcoming"),
        blame=("rude, careless, unfriendly, arrogant", "impolite, hostile, unpleasant, grumpy"),
    ),
    Kind(
        topic=0,
        domain="hotel",
        aspects=("room, bed, bathroom, lobby, balcony, pool", "suite, shower, sauna, mattress, terrace"),
        praise=("clean, comfortable, lovely, beautiful, excellent", "spotless, cosy, inviting, gorgeous, pleasant"),
        blame=("dirty, shabby, ugly, smelly, awful", "filthy, run-down, grubby, disgraceful, horrid"),
    ),
    Kind(
        topic=0,
        domain="hotel",
        aspects=("receptionist, porter, cleaner", "concierge, doorman, landlady"),
        praise=("friendly, helpful, polite, kind", "attentive, courteous, charming, welcoming"),
        blame=("rude, careless, unfriendly, arrogant", "impolite, hostile, unpleasant, grumpy"),
    ),
    Kind(
        topic=1,
        domain="film",
        aspects=(
            "plot, acting, script, camera work, ending, dialogue",
            "screenplay, cast, opening scene, directing, finale",
        ),
        praise=(
            "brilliant, gripping, clever, wonderful, excellent",
            "superb, captivating, ingenious, delightful, masterly",
        ),
        blame=("boring, dull, silly, awful, clumsy", "tedious, dreary, ludicrous, terrible, lifeless"),
    ),
    Kind(
        topic=1,
        domain="book",
        aspects=("story, first chapter, narrator, prose, preface", "novel, second half, narration, epilogue, prologue"),
        praise=(
            "brilliant, gripping, clever, wonderful, witty",
            "superb, captivating, ingenious, delightful, enchanting",
        ),
        blame=("boring, dull, silly, awful, confusing", "tedious, dreary, ludicrous, terrible, lifeless"),
    ),
)

# {x} is an aspect and {a} its adjective; {y} is another aspect of the same domain and {b} its adjective, of the class
# that {a} is not of. STATED: the sentence means {a}. REFUTED: it means the opposite of {a}. OUTWEIGHED: it means {b}.
STATED = (
    (
        "The {x} was {a}.",
        "I thought that the {x} was really {a}.",
        "Everyone agreed that the {x} was {a}.",
        "It is true what they say: the {x} is {a}.",
        "The {x} was every bit as {a} as I had been told.",
        "You will not believe how {a} the {x} was.",
        "There is no doubt that the {x} was {a}.",
        "They told me that the {x} was {a}, and that was right.",
        "Friends had said that the {x} was {a}, and I agree.",
        "I expected the {x} to be {a}, and so it was.",
        "A colleague said that the {x} was {a}, and he had it right.",
    ),
    (
        "I have to say, the {x} was truly {a}.",
        "My sister claimed that the {x} was {a}, and she was right.",
        "Without a doubt, the {x} was {a}.",
        "What I remember most is how {a} the {x} was.",
        "In the end, all of us found the {x} {a}.",
    ),
)
REFUTED = (
    (
        "The {x} was not {a} at all.",
        "The {x} was never {a}.",
        "The {x} isn't {a} in the slightest.",
        "I did not think that the {x} was {a}.",
        "I would never call the {x} {a}.",
        "Nobody could say that the {x} was {a}.",
        "No one I asked thought that the {x} was {a}.",
        "At no time was the {x} {a}.",
        "They told me that the {x} was {a}, and that was wrong.",
        "Friends had said that the {x} was {a}, but I disagree.",
        "A colleague said that the {x} was {a}, but he had it wrong.",
        "The reviews call the {x} {a}, but that is not so.",
        "Whoever says that the {x} was {a} is lying.",
        "The {x} was anything but {a}.",
        "The {x} was the opposite of {a}.",
        "I expected the {x} to be {a}, but it was quite the reverse.",
        "There was nothing {a} about the {x}.",
        "Don't let anyone tell you that the {x} is {a}.",
        "It is a lie that the {x} is {a}.",
        "It is wrong to say that the {x} was {a}.",
        "Never did I find the {x} {a}.",
    ),
    (
        "The {x} wasn't even remotely {a}.",
        "My sister claimed that the {x} was {a}, but she was mistaken.",
        "It is simply not true that the {x} was {a}.",
        "In no way was the {x} {a}.",
        "Not once did the {x} strike me as {a}.",
        "Nobody I know would call the {x} {a}.",
        "By no stretch of the imagination could you call the {x} {a}.",
    ),
)
OUTWEIGHED = (
    (
        "The {x} was {a}, but the {y} was so {b} that nothing else mattered.",
        "Although the {x} was {a}, the {y} was {b}, and that is what counts.",
        "The {x} was {a}; still, what I will remember is the {b} {y}.",
        "Never mind that the {x} was {a}: the {y} was {b}, and that settles it.",
    ),
    (
        "The {x} may have been {a}, but it was the {b} {y} that made up my mind.",
        "I soon forgot that the {x} was {a}, because the {y} was so {b}.",
        "Even though the {x} was {a}, the {y} was {b}, and to me that is all that matters.",
    ),
)
FAMILIES = (STATED, REFUTED, OUTWEIGHED)


def draw_sentence(rng: random.Random, part: str, sentiment: int) -> tuple[str, int]:
    """One sentence that means `sentiment`, and its topic."""
    family = rng.choices(FAMILIES, weights=(2, 1, 1))[0]
    template = rng.choice(family[PARTS.index(part)])
    kind = rng.choice(KINDS)
    x = rng.choice(kind.words("aspects", part))
    other = rng.choice([k for k in KINDS if k.domain == kind.domain])
    y = rng.choice([aspect for aspect in other.words("aspects", part) if aspect != x])
    meaning = ("blame", "praise")
    of_x = meaning[sentiment if family is STATED else 1 - sentiment]
    a = rng.choice(kind.words(of_x, part))
    b = rng.choice(other.words(meaning[sentiment], part))
    return template.format(x=x, y=y, a=a, b=b), kind.topic


def sentences(part: str, count: int, seed: int) -> Iterator[dict]:
    """`count` different sentences with the label of each task, the two sentiments in turn."""
    rng = random.Random(f"{seed}-{part}")
    seen: set[str] = set()
    while len(seen) < count:
        sentiment = (NEGATIVE, POSITIVE)[len(seen) % 2]
        sentence, topic = draw_sentence(rng, part, sentiment)
        if sentence not in seen:
            seen.add(sentence)
            yield {"sentence": sentence, "sentiment": sentiment, "topic": topic}


def write_data(out: Path, task: str, train: int = 4000, validation: int = 500, seed: int = 0) -> Path:
    """Write `train.jsonl` and `validation.jsonl` of one task into `out/task` and return that folder."""
    folder = Path(out) / task
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in zip(PARTS, (train, validation), strict=True):
        labelled = enumerate(sentences(part, count, seed))
        rows = [{"sentence": row["sentence"], "label": row[task], "idx": i} for i, row in labelled]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8", newline="\n")
    return folder


def main(argv: list[str] | None = None) -> None:
    """Write the data of every task and show a few rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--train", type=int, default=4000, help="training sentences")
    parser.add_argument("--validation", type=int, default=500, help="validation sentences")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for task in TASKS:
        print(f"{task}: {write_data(args.out, task, args.train, args.validation, args.seed)}")
    for part in PARTS:
        for row in sentences(part, 10, args.seed):
            labels = ", ".join(LABEL_NAMES[task][row[task]] for task in TASKS)
            print(f"{part:>10}  {labels:<16}  {row['sentence']}")


if __name__ == "__main__":
    main()
