"""`plan` says what a config would do, and does nothing."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_lntune import LNTuningConfig, ModuleTuningConfig, plan
from peft_lntune.errors import NoMatchError, UnsupportedError
from tests.adapted import adapt, assert_unchanged, build, deltas, snapshot

BERT = "bert.encoder.layer"
NORMS = [
    "bert.embeddings.LayerNorm",
    *(f"{BERT}.{i}.{part}output.LayerNorm" for i in (0, 1) for part in ("attention.", "")),
    "cls.predictions.transform.LayerNorm",
]

# Options of a config, and the modules of a BERT with two layers that they select.
SELECTIONS = {
    "all": ({}, NORMS),
    "weight": ({"tune": "weight"}, NORMS),
    "one role": ({"roles": ["ffn"]}, [f"{BERT}.0.output.LayerNorm", f"{BERT}.1.output.LayerNorm"]),
    "a role as a string": ({"roles": "embedding"}, NORMS[:1]),
    "two roles": ({"roles": ["embedding", "final"]}, [NORMS[0], NORMS[-1]]),
    "one layer": ({"layers_to_transform": 1}, NORMS[3:5]),
    "layers": ({"layers_to_transform": [0, 1]}, NORMS[1:5]),
    "layers by pattern": ({"layers_to_transform": [0], "layers_pattern": "layer"}, NORMS[1:3]),
    "role and layer": ({"roles": ["attention"], "layers_to_transform": [0]}, NORMS[1:2]),
    "exclude an ending": ({"exclude_modules": ["output.LayerNorm"]}, [NORMS[0], NORMS[-1]]),
    "exclude an expression": ({"exclude_modules": r".*\.encoder\..*"}, [NORMS[0], NORMS[-1]]),
    "outside a saved head": ({"modules_to_save": ["cls"]}, NORMS[:-1]),
    "targets": ({"target_modules": ["LayerNorm"]}, NORMS),
    "targets by expression": ({"target_modules": r".*\.0\..*LayerNorm"}, NORMS[1:3]),
    "targets in one layer": ({"target_modules": ["LayerNorm"], "layers_to_transform": [1]}, NORMS[3:5]),
    "targets, some excluded": (
        {"target_modules": ["LayerNorm"], "exclude_modules": ["embeddings.LayerNorm"]},
        NORMS[1:],
    ),
    "linear": ({"target_modules": ["query"]}, [f"{BERT}.{i}.attention.self.query" for i in (0, 1)]),
    "embedding": ({"target_modules": ["word_embeddings"]}, ["bert.embeddings.word_embeddings"]),
    "norms and others": (
        {"target_modules": ["embeddings.LayerNorm", "pooler", "1.output.dense"]},
        [NORMS[0], f"{BERT}.1.output.dense"],
    ),
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_the_plan_is_what_is_done(case):
    options, expected = SELECTIONS[case]
    model, config = build("bert"), LNTuningConfig(**options)
    before, names, fields = snapshot(model), [name for name, _ in model.named_modules()], config.to_dict()
    planned = plan(model, config)
    assert sorted(planned.parts) == sorted(expected)
    assert config.to_dict() == fields
    assert [name for name, _ in model.named_modules()] == names
    assert_unchanged(model, before)
    found = deltas(get_peft_model(model, config))
    assert {name: delta.weight.numel() for name, delta in found.items()} == {
        f"{name}.{parameter}": tuned
        for name, part in planned.parts.items()
        for parameter, (tuned, _) in part.entries.items()
    }
    assert planned.entries == sum(delta.weight.numel() for delta in found.values())
    assert planned.bytes == sum(delta.weight.nbytes for delta in found.values())


@pytest.mark.parametrize(
    ("options", "bytes_each"), [({}, 4), ({"delta_dtype": "bfloat16"}, 2), ({"delta_dtype": "float64"}, 8)]
)
def test_bytes_follow_the_dtype_of_deltas(options, bytes_each):
    planned = plan(build("llama", torch.bfloat16), LNTuningConfig(**options))
    assert planned.bytes == bytes_each * planned.entries == bytes_each * 5 * 16


def test_what_is_printed():
    printed = str(plan(build("bert"), LNTuningConfig(tune="bias", roles=["embedding", "final"])))
    assert printed.splitlines() == [
        "module                               class      role       tuned entries  bytes",
        "bert.embeddings.LayerNorm            LayerNorm  embedding  bias 16        64",
        "cls.predictions.transform.LayerNorm  LayerNorm  final      bias 16        64",
        "2 modules                                                  32             128",
        "",
        "not tuned:",
        "  bert.encoder.layer.0.attention.output.LayerNorm: role attention",
        "  bert.encoder.layer.0.output.LayerNorm: role ffn",
        "  bert.encoder.layer.1.attention.output.LayerNorm: role attention",
        "  bert.encoder.layer.1.output.LayerNorm: role ffn",
    ]


def test_masked_entries_are_printed_with_their_number():
    counts = {"bert.embeddings.LayerNorm.lntune_weight": 3}
    planned = plan(build("bert"), LNTuningConfig(), counts)
    assert planned.entries == 3
    assert "weight 3 of 16" in str(planned)
    assert list(planned.parts) == ["bert.embeddings.LayerNorm"]


@pytest.mark.parametrize(
    "config", [LNTuningConfig(), ModuleTuningConfig(components=["query", "norm"])], ids=lambda c: c.kind
)
def test_selected_are_all_entries_whatever_a_mask_leaves(config):
    whole = plan(build("bert"), config)
    masked = plan(build("bert"), config, {"bert.embeddings.LayerNorm.lntune_weight": 3})
    assert masked.entries == 3
    assert masked.selected == whole.selected == whole.entries


def test_norms_without_parameters_are_listed_not_tuned():
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False))
    planned = plan(model, LNTuningConfig())
    assert list(planned.parts) == ["0"]
    assert planned.left_out == {"1": "it has no parameters"}


@pytest.mark.parametrize("device", ["meta", "adapted"])
def test_models_of_every_kind(device):
    expected = str(plan(build("bert"), LNTuningConfig()))
    model = build("bert").to("meta") if device == "meta" else adapt(build("bert")).base_model.model
    assert str(plan(model, LNTuningConfig())) == expected


NOTHING = {
    "a role that is missing": (
        {"roles": ["cross_attention"]},
        r"selects none of the 6 norms of this model:\n  bert\.embeddings\.LayerNorm: role embedding\n(.*\n){5}Widen",
    ),
    "everything excluded": ({"exclude_modules": ["LayerNorm"]}, r"LayerNorm: excluded"),
    "a layer that is missing": ({"layers_to_transform": [7]}, r"LayerNorm: not in layers_to_transform"),
    "a target that is missing": (
        {"target_modules": ["nowhere"]},
        r"Target modules .*nowhere.* not found in the base model.*Norms of this model: bert\.embeddings\.LayerNorm, ",
    ),
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_config_that_selects_nothing_lists_the_norms(case):
    options, message = NOTHING[case]
    model = build("bert")
    before = snapshot(model)
    for call in (plan, get_peft_model):
        with pytest.raises(NoMatchError, match=message):
            call(model, LNTuningConfig(**options))
    assert_unchanged(model, before)


def test_a_model_without_norms_is_told_so():
    with pytest.raises(NoMatchError, match="no norm was found among the 3 modules"):
        plan(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), LNTuningConfig())


def test_a_bias_that_no_target_has():
    with pytest.raises(NoMatchError, match="without the parameters that tune='bias' asks for"):
        plan(nn.Sequential(nn.Linear(2, 2, bias=False)), LNTuningConfig(target_modules=["0"], tune="bias"))


def test_a_target_without_a_weight():
    model = build("bert")
    with pytest.raises(UnsupportedError, match=r"encoder\.layer\.0\.attention \(BertAttention\) .* it has none"):
        plan(model, LNTuningConfig(target_modules=["0.attention"]))
