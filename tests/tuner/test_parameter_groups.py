"""Groups of an optimizer: every trained parameter once, by what it is, with its rate and its weight decay."""

import peft
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_lntune import (
    FisherLNConfig,
    LNTuningConfig,
    ModuleTuningConfig,
    UnifiedConfig,
)
from peft_lntune.errors import ConfigError
from peft_lntune.tuner.parameter_groups import grouped_optimizer, parameter_groups
from tests import adapted, cases
from tests.contract import KINDS

CLASSIFIER = "bert-classifier"
EVERYTHING = "prefix+mha-adapter+lora+ln"

# PEFT reads transformers' gradient checkpointing property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def classifier(config=None):
    model = adapted.HEADED[CLASSIFIER]()
    if config is None:
        return model
    config.task_type = "SEQ_CLS"
    return get_peft_model(model, config)


def names(model, groups):
    """The names of the parameters in each group."""
    of = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: [of[id(p)] for p in group["params"]] for group in groups}


def check_once(model, groups):
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(group["params"] for group in groups)


def settings(groups, key="lr"):
    return {group["name"]: group[key] for group in groups}


OWN = {
    "ln": {"ln.weight", "ln.bias"},
    "fisher-ln": {"fisher-ln.weight", "fisher-ln.bias"},
    "modules": {"modules.weight", "modules.bias"},
    "supermask": {"supermask"},
    "bottleneck": {"mha-adapter", "ffn-adapter"},
    "parallel-bottleneck": {"mha-adapter", "ffn-adapter"},
    "prefix": {"prefix"},
    "lora+ln": {"lora", "ln.weight", "ln.bias"},
    EVERYTHING: {"prefix", "mha-adapter", "lora", "ln.weight", "ln.bias"},
}


@pytest.mark.filterwarnings("ignore:adapter 'default' has a FisherLNConfig")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_groups(kind):
    model = classifier(KINDS[kind].config())
    groups = parameter_groups(model, 1e-3, 5e-3)
    check_once(model, groups)
    assert set(settings(groups)) == OWN[kind] | {"head"}
    assert groups[-1]["name"] == "head"
    assert settings(groups) == dict.fromkeys(OWN[kind], 1e-3) | {"head": 5e-3}
    assert all("modules_to_save" in name for name in names(model, groups)["head"])


@pytest.mark.parametrize("family", cases.few(family for family in cases.FAMILIES if family != "olmo"))
def test_gains_and_biases_of_every_family_with_any(family):
    model = get_peft_model(cases.build(family), LNTuningConfig())
    groups = parameter_groups(model, 1e-3)
    check_once(model, groups)
    for group, own in names(model, groups).items():
        assert all(f"lntune_{group.removeprefix('ln.')}." in name for name in own)


def test_the_longer_name_wins_and_none_is_the_common_rate():
    model = classifier(UnifiedConfig(preset=EVERYTHING))
    found = settings(parameter_groups(model, 1e-3, parts={"ln": 2e-3, "ln.bias": 3e-3, "prefix": 1e-2}))
    assert found == {
        "ln.weight": 2e-3,
        "ln.bias": 3e-3,
        "prefix": 1e-2,
        "mha-adapter": 1e-3,
        "lora": 1e-3,
        "head": 1e-3,
    }


def test_full_fine_tuning():
    model = classifier()
    groups = parameter_groups(model, 5e-5, 1e-3, heads=["classifier"])
    check_once(model, groups)
    assert settings(groups) == {"body": 5e-5, "ln.weight": 5e-5, "ln.bias": 5e-5, "head": 1e-3}
    found = names(model, groups)
    assert found["head"] == ["classifier.weight", "classifier.bias"]
    assert all("LayerNorm.weight" in name for name in found["ln.weight"])
    assert not any("LayerNorm" in name for name in found["body"])


@pytest.mark.parametrize("wrap", [nn.DataParallel, pytest.param(torch.compile, marks=pytest.mark.end_to_end)])
def test_wrapped_and_compiled_models(wrap):
    wrapped = wrap(classifier(LNTuningConfig()))
    groups = parameter_groups(wrapped, 1e-3, 5e-3)
    check_once(wrapped, groups)
    assert settings(groups) == {"ln.weight": 1e-3, "ln.bias": 1e-3, "head": 5e-3}


