"""Models that accelerate offloads: adapters answer and train as over the same model in memory, or are refused.

Of an offloaded module the parameters are on meta, except during the module's own forward.
"""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model

import peft_lntune as lntune
from peft_lntune.errors import UnsupportedError
from peft_lntune.interop import from_stock, to_stock
from peft_lntune.layers.offloaded import device_of, is_offloaded, onloaded
from tests.cases import spread
from tests.stacks.models import fill, llama, tokens

CPU = torch.device("cpu")
CONFIGS = {
    "norms": lntune.LNTuningConfig,
    "norms and LoRA": lambda **options: lntune.UnifiedConfig(preset="lora+ln", **options),
    "modules": lambda **options: lntune.ModuleTuningConfig(target_modules=["q_proj", "norm"], **options),
    "supermasks": lambda **options: lntune.SupermaskConfig(target_modules=["q_proj"], **options),
    "bottlenecks": lntune.BottleneckConfig,
    "prefixes": lambda **options: lntune.PrefixConfig(num_virtual_tokens=3, **options),
}
MERGEABLE = ["norms", "norms and LoRA", "modules", "supermasks"]
BLOCKS = {"model.layers.0": "disk", "model.layers.1": "disk", "model.norm": "disk"}
REST = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


OFFLOADS = ["cpu", "disk", "device map"]


@pytest.fixture(params=OFFLOADS)
def offload(request, tmp_path):
    """A function that offloads a model in one of the ways of accelerate."""

    def to_cpu(model):
        cpu_offload(model, execution_device=CPU)
        return model

    def to_disk(model):
        disk_offload(model, str(tmp_path / "weights"), execution_device=CPU)
        return model

    def by_map(model):
        device_map = {**BLOCKS, **REST}
        return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path / "weights"))

    return {"cpu": to_cpu, "disk": to_disk, "device map": by_map}[request.param]


def answer(model, **options):
    with torch.no_grad():
        return model.eval()(input_ids=tokens(), **options).logits


def adapted(base, kind):
    return fill(get_peft_model(base, CONFIGS[kind](task_type="CAUSAL_LM")))


def gradients(peft_model):
    peft_model.train()
    torch.manual_seed(0)  # supermasks are drawn
    peft_model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("kind", "offload"), spread(CONFIGS, OFFLOADS), indirect=["offload"])
def test_answers_and_trains_as_in_memory(kind, offload):
    expected, found = adapted(llama(), kind), adapted(offload(llama()), kind)
    assert not any(p.is_meta for p in found.parameters() if p.requires_grad)
    assert torch.equal(answer(found), answer(expected))
    assert not torch.equal(answer(found), answer(llama()))
    with found.disable_adapter():
        assert torch.equal(answer(found), answer(llama()))
    trained = gradients(found)
    for name, gradient in gradients(expected).items():
        assert torch.equal(trained[name], gradient), name
    assert is_offloaded(found), "the hooks are gone"
    assert found.base_model.model.model.layers[0].mlp.up_proj.weight.is_meta, "the base model stays in memory"


@pytest.mark.parametrize(("kind", "offload"), spread(CONFIGS, OFFLOADS), indirect=["offload"])
def test_loads_merges_and_mixes(kind, offload, tmp_path):
    saved = adapted(llama(), kind)
    saved.save_pretrained(tmp_path / "adapter")
    expected, base = answer(saved), answer(llama())
    found = PeftModel.from_pretrained(offload(llama()), tmp_path / "adapter")
    assert torch.equal(answer(found), expected)
    mixed = answer(found, adapter_names=["default", "__base__", "default"])
    # Other orders of sums than a batch of one adapter, in float32.
    torch.testing.assert_close(mixed, torch.stack([expected[0], base[1], expected[2]]), rtol=1e-5, atol=1e-6)
    found.load_adapter(tmp_path / "adapter", "other")
    found.set_adapter("other")
    assert torch.equal(answer(found), expected)
    if kind in MERGEABLE:
        found.merge_adapter()
        torch.testing.assert_close(answer(found), expected, rtol=1e-5, atol=1e-6)
        found.unmerge_adapter()
        torch.testing.assert_close(answer(found), expected, rtol=1e-5, atol=1e-6)  # LoRA subtracts
        torch.testing.assert_close(answer(found.merge_and_unload()), expected, rtol=1e-5, atol=1e-6)


