"""The matrix of data files: what a user has, and what the user sees. The tables in docs/data.md are made of it."""

import json
from pathlib import Path

import datasets
import pytest
from question_answering import read_questions
from sentence_embeddings import read_pairs
from sft import read_rows
from task_data import PARTS, read_data
from token_classification import read_tagged

from peft_lntune.errors import DataError

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv(*rows):
    return "".join(f"{row}\n" for row in rows).encode()


def two(first, second):
    """A table with two texts and these labels."""
    return csv("text,label", f"a,{first}", f"b,{second}")


def parquet(names=("no", "yes"), labels=(0, 1), several=False):
    kind = datasets.ClassLabel(names=list(names))
    features = {"text": datasets.Value("string"), "label": datasets.Sequence(kind) if several else kind}
    return datasets.Dataset.from_dict({"text": ["a", "b"], "label": list(labels)}, features=datasets.Features(features))


# What the user has: file or files (train, validation), options -> what the user sees.

TEXTS = {
    "commas, semicolons, tabs or bars": ("csv", csv("text;label", "a, b;x", "c;y"), {}, "2 classes: x (1), y (1)"),
    "a byte order mark": ("csv", b"\xef\xbb\xbf" + two("x", "y"), {}, "2 classes: x (1), y (1)"),
    "an ending in capitals": ("CSV", two("x", "y"), {}, "2 classes: x (1), y (1)"),
    "a text with quoted line breaks and commas": (
        "csv",
        b'text,label\n"a,\nb",x\nc,y\n',
        {},
        "2 classes: x (1), y (1)",
    ),
    "a text of 300,000 characters": ("csv", two("x", "y") + b"c" * 300_000 + b",y\n", {}, "2 classes: x (1), y (2)"),
    "another encoding": (
        "csv",
        "text,label\ncafé,x\nb,y\n".encode("cp1252"),
        {},
        "train.csv is not utf-8-sig: 'utf-8' codec can't decode byte 0xe9 in position 14: invalid continuation byte. "
        "Name its encoding, such as --encoding cp1252.",
    ),
    "another encoding, named": (
        "csv",
        "text,label\ncafé,x\nb,y\n".encode("cp1252"),
        {"encoding": "cp1252"},
        "2 classes: x (1), y (1)",
    ),
    "cp1252, read as Latin-1": (
        "csv",
        "text,label\n“a”,x\nb,y\n".encode("cp1252"),
        {"encoding": "latin-1"},
        r"line 2 of train.csv has the control character '\x93', so its encoding is not latin-1, or it is no text. "
        "Name its encoding, such as --encoding cp1252.",
    ),
    "an encoding that does not exist": (
        "csv",
        two("x", "y"),
        {"encoding": "utf-9"},
        "unknown encoding 'utf-9'. Name one such as utf-8, cp1252 or utf-16.",
    ),
    "a file that gzip compressed": ("csv", b"\x1f\x8b\x08", {}, "train.csv is compressed by gzip. Unpack it first."),
    "an Excel workbook": (
        "csv",
        b"PK\x03\x04",
        {},
        "train.csv is a zip archive or an Excel workbook. Unpack it, or save the sheet as CSV.",
    ),
    "an empty file": ("csv", b"", {}, "train.csv has no rows."),
    "a header alone": ("csv", b"text,label\n", {}, "train.csv has no rows."),
    "an empty list": ("json", b"[]", {}, "train.json has no rows."),
    "a column missing": (
        "csv",
        csv("text,topic", "a,x"),
        {"text_columns": ["text"]},
        "train.csv has the columns text, topic; wanted are text, label. Name yours: --text-column, --label-column.",
    ),
    "columns of other names, named": (
        "csv",
        csv("id,body,topic", "1,a,x", "2,b,y"),
        {"text_columns": ["body"], "label_columns": ["topic"]},
        "2 classes: x (1), y (1)",
    ),
    "a pair of texts": (
        "csv",
        csv("title,body,label", "a,b,x", "c,d,y"),
        {"text_columns": ["title", "body"]},
        "2 classes: x (1), y (1)",
    ),
    "two columns of one name": (
        "csv",
        csv("text,label,label", "a,x,y"),
        {},
        "train.csv has 2 columns 'label'. Rename all but one.",
    ),
    "a comma that is not quoted": (
        "csv",
        csv("text,label", "a, b,x"),
        {},
        "train.csv is not a table with 2 columns, separated by ',': line 2 has 3 fields. Quote texts that contain the "
        "separator, a quotation mark or a line break, and double the quotation marks in them; or write JSON lines.",
    ),
    "a quotation mark that is not doubled": (
        "csv",
        csv("text,label", '"a" b,x', 'c,"y"'),
        {},
        "train.csv is not a table with 2 columns, separated by ',': the row that begins in line 2 has a quotation mark "
        "too many or too few (',' expected after '\"').",
    ),
    "a quotation mark that would swallow rows": (
        "tsv",
        csv("text\tlabel", '"a\tx', 'b"\ty'),
        {},
        "train.tsv is not a table with 2 columns, separated by '\\t': a quotation mark before line 3 begins a text "
        "that holds a tab and a line break.",
    ),
    "a line that is not JSON": ("jsonl", lines({"text": "a"}) + b"{\n", {}, "line 2 of train.jsonl is not JSON:"),
    "JSON lines": (
        "jsonl",
        lines({"text": "a", "label": 0}, {"text": "b", "label": 1}),
        {},
        "2 classes: 0 (1), 1 (1)",
    ),
    "a JSON array": (
        "json",
        b'[{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]',
        {},
        "2 classes: x (1), y (1)",
    ),
    "Parquet with names of classes": ("parquet", parquet(), {}, "2 classes: no (1), yes (1)"),
    "Parquet whose parts number the classes in another order": (
        "parquet",
        (parquet(), parquet(names=("yes", "no"), labels=(1, 0))),
        {},
        "2 classes: no (1), yes (1)",
    ),
    "class names": ("csv", two("yes", "no"), {}, "2 classes: no (1), yes (1)"),
    "numbers, also written as 1.0": ("csv", two("2.0", "1"), {}, "2 classes: 1 (1), 2 (1)"),
    "truth values": (
        "jsonl",
        lines({"text": "a", "label": True}, {"text": "b", "label": False}),
        {},
        "2 classes: 0 (1), 1 (1)",
    ),
    "stars, 1 to 3": ("csv", csv("text,label", "a,1", "b,2", "c,3"), {}, "3 classes: 1 (1), 2 (1), 3 (1)"),
    "values such as 0.5": ("csv", two("0.5", "2"), {}, "values from 0.5 to 2"),
    "whole numbers with gaps": (
        "csv",
        csv("text,label", "a,60", "b,75", "c,100"),
        {},
        "train.csv: the labels are 3 whole numbers from 60 to 100, which look like a scale. Say --regression to learn "
        "values, or --no-regression to learn classes.",
    ),
    "a decimal comma": (
        "csv",
        csv("text;label", "a;0,5", "b;1,5"),
        {},
        "train.csv: the label of row 0 is '0,5', a number with a comma. Write a point to learn values; or say "
        "--no-regression to learn classes, or --label-separator , if it is several classes.",
    ),
    "a list of classes per row": (
        "jsonl",
        lines({"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}),
        {},
        "2 classes, several per row: x (1), y (1)",
    ),
    "several columns of 0 and 1": (
        "csv",
        csv("text,toxic,insult", "a,1,0", "b,1,1"),
        {"label_columns": ["toxic", "insult"]},
        "2 classes, several per row: toxic (2), insult (1)",
    ),
    "something else in such a column": (
        "csv",
        csv("text,toxic,insult", "a,1,0", "b,2,1"),
        {"label_columns": ["toxic", "insult"]},
        "train.csv: row 1 has '2' in 'toxic'; several label columns hold 0 or 1.",
    ),
    "several classes in one text": (
        "csv",
        csv("text,label", "a,x|y", "b,x", "c,y|z"),
        {},
        "train.csv: the label of row 0 is 'x|y', which looks like several classes. Say --label-separator '|' to learn "
        "several per row, or --no-regression to learn one per row.",
    ),
    "several classes in one text, named": (
        "csv",
        csv("text,label", "a,x|y", "b,x", "c,|"),
        {"label_separator": "|"},
        "2 classes, several per row: x (2), y (1)",
    ),
    "a label that is missing": (
        "csv",
        two("x", ""),
        {},
        "train.csv: the label of row 1 is '': it is missing. Fill it in or remove the row.",
    ),
    "NaN": (
        "csv",
        two("0", "NaN"),
        {},
        "train.csv: the label of row 1 is 'NaN', which is not a finite number. Fill it in or remove the row.",
    ),
    "-1 for a hidden label": (
        "csv",
        csv("text,label", "a,0", "b,-1"),
        {},
        "train.csv: labels of classes are counted from 0, but that of row 1 is '-1'. Remove the row if its label is "
        "hidden, or say --regression to learn values, or --no-regression to learn classes.",
    ),
    "a class that only validation has": (
        "csv",
        (two("x", "y"), two("x", "z")),
        {},
        "validation.csv: row 1 has the class 'z', which no training row has; those have x, y.",
    ),
    "the same, where Parquet names the class": (
        "parquet",
        (parquet("abc", (0, 1)), parquet("abc", (0, 2))),
        {},
        "validation.parquet: row 1 has the class 'c', which no training row has",
    ),
    "one class": ("csv", two("x", "x"), {}, "train.csv: every label is 'x', so there is nothing to learn."),
    "one value": ("csv", two("1.5", "1.5"), {}, "train.csv: every label is '1.5', so there is nothing to learn."),
    "validation with one value": (
        "csv",
        (two("0.5", "1"), two("1", "1")),
        {},
        "validation.csv: every row has the same label, so there is no correlation",
    ),
    "an empty text": (
        "csv",
        csv("text,label", "a,x", ",y"),
        {},
        "row 1 of train.csv has no text in 'text': ''. Fill it in or remove the row.",
    ),
    "a text that is null": (
        "jsonl",
        lines({"text": "a", "label": 0}, {"text": None, "label": 1}),
        {},
        "row 1 of train.jsonl has no text in 'text': None. Fill it in or remove the row.",
    ),
    "a column for text and for labels": (
        "csv",
        two("x", "y"),
        {"text_columns": ["label"]},
        "the text columns are label and the label columns label: name one or two of texts, and no column twice",
    ),
}


def tagged(*tags):
    return lines({"tokens": ["Rick", "lives", "here"][: len(tags)], "ner_tags": list(tags)})


TAGS = {
    "IOB2": ("jsonl", tagged("B-PER", "I-PER", "O"), {}, "B-PER I-PER O"),
    "IOB1": ("jsonl", tagged("I-PER", "O", "I-LOC"), {}, "B-PER O B-LOC"),
    "IOBES, also called BILOU": ("jsonl", tagged("B-PER", "E-PER", "S-LOC"), {}, "B-PER I-PER B-LOC"),
    "CoNLL, with -DOCSTART- and more columns": (
        "conll",
        b"-DOCSTART- -X- O\n\nRick NNP B-PER\nlives VBZ O\n",
        {},
        "B-PER O",
    ),
    "numbers": (
        "jsonl",
        tagged(1, 0),
        {},
        "train.jsonl: row 0 has the tag 1, a number without a name. Say what they are: --tag-names O ...",
    ),
    "numbers, named": ("jsonl", tagged(1, 0), {"names": ["O", "B-PER"]}, "B-PER O"),
    "tags in another scheme": (
        "jsonl",
        tagged("PER", "O"),
        {},
        "train.jsonl: row 0 has the tag 'PER'; a tag is O, or B-, I-, E- or S- with the type of an entity",
    ),
    "fewer tags than words": (
        "jsonl",
        lines({"tokens": ["a", "b"], "ner_tags": ["O"]}),
        {},
        "train.jsonl: row 0 has 2 tokens and 1 ner_tags",
    ),
    "texts in the place of lists": (
        "jsonl",
        lines({"tokens": "a b", "ner_tags": "O O"}),
        {},
        "train.jsonl: row 0 has to have a list of tokens and one of ner_tags, not 'a b' and 'O O'",
    ),
    "a word without a tag": (
        "conll",
        b"Rick B-PER\nlives\n",
        {},
        "line 2 of train.conll has no tag: 'lives'. Each line is a word and its tag.",
    ),
    "a type that only validation has": (
        "conll",
        (b"a B-x\nb O\n", b"a O\n\nb I-y\n"),
        {},
        "validation.conll: row 1 has an entity of type y, which no training row has",
    ),
    "one tag": ("conll", b"a O\nb O\n", {}, "train.conll: every tag is O, so there is nothing to learn"),
    "a word and its tag per line of a CSV file": (
        "csv",
        csv("word,tag", "a,O"),
        {},
        "train.csv has the columns word, tag; wanted are tokens, ner_tags or tokens, tags or tokens, labels or words, "
        "ner_tags or words, tags or words, labels. A file with a word and its tag per line has to end in .conll.",
    ),
}


def asked(text="New York", start=14, **changed):
    answers = {"text": [text], "answer_start": [start]}
    return lines({"context": "Rick lives in New York.", "question": "Where?", "answers": answers, **changed})


SQUAD = [{"text": "York", "answer_start": 4}]
QUESTIONS = {
    "a row per question": ("jsonl", asked(), {}, "New York"),
    "SQuAD's own file": (
        "json",
        lines({"data": [{"paragraphs": [{"context": "New York", "qas": [{"question": "Where?", "answers": SQUAD}]}]}]}),
        {},
        "York",
    ),
    "a question without an answer": (
        "jsonl",
        asked(answers={"text": [], "answer_start": []}),
        {},
        "train.jsonl, row 0: no answer; this example is for SQuAD 1.1, where each question has one",
    ),
    "an answer that stands elsewhere": (
        "jsonl",
        asked(start=13),
        {},
        "train.jsonl, row 0: the context has ' New Yor', not 'New York'; it stands at 14",
    ),
    "an answer that the context does not have": (
        "jsonl",
        asked("Ohio"),
        {},
        "train.jsonl, row 0: the context has 'New ', not 'Ohio'; the context does not have it",
    ),
    "a start that is no number": (
        "jsonl",
        asked(start="14"),
        {},
        "train.jsonl, row 0: answer_start has to be the first character of each text, and is ['14']",
    ),
    "an empty answer": (
        "jsonl",
        asked(""),
        {},
        "train.jsonl, row 0: the text of answers has to be a list of texts that are not empty, and is ['']",
    ),
    "an empty context": (
        "jsonl",
        asked(context=" "),
        {},
        "row 0 of train.jsonl has no text in 'context': ' '. Fill it in or remove the row.",
    ),
}


def turn(role, content):
    return {"role": role, "content": content}


def chat(*turns):
    return lines({"messages": list(turns)})


CHATS = {
    "text": ("jsonl", lines({"text": "a"}), {}, "text"),
    "prompt and completion": ("jsonl", lines({"prompt": "a", "completion": "b"}), {}, "prompt, completion"),
    "a chat": ("jsonl", chat(turn("user", "a"), turn("assistant", "b")), {}, "messages"),
    "prompt and completion as chats": (
        "jsonl",
        lines({"prompt": [turn("user", "a")], "completion": [turn("assistant", "b")]}),
        {},
        "prompt, completion",
    ),
    "an empty text": (
        "jsonl",
        lines({"prompt": "a", "completion": " "}),
        {},
        "train.jsonl: completion of row 0 is empty or no text: ' '. Fill it in or remove the row.",
    ),
    "a prompt as chat and a completion as text": (
        "jsonl",
        lines({"prompt": [turn("user", "a")], "completion": "b"}),
        {},
        'train.jsonl: completion of row 0 has to be a list of turns {"role": ..., "content": ...}, and is \'b\'',
    ),
    "ShareGPT's `from` and `value`": (
        "jsonl",
        lines({"messages": [{"from": "human", "value": "a"}]}),
        {},
        'train.jsonl: messages of row 0 has to hold turns {"role": ..., "content": ...}, and one is',
    ),
    "another role": (
        "jsonl",
        chat(turn("human", "a"), turn("assistant", "b")),
        {},
        "train.jsonl: messages of row 0 has the role 'human'; a role is one of system, developer, user, assistant, "
        "tool",
    ),
    "an empty turn": (
        "jsonl",
        chat(turn("user", "a"), turn("assistant", "")),
        {},
        "train.jsonl: messages of row 0 has a turn without text:",
    ),
    "a chat without an answer": (
        "jsonl",
        chat(turn("user", "a"), turn("assistant", "b"), turn("user", "c")),
        {},
        "train.jsonl: messages of row 0 has no last turn of the assistant, so there is nothing to learn from it",
    ),
    "other columns": (
        "jsonl",
        lines({"instruction": "a", "output": "b"}),
        {},
        "train.jsonl has the columns instruction, output; wanted are messages or prompt, completion or text.",
    ),
}

PAIRS = {
    "two sentences and a score, on any scale": (
        "csv",
        csv("sentence1,sentence2,score", "a,b,1", "c,d,5"),
        {},
        "sentence1, sentence2, score",
    ),
    "pairs": ("csv", csv("anchor,positive", "a,b", "c,d"), {}, "anchor, positive"),
    "triplets": ("csv", csv("anchor,positive,negative", "a,b,c"), {}, "anchor, positive, negative"),
    "names of classes for scores": (
        "csv",
        csv("sentence1,sentence2,label", "a,b,alike", "c,d,other"),
        {},
        "train.csv: the label of row 0 is 'alike', which is not a number. Remove the row.",
    ),
    "a score that is missing": (
        "csv",
        csv("sentence1,sentence2,score", "a,b,"),
        {},
        "train.csv: the label of row 0 is '': it is missing. Fill it in or remove the row.",
    ),
    "one score": (
        "csv",
        csv("sentence1,sentence2,score", "a,b,1", "c,d,1"),
        {},
        "train.csv: every label is '1', so there is nothing to learn.",
    ),
    "an empty sentence": (
        "csv",
        csv("anchor,positive", "a,"),
        {},
        "row 0 of train.csv has no text in 'positive': ''. Fill it in or remove the row.",
    ),
    "one pair": (
        "csv",
        csv("anchor,positive", "a,b"),
        {},
        "train.csv has one row, and the wrong answers to an anchor are the other rows' texts.",
    ),
    "a negative that is the positive": (
        "csv",
        csv("anchor,positive,negative", "a,b,b"),
        {},
        "train.csv: in row 0 positive and negative are the same text, 'b'",
    ),
}


def texts(folder, **options):
    data = read_data(data_dir=folder, **options)
    return data.labels.describe(data.train["label"][:])


READERS = {
    "Texts and labels": (TEXTS, texts),
    "Words and tags": (TAGS, lambda folder, **o: " ".join(read_tagged(folder, **o)["train"]["ner_tags"][0])),
    "Questions and answers": (QUESTIONS, lambda folder: read_questions(folder)["train"]["answers"][0]["text"][0]),
    "Chats, prompts and completions, text": (
        CHATS,
        lambda folder: ", ".join(read_rows(folder, None, 0)["train"].column_names),
    ),
    "Sentences": (PAIRS, lambda folder: ", ".join(read_pairs(folder, False, 0)["train"].column_names)),
}
CASES = [(section, what) for section, (table, _) in READERS.items() for what in table]


def table_of(section):
    """A section of the page."""
    cells = [(what, sees.replace("|", r"\|")) for what, (*_, sees) in READERS[section][0].items()]
    return "\n".join(["| you have | you see |", "|---|---|", *(f"| {what} | `{sees}` |" for what, sees in cells)])


@pytest.mark.parametrize(("section", "what"), CASES)
def test_what_each_file_gets(section, what, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table, read = READERS[section]
    ending, content, options, sees = table[what]
    for part, one in zip(PARTS, content if isinstance(content, tuple) else (content, content), strict=True):
        file = tmp_path / f"{part}.{ending}"
        if isinstance(one, datasets.Dataset):
            one.to_parquet(file)
        else:
            file.write_bytes(one)
    try:
        seen = read(tmp_path, **options)
    except DataError as error:
        seen = str(error).replace(f"{tmp_path}/", "")
    assert seen.startswith(sees)


@pytest.mark.parametrize("section", READERS)
def test_the_page_has_the_table(section):
    assert f"## {section}\n" in PAGE.read_text(encoding="utf-8")
    assert table_of(section) in PAGE.read_text(encoding="utf-8")