def test_several_active_adapters_share_their_groups():
    model = get_peft_model(adapted.build("bert"), LNTuningConfig())
    model.add_adapter("both", UnifiedConfig(preset="prefix+ln"))
    model.base_model.set_adapter(["default", "both"])
    groups = parameter_groups(model, 1e-3, parts={"prefix": 1e-2})
    check_once(model, groups)
    found = names(model, groups)
    assert found.keys() == {"ln.weight", "ln.bias", "prefix"}
    for group in ("ln.weight", "ln.bias"):
        assert sum(".default" in name for name in found[group]) == sum(".both" in name for name in found[group]) > 0
    model.base_model.set_adapter("both")
    assert not any(".default" in name for name in names(model, parameter_groups(model, 1e-3))["ln.weight"])


def test_masked_deltas():
    model = classifier(FisherLNConfig(density=0.5))
    with pytest.warns(UserWarning, match="no mask was fitted"):
        parameter_groups(model, 1e-3)
    norms = [name for name in adapted.norm_names(model.get_base_model()) if "lntune" not in name]
    masks = {
        f"{name}.{p}": torch.arange(16) % 4 == 0 for name in norms if name.endswith("Norm") for p in ("weight", "bias")
    }
    model.base_model.set_masks(masks)
    groups = parameter_groups(model, 1e-3)
    check_once(model, groups)
    assert {p.shape for g in groups if g["name"] != "head" for p in g["params"]} == {torch.Size([4])}


def test_two_parts_with_deltas_are_told_apart():
    parts = [LNTuningConfig(roles=["ffn"]), ModuleTuningConfig(target_modules=["attention.output.LayerNorm", "query"])]
    model = classifier(UnifiedConfig(parts=parts))
    groups = parameter_groups(model, 1e-3)
    check_once(model, groups)
    found = names(model, groups)
    assert all(".attention." not in name for name in found["ln.weight"])
    assert {name.split(".lntune")[0].rpartition(".")[2] for name in found["modules.weight"]} == {"LayerNorm", "query"}


def of_stock_ln():
    return peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"])


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize(
    ("make", "own"),
    [
        (of_stock_ln, {"ln.weight", "ln.bias"}),
        (lambda: peft.LoraConfig(task_type="SEQ_CLS", use_dora=True), {"lora"}),
        (lambda: peft.LoraConfig(task_type="SEQ_CLS", bias="all"), {"lora", "body", "ln.bias"}),
        (lambda: peft.IA3Config(task_type="SEQ_CLS"), {"ia3"}),
        (lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2), {"prompt_tuning"}),
    ],
    ids=["ln", "dora", "biases", "ia3", "prompt"],
)
def test_other_methods_of_peft(make, own):
    model = get_peft_model(adapted.HEADED[CLASSIFIER](), make())
    groups = parameter_groups(model, 1e-3, 5e-3)
    check_once(model, groups)
    assert set(settings(groups)) == own | {"head"}


def test_decay_is_that_of_trainer():
    model = classifier(UnifiedConfig(preset=EVERYTHING))
    groups = parameter_groups(model, 1e-3, weight_decay=0.1)
    check_once(model, groups)
    trainers = Trainer(model, TrainingArguments("unused", weight_decay=0.1, report_to="none")).create_optimizer()
    ours = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert ours == {id(p): group["weight_decay"] for group in trainers.param_groups for p in group["params"]}
    assert set(ours.values()) == {0.0, 0.1}
    assert settings(groups, "weight_decay")["head (no decay)"] == 0.0


def test_decay_of_what_is_asked_for():
    model = classifier(UnifiedConfig(preset="lora+ln"))
    groups = parameter_groups(model, 1e-3, weight_decay={"ln.weight": 0.01, "head": 0.2})
    check_once(model, groups)
    assert settings(groups, "weight_decay") == {"ln.weight": 0.01, "ln.bias": 0.0, "lora": 0.0, "head": 0.2}


def test_lora_plus_is_that_of_peft():
    model = classifier(UnifiedConfig(preset="lora+ln"))
    groups = parameter_groups(model, 1e-3, 5e-3, parts={"lora": 2e-4}, loraplus_lr_ratio=16)
    check_once(model, groups)
    rates = {"ln.weight": 1e-3, "ln.bias": 1e-3, "lora.A": 2e-4, "lora.B": pytest.approx(16 * 2e-4), "head": 5e-3}
    assert settings(groups) == rates
    found = names(model, groups)
    assert all("lora_A" in name for name in found["lora.A"])
    assert all("lora_B" in name for name in found["lora.B"])

    plain = get_peft_model(
        adapted.HEADED[CLASSIFIER](),
        peft.LoraConfig(use_dora=True, target_modules=["word_embeddings", "query"]),
    )
    theirs = peft.optimizers.create_loraplus_optimizer(plain, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=16)
    expected = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    ours = {id(p): g["lr"] for g in parameter_groups(plain, 1e-3, loraplus_lr_ratio=16) for p in g["params"]}
    assert ours == expected


