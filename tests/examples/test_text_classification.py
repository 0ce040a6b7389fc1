"""The one loop: every method, the table, what is saved, and a killed run that goes on as if nothing had happened."""

import json

import datasets
import pytest
import torch
import training
from demo_data import write_data
from methods import METHODS, count_head, find_head
from peft import PeftModel
from safetensors.torch import load_file
from task_data import read_data
from text_classification import main, text_task
from training import Run, format_table, load_base, make_trainer, reload, train_method
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    MPNetConfig,
    RobertaConfig,
    Trainer,
)

pytestmark = [
    # PEFT reads transformers' gradient checkpointing property under its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT's own LN tuning warns of every norm that is not nn.LayerNorm's supertype in its table
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return write_data(tmp_path / "data", "sentiment", 64, 16)


def run_of(tiny_bert, method="ln", **fields):
    return Run(method, tiny_bert, "demo", **{"steps": 3, "batch_size": 4, **fields})


def task_of(tiny_bert, data_dir):
    return text_task(read_data(data_dir=data_dir), tiny_bert)


@pytest.mark.end_to_end
def test_every_method_from_the_command_line(tiny_bert, data_dir, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--max-steps", "2", "--batch-size", "4", "--model", tiny_bert, "--out", str(out)]
    main(["--data-dir", str(data_dir), "--task", "sst2", "--method", *METHODS, *flags])
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["method", "trainable", "of", "it", "head", "saved", "bytes", "accuracy", "seconds"]
    assert [line.split()[0] for line in table[1 : 1 + len(METHODS)]] == list(METHODS)
    for method in METHODS:
        result = json.loads((out / method / "result.json").read_text())
        assert result["saved_bytes"] >= 4 * result["trainable"]


def test_what_each_method_trains(tiny_bert, data_dir):
    task, trained = task_of(tiny_bert, data_dir), {}
    for name, method in METHODS.items():
        base = load_base(task, tiny_bert)
        norms = sum(p.numel() for n, p in base.named_parameters() if "LayerNorm" in n)
        biases = sum(p.numel() for n, p in base.named_parameters() if n.endswith("bias"))
        head_biases = sum(
            p.numel() for n, p in base.named_parameters() if n in ("bert.pooler.dense.bias", "classifier.bias")
        )
        head, everything = count_head(base), base.num_parameters()
        trained[name] = sum(p.numel() for p in method.prepare(base, "SEQ_CLS").parameters() if p.requires_grad) - head
    rank_8_on_two_matrices_a_layer = 2 * 2 * 8 * (16 + 16)
    prefix = 2 * 2 * 20 * 16  # layers, keys and values, virtual tokens, width
    adapter = 2 * ((16 + 1) + 16 * (1 + 1))  # one entry wide in each layer, with biases
    assert trained == {
        "head": 0,
        "ln": norms,
        "stock-ln": norms,
        "bitfit": biases - head_biases,
        "lora": rank_8_on_two_matrices_a_layer,
        "prefix": prefix,
        "mha-adapter": adapter,
        "prefix+mha-adapter+ln": prefix + adapter + norms,
        "full": everything - head,
    }


@pytest.mark.parametrize(
    ("config", "head"),
    [
        (BertConfig(**SIZES), ["bert.pooler.dense", "classifier"]),
        (RobertaConfig(**SIZES), ["classifier"]),
        (
            DistilBertConfig(vocab_size=9, dim=16, n_layers=1, n_heads=2, hidden_dim=16),
            ["pre_classifier", "classifier"],
        ),
        (LlamaConfig(**SIZES), ["score"]),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_head_of_a_family(config, head):
    model = AutoModelForSequenceClassification.from_config(config)
    assert find_head(model) == head
    METHODS["ln"].prepare(model, "SEQ_CLS")


def test_lora_on_a_model_that_peft_has_no_list_of():
    config = MPNetConfig(**SIZES, max_position_embeddings=16)
    model = METHODS["lora"].prepare(AutoModelForSequenceClassification.from_config(config), "SEQ_CLS")
    tuned = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}
    assert tuned == {"q", "v"}


def test_the_head_has_its_own_rate(tiny_bert, data_dir):
    task = task_of(tiny_bert, data_dir)
    model = METHODS["ln"].prepare(load_base(task, tiny_bert), "SEQ_CLS")
    optimizer = make_trainer(run_of(tiny_bert, lr=0.5, head_lr=0.25), model, task).create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in found.items() if "modules_to_save" in name} == {0.25}
    assert {rate for name, rate in found.items() if "modules_to_save" not in name} == {0.5}


@pytest.mark.end_to_end
def test_equal_seeds_give_equal_adapters(tiny_bert, data_dir, tmp_path):
    task = task_of(tiny_bert, data_dir)
    first, again, other = (
        train_method(run_of(tiny_bert, seed=seed), task, tmp_path / name, checkpoints=False)
        and tensors(tmp_path / name)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def tensors(folder):
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def test_saved_adapter_reloads(tiny_bert, data_dir, tmp_path):
    task = task_of(tiny_bert, data_dir)
    result = train_method(run_of(tiny_bert), task, tmp_path / "ln", checkpoints=False)
    base = load_base(task, tiny_bert, seed=7)
    model = PeftModel.from_pretrained(base, tmp_path / "ln").eval()
    batch = task.tokenizer(task.validation["sentence"][:], padding=True, return_tensors="pt")
    with torch.no_grad():
        predictions = model(**batch).logits.argmax(-1)
    accuracy = (predictions == torch.tensor(task.validation["label"][:])).float().mean().item()
    assert result.metrics == {"accuracy": pytest.approx(accuracy)}


@pytest.mark.parametrize(
    "method", ["ln", *(pytest.param(name, marks=pytest.mark.end_to_end) for name in METHODS if name != "ln")]
)
def test_every_method_reloads(tiny_bert, data_dir, tmp_path, method, capsys):
    run, task = run_of(tiny_bert, method), task_of(tiny_bert, data_dir)
    train_method(run, task, tmp_path, checkpoints=False)
    reload(run, task, tmp_path)
    assert f"reloaded {tmp_path}: all 16 validation logits are bit-equal" in capsys.readouterr().out


@pytest.mark.end_to_end
@pytest.mark.parametrize("method", ["ln", "head"])
def test_killed_run_goes_on_where_it_was(tiny_bert, data_dir, tmp_path, monkeypatch, method):
    task, run = task_of(tiny_bert, data_dir), run_of(tiny_bert, method, steps=6)
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    train_method(run, task, tmp_path / "whole")
    calls, training_step = [], Trainer.training_step

    def stop_at_fifth(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stop_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        train_method(run, task, tmp_path / "killed")
    (tmp_path / "killed" / "checkpoints" / "checkpoint-5").mkdir()  # as if killed while this was written
    with pytest.warns(UserWarning, match="checkpoint-5 is passed over"):
        train_method(run, task, tmp_path / "killed", resume=True)
    assert not (tmp_path / "killed" / "checkpoints").exists()
    assert calls == [0, 1, 2, 3, 4, 4, 5]
    whole, killed = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert all(torch.equal(whole[k], killed[k]) for k in whole)


def test_new_run_forgets_an_earlier_ones_checkpoints(tiny_bert, data_dir, tmp_path, monkeypatch):
    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    stale = tmp_path / "ln" / "checkpoints" / "checkpoint-2"
    stale.mkdir(parents=True)
    task = task_of(tiny_bert, data_dir)
    monkeypatch.setattr(Trainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train_method(run_of(tiny_bert), task, tmp_path / "ln")
    assert not stale.exists()


def test_finished_run_is_not_run_again(tiny_bert, data_dir, tmp_path, monkeypatch):
    task = task_of(tiny_bert, data_dir)
    result = train_method(run_of(tiny_bert), task, tmp_path / "ln")
    monkeypatch.setattr(Trainer, "train", None)
    assert train_method(run_of(tiny_bert), task, tmp_path / "ln", resume=True) == result


def test_other_settings_cannot_resume(tiny_bert, data_dir, tmp_path):
    flags = ["--data-dir", str(data_dir), "--model", tiny_bert, "--max-steps", "1", "--out", str(tmp_path / "out")]
    main(flags)
    with pytest.raises(SystemExit, match=r"cannot resume .*: seed 0, now 5\. Use another --out"):
        main([*flags, "--seed", "5", "--resume"])


def test_regression(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"sentence1": ["a", "The soup", "x y"] * 4, "sentence2": ["b", "was", "z"] * 4, "label": [0.0, 2.5, 5.0] * 4}
    for part in ("train", "validation"):
        datasets.Dataset.from_dict(rows).to_json(f"{tmp_path}/{part}.jsonl")
    task = text_task(read_data("stsb", tmp_path), tiny_bert)
    result = train_method(run_of(tiny_bert), task, tmp_path / "out", checkpoints=False)
    assert set(result.metrics) == {"pearson", "spearmanr"}
    assert "spearmanr" in format_table([result])


def test_errors_end_the_script_with_their_text(data_dir, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"error: no such file, looked for: .*train\.jsonl"):
        main(["--data-dir", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="error: unknown task 'sst3'; known are cola"):
        main(["--task", "sst3"])
    with pytest.raises(SystemExit, match="error: no model 'no-such-model': "):
        main(["--data-dir", str(data_dir), "--model", "no-such-model"])
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "give --task or --data-dir" in capsys.readouterr().err
