"""Named entities: words to pieces and back, tags as text or numbers, and the example from end to end."""

import json

import datasets
import numpy as np
import pytest
from methods import METHODS
from task_data import MAX_TOKENS
from token_classification import IGNORED, Tagger, main, read_tagged
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peft_lntune.errors import DataError

pytestmark = [
    # PEFT reads transformers' gradient checkpointing property under its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT's own LN tuning warns of every norm that is not nn.LayerNorm's supertype in its table
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]

ROWS = [
    {"tokens": ["The", "soup", "was", "good"], "ner_tags": ["O", "B-food", "O", "O"]},
    {"tokens": ["steak", "salad", "the", "waiter"], "ner_tags": ["B-food", "I-food", "O", "B-person"]},
]
RATES = ["--lr", "5e-2", "--head-learning-rate", "5e-2"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "new", "york", "##er", "##s", "like", "tea"]


def write(folder, rows=ROWS, repeat=1):
    folder.mkdir(exist_ok=True)
    for part in ("train", "validation"):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * repeat))
    return folder


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tagger():
    """Cuts words into the pieces above."""
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    return Tagger(fast, ["B-group", "I-group", "O"])


@pytest.mark.full
def test_every_method_from_the_command_line(tiny_bert, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--max-steps", "2", "--batch-size", "4", "--model", tiny_bert, "--out", str(out)]
    main(["--data-dir", str(write(tmp_path / "data", repeat=4)), "--method", *METHODS, *flags])
    printed = capsys.readouterr().out.splitlines()
    metrics = ["overall_precision", "overall_recall", "overall_f1"]
    assert printed[0].split() == ["method", "trainable", "of", "it", "head", "saved", "bytes", *metrics, "seconds"]
    assert [line.split()[0] for line in printed[1 : 1 + len(METHODS)]] == list(METHODS)
    for method, line in zip(METHODS, printed[1 + len(METHODS) :], strict=True):
        assert line.startswith(f"reloaded {out / method}: all 8 validation logits are bit-equal")


def test_learns(tiny_bert, tmp_path, capsys):
    data, out = write(tmp_path / "data", repeat=4), tmp_path / "out"
    main(["--data-dir", str(data), "--model", tiny_bert, "--max-steps", "60", *RATES, "--out", str(out)])
    assert json.loads((out / "ln" / "result.json").read_text())["metrics"]["overall_f1"] == 1.0


def test_the_first_piece_of_a_word_has_its_tag(tagger):
    rows = [
        {"tokens": ["new", "yorkers", "like", "tea"], "ner_tags": ["B-group", "I-group", "O", "O"]},
        {"tokens": ["tea"], "ner_tags": ["O"]},
    ]
    batch = tagger(rows)
    pieces = [tagger.tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in batch["input_ids"]]
    assert pieces[0] == ["[CLS]", "new", "york", "##er", "##s", "like", "tea", "[SEP]"]
    assert pieces[1] == ["[CLS]", "tea", "[SEP]", *["[PAD]"] * 5]
    no = IGNORED
    assert batch["labels"].tolist() == [[no, 0, 1, no, no, 2, 2, no], [no, 2, no, no, no, no, no, no]]
    right = np.eye(3)[batch["labels"].clamp(min=0)]
    assert tagger.decode([row["tokens"] for row in rows], right) == [row["ner_tags"] for row in rows]


def test_words_without_a_token_are_no_entities(tagger):
    words = ["", *["tea"] * MAX_TOKENS]  # [CLS] and [SEP] take the place of the last two
    tags = tagger.decode([words], np.tile([1.0, 0, 0], (1, MAX_TOKENS, 1)))[0]
    assert tags == ["O", *["B-group"] * (MAX_TOKENS - 2), "O", "O"]
    assert (tagger([{"tokens": words, "ner_tags": ["O"] * len(words)}])["labels"] != IGNORED).sum() == MAX_TOKENS - 2


def test_numbers_need_names(tmp_path):
    rows = [{"tokens": ["Rick", "and", "Morty", "Ohio"], "ner_tags": [1, 2, 0, 2]}]
    names = ["O", "B-work", "I-work"]
    tags = ["B-work", "I-work", "O", "B-work"]
    assert read_tagged(write(tmp_path, rows), names=names)["train"]["ner_tags"][:] == [tags]
    with pytest.raises(DataError, match=r"train\.jsonl: row 0 has the tag 1, a number without a name.*--tag-names"):
        read_tagged(tmp_path)
    with pytest.raises(DataError, match=r"row 0 has the tag 2, and the names are of 0 to 1: O, B-work"):
        read_tagged(tmp_path, names=names[:2])


def test_numbers_with_names_from_the_hub(monkeypatch):
    names = datasets.Sequence(datasets.ClassLabel(names=["O", "B-food"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": names})
    rows = datasets.Dataset.from_dict({"tokens": [["the", "soup"]], "ner_tags": [[0, 1]]}, features=features)
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return {"train": rows, "validation": rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_tagged(None)["validation"][0] == {"tokens": ["the", "soup"], "ner_tags": ["O", "B-food"]}
    assert asked == [(("leondz/wnut_17",), {"revision": "refs/convert/parquet"})]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a"], "ner_tags": [1.0]}, r"row 0 has the tag 1\.0; a tag is O, or B-"),
        (
            {"tokens": "a b", "ner_tags": "O O"},
            r"row 0 has to have a list of tokens and one of ner_tags, not 'a b' and 'O O'",
        ),
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, r"train\.jsonl: row 0 has 2 tokens and 1 ner_tags"),
        ({"sentence": ["a"], "ner_tags": ["O"]}, "has the columns sentence, ner_tags; wanted are tokens, ner_tags"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_tagged(write(tmp_path, [row]))


def test_errors_end_the_script_with_their_text(tmp_path):
    with pytest.raises(SystemExit, match=r"error: no such file, looked for: .*train\.jsonl"):
        main(["--data-dir", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="error: no model 'no-such-model': "):
        main(["--data-dir", str(write(tmp_path)), "--model", "no-such-model"])