def test_a_tied_head_is_in_one_group_or_refused():
    model = cases.build("llama")
    model.lm_head.weight = model.get_input_embeddings().weight
    model.requires_grad_(True)
    groups = parameter_groups(model, 1e-4, heads=["lm_head"])
    check_once(model, groups)
    with pytest.raises(ConfigError, match=r"embed_tokens.weight \(group 'body'\) and lm_head.weight \(group 'head'\)"):
        parameter_groups(model, 1e-4, 1e-3, heads=["lm_head"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"parts": {"lora": 1.0}}, r"parts names 'lora'; this model trains ln, ln.weight, ln.bias, prefix\.$"),
        ({"parts": {"head": 1.0}}, r"parts names 'head'.*The rate of heads is head_lr"),
        ({"weight_decay": {"body": 1.0}}, "weight_decay names 'body'; this model trains .*, head"),
        ({"heads": ["qa_outputs"]}, "heads names 'qa_outputs', and no module"),
        ({"head_lr": -1.0}, "head_lr should be a number of at least 0, but got -1.0"),
        ({"parts": {"ln": "1e-3"}}, r"parts\['ln'\] should be a number"),
        ({"lr": float("nan")}, "lr should be a number"),
        ({"lr": True}, "lr should be a number"),
        ({"weight_decay": -0.1}, "weight_decay should be a number"),
        ({"loraplus_lr_ratio": 16}, "no LoRA is trained"),
    ],
)
def test_what_cannot_be_is_refused(options, match):
    model = classifier(UnifiedConfig(preset="prefix+ln"))
    with pytest.raises(ConfigError, match=match):
        parameter_groups(model, **{"lr": 1e-3, **options})


def test_no_head_and_nothing_to_train():
    with pytest.raises(ConfigError, match=r"no head of this model is trained: it has ln\.weight, ln\.bias"):
        parameter_groups(get_peft_model(adapted.HEADED[CLASSIFIER](), LNTuningConfig()), 1e-3, 5e-3)
    with pytest.raises(ConfigError, match="no parameter of this model requires a gradient"):
        parameter_groups(adapted.build("bert"), 1e-3)


# In Trainer.


def rows(count=4):
    ids = adapted.inputs(CLASSIFIER, batch=count)["input_ids"]
    return [{"input_ids": row, "labels": number % 3} for number, row in enumerate(ids)]


def trained(model, tmp_path, resume=None, **options):
    args = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        save_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    chosen = grouped_optimizer(args, head_lr=5e-2, parts={"prefix": 3e-2})
    trainer = Trainer(model, args, train_dataset=rows(), optimizer_cls_and_kwargs=chosen)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_makes_its_own_optimizer_over_the_groups(tmp_path):
    model = classifier(UnifiedConfig(preset="prefix+ln"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = trained(model, tmp_path, optim="adamw_torch", weight_decay=0.1, adam_beta1=0.8)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert type(optimizer) is torch.optim.AdamW
    first = {group["name"].removesuffix(" (no decay)"): group["initial_lr"] for group in optimizer.param_groups}
    assert first == {"ln.weight": 1e-2, "ln.bias": 1e-2, "prefix": 3e-2, "head": 5e-2}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.999)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.end_to_end
def test_a_resumed_run_ends_bit_equal(tmp_path):
    def fresh():
        torch.manual_seed(0)
        return classifier(UnifiedConfig(preset="prefix+ln"))

    straight = trained(fresh(), tmp_path / "a").model.state_dict()
    other = fresh()
    again = trained(other, tmp_path / "b", resume=str(tmp_path / "a/checkpoint-1")).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in straight.items())


@pytest.mark.parametrize("own", [(torch.optim.SGD, {"params": []}), (lambda: None, {})], ids=["galore", "factory"])
def test_an_optimizer_that_chooses_its_parameters_is_refused(own, monkeypatch, tmp_path):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(classifier(LNTuningConfig()), args, optimizer_cls_and_kwargs=grouped_optimizer(args))
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *given: own))
    with pytest.raises(ConfigError, match="chooses its parameters by itself"):
        trainer.create_optimizer()
    with pytest.raises(ConfigError, match="has no option 'lr'"):
        grouped_optimizer(args, lr=1.0)