def test_unmerging_restores_every_bit(offload):
    found = adapted(offload(llama().bfloat16()), "norms")
    found.merge_adapter()
    assert not torch.equal(answer(found), answer(llama().bfloat16()))
    found.unmerge_adapter()
    assert torch.equal(answer(found.unload()), answer(llama().bfloat16()))


def test_merged_adapters_are_taken_out_by_a_forward_pass_that_disables_them(offload):
    found = adapted(offload(llama()), "norms")
    found.merge_adapter()
    with found.disable_adapter():
        assert torch.equal(answer(found), answer(llama()))


@pytest.mark.parametrize("kind", CONFIGS)
def test_offloading_with_the_adapter(kind, tmp_path):
    expected = adapted(llama(), kind)
    found = copy.deepcopy(expected)
    cpu_offload(found, execution_device=CPU)
    assert torch.equal(answer(found), answer(expected))
    found.save_pretrained(tmp_path)
    assert torch.equal(answer(PeftModel.from_pretrained(llama(), tmp_path)), answer(expected))
    with pytest.raises(UnsupportedError, match=r"own values at .* are offloaded, so training would not change them"):
        gradients(found)


def test_masks(offload, tmp_path):
    def masked(base):
        peft_model = get_peft_model(base, lntune.LNTuningConfig(task_type="CAUSAL_LM"))
        peft_model.set_masks({"model.norm.weight": torch.arange(16) < 4})
        return fill(peft_model)

    expected, found = masked(llama()), masked(offload(llama()))
    assert torch.equal(answer(found), answer(expected))
    found.save_pretrained(tmp_path / "adapter")
    assert torch.equal(answer(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), answer(expected))


def test_finding_and_planning_need_no_values(offload):
    config = lntune.LNTuningConfig()
    base = offload(llama())
    assert lntune.find_norms(base) == lntune.find_norms(llama())
    assert str(lntune.plan(base, config)) == str(lntune.plan(llama(), config))


def test_the_stock_format(offload, tmp_path):
    found = adapted(offload(llama()), "norms")
    to_stock(found, tmp_path / "stock")
    again = from_stock(offload(llama()), tmp_path / "stock")
    torch.testing.assert_close(answer(again), answer(found), rtol=1e-5, atol=1e-6)


def test_what_cannot_work_says_so(offload, tmp_path):
    adapted(llama(), "norms").save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="offloaded, and transformers' own load_adapter would leave"):
        offload(llama()).load_adapter(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="on the meta device, as accelerate leaves the parameters"):
        lntune.fisher_scores(offload(llama()), [{"input_ids": tokens(), "labels": tokens()}])
    bank = lntune.AdapterBank(offload(llama()).eval())
    bank.add("one", tmp_path / "adapter")
    bank.attach()
    with pytest.raises(UnsupportedError, match="norms of this model are on the meta device"), bank.route(["one"]):
        pass


def test_blocks_that_load_all_their_modules_at_once_are_refused():
    base = llama()
    cpu_offload(base, execution_device=CPU, preload_module_classes=["LlamaDecoderLayer"])
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0 is offloaded with all modules in it at once"):
        get_peft_model(base, lntune.LNTuningConfig())


def test_parameters_are_there_inside_only_and_what_is_written_stays():
    norm = torch.nn.LayerNorm(4)
    cpu_offload(norm, execution_device=CPU)
    assert device_of(norm) == CPU
    with onloaded(norm), onloaded(norm):
        assert torch.equal(norm.weight, torch.ones(4))
    assert norm.weight.is_meta
    with pytest.raises(KeyError, match="inside"), onloaded(norm):
        raise KeyError("inside")
    assert norm.weight.is_meta
    with onloaded(norm, keep=True):
        norm.bias.data = torch.full((4,), 7.0)
    assert norm(torch.ones(1, 4)).tolist() == [[7.0] * 4]
