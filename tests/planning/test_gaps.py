"""What a config asks for and does not find is in the plan, and said once when the adapter is put in."""

import warnings

import pytest
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedConfig

from peft_lntune import BottleneckConfig, LNTuningConfig, PrefixConfig, UnifiedConfig
from peft_lntune.architectures.attention import find_attention
from peft_lntune.errors import UnsupportedError
from peft_lntune.planning.gaps import find_gaps
from peft_lntune.planning.plan import plan
from tests.cases import build

NO_LEAF = "no leaf is known that answers for the whole sub-layer"


def odd() -> nn.Module:
    """Llama with two norms that serve no sub-layer."""
    model = build("llama")
    model.model.odd, model.model.other = nn.LayerNorm(4), nn.LayerNorm(4)
    return model


def ours(told) -> list[str]:
    return [text for one in told if "`plan(model, config)` lists all" in (text := str(one.message))]


class TestRoles:
    def test_norms_without_a_role_are_named(self):
        with pytest.warns(UserWarning, match=r"roles=\['ffn'\]\) leaves out 2 norms .*: model.odd, model.other. `plan"):
            get_peft_model(odd(), LNTuningConfig(roles=["ffn"]))

    @pytest.mark.parametrize("fields", [{}, {"roles": ["ffn"], "exclude_modules": ["odd", "other"]}])
    def test_nothing_is_said_where_nothing_is_left_out(self, fields):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            get_peft_model(odd(), LNTuningConfig(**fields))

    def test_a_part_of_a_unified_config(self):
        config = UnifiedConfig(parts=[LNTuningConfig(roles=["ffn"]), BottleneckConfig(roles=["attention"])])
        with pytest.warns(UserWarning, match="leaves out 2 norms") as told:
            get_peft_model(odd(), config)
        assert len(ours(told)) == 1

    def test_a_loaded_adapter_says_it_no_more(self, tmp_path):
        with pytest.warns(UserWarning, match="leaves out 2 norms"):
            model = get_peft_model(odd(), LNTuningConfig(roles=["ffn"]))
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.load_adapter(tmp_path, "again")


class TestBottlenecks:
    def test_experts_have_no_place(self):
        planned = plan(build("mixtral"), BottleneckConfig())
        assert planned.left_out == {f"model.layers.{layer}.mlp": NO_LEAF for layer in range(2)}
        assert "model.layers.0.mlp: no leaf" in str(planned)

    def test_said_once_at_injection(self):
        said = r"finds a place at 2 sub-layers and none at 2: model.layers.0.mlp \(no leaf .*layers_to_transform"
        with pytest.warns(UserWarning, match=said) as told:
            get_peft_model(build("mixtral"), BottleneckConfig())
        assert len(ours(told)) == 1

    @pytest.mark.parametrize("fields", [{"roles": ["attention"]}, {"exclude_modules": ["mlp"]}])
    def test_not_said_of_what_was_not_asked_for(self, fields):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            get_peft_model(build("mixtral"), BottleneckConfig(**fields))

    def test_leaves_of_unknown_width(self):
        model = build("llama")
        model.model.layers[0].mlp.down_proj = nn.Identity()
        planned = plan(model, BottleneckConfig(roles=["ffn"]))
        assert list(planned.parts) == ["model.layers.1.mlp.down_proj"]
        assert planned.left_out == {"model.layers.0.mlp.down_proj": "the width of its leaves is not known"}
        model.model.layers[1].mlp.down_proj = nn.Identity()
        with pytest.raises(UnsupportedError, match="needs to know how wide the model is there"):
            plan(model, BottleneckConfig(roles=["ffn"]))

    @pytest.mark.parametrize("family", ["bert", "bart", "t5", "gpt2", "clip", "vit", "distilbert", "modernbert"])
    def test_no_gaps_where_every_sublayer_has_a_place(self, family):
        roles = ["attention", "cross_attention", "ffn"]
        assert not plan(build(family), BottleneckConfig(roles=roles)).left_out


class TestPrefixes:
    def test_attention_whose_keys_are_not_known(self):
        model = build("bert")
        host = model.get_submodule("bert.encoder.layer.0.attention.self")
        del host.key, host.attention_head_size, host.num_attention_heads
        host.config = PreTrainedConfig()
        planned = plan(model, PrefixConfig())
        assert list(planned.parts) == ["bert.encoder.layer.1.attention.self"]
        assert list(planned.left_out) == ["bert.encoder.layer.0.attention.self"]

    def test_a_config_that_answers_for_no_layer_as_a_whole(self):
        """transformers' configs with other heads in each layer raise where they are asked for all."""
        model = build("llama")
        plain = find_attention(model)

        class Layered:
            def __getattr__(self, name):
                raise RuntimeError(f"ask a layer for {name}")

        for name in plain:
            model.get_submodule(name).config = Layered()
        assert find_attention(model) == plain

    @pytest.mark.parametrize("family", ["bert", "llama", "t5", "whisper", "vit"])
    def test_no_gaps_where_every_attention_has_a_place(self, family):
        assert not plan(build(family), PrefixConfig()).left_out


HYBRID = {
    "layers": ["0", "0.mamba", "0.mlp", "0.mlp.fc", "1", "1.self_attn", "1.self_attn.o", "1.mlp", "1.mlp.experts"],
    "merger_list": ["0", "0.mlp"],
    "stem": ["0", "0.conv1", "0.conv2"],
}
NAMES = [f"{stack}.{name}" for stack, names in HYBRID.items() for name in names]


def test_gaps_of_a_hybrid_model():
    places = [("attention", "layers.1.self_attn.o"), ("ffn", "layers.0.mlp.fc")]
    found = find_gaps(NAMES, ["attention", "ffn"], places, "unknown")
    assert found == {"layers.0.mamba": "it mixes tokens without attention", "layers.1.mlp": "unknown"}
    assert find_gaps(NAMES, ["ffn"], places, "unknown") == {"layers.1.mlp": "unknown"}
    assert find_gaps(NAMES, ["attention"], places, "unknown").keys() == {"layers.0.mamba"}
    assert not find_gaps(NAMES, ["cross_attention"], places, "unknown")
