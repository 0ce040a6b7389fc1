"""A damaged adapter is refused with a clear error, and the model is as it was, whichever way it is loaded."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft import LNTuningConfig as StockConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from peft_lntune import LNTuningConfig, PeftLNTuneError
from peft_lntune.errors import AdapterFileError, ConfigError, HeadFileError
from peft_lntune.storage.manifest import manifest_of, seal_file
from tests import adapted
from tests.cases import spread

from .saved import HEADS, State, adapt, build_base, logits, switch_off

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DELTA = "base_model.model.bert.embeddings.LayerNorm.lntune_weight.weight"
HEAD = "base_model.model.classifier.weight"


# Ways to load. Each is a model to load into, and the call.


def wrapped() -> nn.Module:
    return adapt(build_base(), "first", seed=7)


def native() -> nn.Module:
    model = build_base()
    model.add_adapter(LNTuningConfig(modules_to_save=HEADS, exclude_modules=["bert.embeddings.LayerNorm"]), "first")
    adapted.fill(model, "first", seed=7)
    return model


# A config that is passed in, as someone does who has only the weights in mind.
PASSED = {"task_type": "SEQ_CLS"}

WAYS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Path], Any]]] = {
    "load_adapter": (wrapped, lambda model, path: model.load_adapter(path, "other")),
    "load_adapter-existing": (wrapped, lambda model, path: model.load_adapter(path, "first")),
    "load_adapter-trainable": (wrapped, lambda model, path: model.load_adapter(path, "other", is_trainable=True)),
    "load_adapter-meta": (wrapped, lambda model, path: model.load_adapter(path, "first", low_cpu_mem_usage=True)),
    "from_pretrained": (build_base, PeftModel.from_pretrained),
    "from_pretrained-meta": (
        build_base,
        lambda model, path: PeftModel.from_pretrained(model, path, low_cpu_mem_usage=True),
    ),
    "from_pretrained-config": (
        build_base,
        lambda model, path: PeftModel.from_pretrained(model, path, config=LNTuningConfig(**PASSED)),
    ),
    "mixed": (build_base, PeftMixedModel.from_pretrained),
    "native": (build_base, lambda model, path: model.load_adapter(str(path))),
    "native-second": (native, lambda model, path: model.load_adapter(str(path), "other")),
}


# Damages. Each changes the files in a folder.


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return damage


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / WEIGHTS)


def edit_tensors(change: Callable[[dict[str, Tensor]], None], manifest: bool = True) -> Callable[[Path], None]:
    """Change the weights; without a manifest the config does not give them away, and they have to be compared."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        if not manifest:
            edit_config(manifest=None)(folder)

    return damage


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | fields))

    return damage


def edit_manifest(**changes: Any) -> Callable[[Path], None]:
    """Change what a config records of the adapter, and sign that: only what it says gives it away."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / CONFIG).read_text())["manifest"]
        edit_config(manifest=manifest | changes)(folder)
        seal_file(folder / CONFIG, folder / WEIGHTS)

    return damage


def take_weights(model: Callable[[], PeftModel]) -> Callable[[Path], None]:
    """Put the weights of another adapter beside this config."""

    def damage(folder: Path) -> None:
        model().save_pretrained(folder / "another")
        shutil.move(folder / "another" / WEIGHTS, folder / WEIGHTS)

    return damage


def take_all(model: Callable[[], PeftModel]) -> Callable[[Path], None]:
    """Put another adapter into the folder, that says it is for the same base."""

    def damage(folder: Path) -> None:
        base = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
        model().save_pretrained(folder)
        edit_config(base_model_name_or_path=base)(folder)

    return damage


def other_size(masked: bool = False, **sizes: int) -> PeftModel:
    body = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**{**body, "vocab_size": 40, "num_labels": 3, **sizes})
    return adapt(BertForSequenceClassification(config), masked=masked)


def lora() -> PeftModel:
    return get_peft_model(build_base(), LoraConfig(task_type="SEQ_CLS"))


def stock() -> PeftModel:
    return get_peft_model(build_base(), StockConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]))


BROKEN = r"damaged or cut off.*Get a good copy"
FOREIGN = r"holds no tensor named `\.\.\.lntune_.*was not saved by peft_lntune"
UNFIT = "does not fit this model.*"
JSON = rf"{CONFIG}.*is damaged: .*Get a good copy"

DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (cut(WEIGHTS, 0.5), BROKEN),
    "truncated-header": (cut(WEIGHTS, 0.01), BROKEN),
    "empty": (write(WEIGHTS, b""), BROKEN),
    "magic": (write(WEIGHTS, b"PK\x03\x04 not safetensors at all" * 9), BROKEN),
    "pickled": (pickle_weights, BROKEN),
    "foreign-lora": (take_weights(lora), "is not the file that its adapter_config.json was saved with"),
    "foreign-stock": (take_weights(stock), FOREIGN),
    "hidden-size": (take_all(lambda: other_size(hidden_size=24)), UNFIT + "of another shape"),
    "more-layers": (take_all(lambda: other_size(num_hidden_layers=3)), UNFIT + "unexpected, such as.*layer.2"),
    "fewer-layers": (take_all(lambda: other_size(num_hidden_layers=1)), UNFIT + "missing, such as.*layer.1"),
    "key-missing": (edit_tensors(lambda t: t.pop(DELTA), manifest=False), UNFIT + "1 missing, such as"),
    "key-unexpected": (
        edit_tensors(lambda t: t.update({DELTA.replace("bert", "x"): t[DELTA].clone()}), manifest=False),
        UNFIT + "1 unexpected, such as",
    ),
    "shape": (edit_tensors(lambda t: t.update({DELTA: t[DELTA][:3]}), manifest=False), UNFIT + "of another shape"),
    "dtype": (
        edit_tensors(lambda t: t.update({DELTA: t[DELTA].long()})),
        "lntune_weight.weight should be of a floating dtype, but is torch.int64",
    ),
    "head-bit": (edit_tensors(lambda t: t[HEAD][0, :1].neg_()), "digests differ for heads"),
    "config-changed": (edit_config(layers_to_transform=[0]), r"was changed since it was saved: layers_to_transform is"),
    "config-array": (write(CONFIG, b"[]"), f"{CONFIG} is damaged: it should hold a JSON object, and holds a list"),
    "config-deep": (write(CONFIG, b"[" * 100_000), f"{CONFIG} is damaged: it is nested too deeply"),
    "type": (edit_config(peft_type="LORA"), "are those of peft_lntune, but its peft_type is 'LORA'"),
    "base": (edit_manifest(model_type="roberta"), "from a model of type 'roberta', and this one is of type 'bert'"),
    "torn": (take_weights(lambda: adapt(build_base(), seed=3)), "is not the file that .* digests differ"),
    "nan": (edit_tensors(lambda t: t[DELTA].fill_(torch.nan)), "hold NaN or infinite values, the first is .*lntune"),
    "inf": (edit_tensors(lambda t: t[DELTA].fill_(torch.inf)), "hold NaN or infinite values, the first is .*lntune"),
    "nan-head": (edit_tensors(lambda t: t[HEAD].fill_(torch.nan)), "hold NaN or infinite values.*classifier"),
    "head-missing": (
        edit_tensors(lambda t: t.pop(HEAD), manifest=False),
        r"(lacks .*|missing, such as )'?[\w.]*classifier",
    ),
    "too-new": (edit_config(format_version=99), "format_version 99, and peft_lntune .* reads 1.*pip install git"),
    "kind": (
        edit_config(kind="FutureConfig"),
        "of kind 'FutureConfig', and peft_lntune .* knows BottleneckConfig, .*, UnifiedConfig",
    ),
    "field": (edit_config(tune="gain"), "tune='gain' is not allowed; choose one of 'both', 'weight', 'bias'"),
    "no-weights": (lambda folder: (folder / WEIGHTS).unlink(), f"holds a config, but no {WEIGHTS}"),
    "json-cut": (cut(CONFIG, 0.5), JSON),
    "json-empty": (write(CONFIG, b""), JSON),
    "json-bytes": (write(CONFIG, b"\xff\xfe\x00\x80"), JSON),
}


pytestmark = [
    # PEFT says so of every second adapter that transformers loads by itself.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    # PEFT's own LN tuning says so of every norm.
    pytest.mark.filterwarnings("ignore:Unsupported layer type.*LayerNorm:UserWarning"),
]


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """The good adapter, to be changed."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def damaged(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with one of `DAMAGES`, made once."""

    @cache
    def make(damage: str) -> Path:
        folder = Path(shutil.copytree(good, tmp_path_factory.mktemp("damaged") / "adapter"))
        DAMAGES[damage][0](folder)
        return folder

    return make


@dataclass
class Target:
    """A model that all damaged adapters of one way are loaded into, one after the other: each leaves it as it was."""

    model: Any
    load: Callable[[Any, Path], Any]
    before: State


@pytest.fixture(scope="module", params=WAYS)
def target(request: pytest.FixtureRequest) -> Target:
    build, load = WAYS[request.param]
    model = build().train()
    return Target(model, load, State.of(model))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_refused_adapter_leaves_no_trace(target: Target, damage: str, damaged: Callable[[str], Path]) -> None:
    with pytest.raises(PeftLNTuneError, match=f"(?s){DAMAGES[damage][1]}"):
        target.load(target.model, damaged(damage))
    target.before.assert_same(target.model)


def test_a_good_one_then_loads_under_that_name(target: Target, good: Path) -> None:
    loaded = target.load(target.model, good)
    model = loaded if isinstance(loaded, nn.Module) else target.model
    added = [name for name in model.peft_config if name not in target.before.adapters]
    if target.before.adapters:
        model.set_adapter(added[0] if added else "first")
    assert torch.equal(logits(model), logits(adapt(build_base())))


@pytest.mark.parametrize("damage", DAMAGES)
def test_auto_models_refuse_it_too(damage: str, damaged: Callable[[str], Path]) -> None:
    message = DAMAGES[damage][1]
    with pytest.raises(PeftLNTuneError, match=f"(?s){message}"):
        AutoPeftModelForSequenceClassification.from_pretrained(damaged(damage))


@pytest.mark.parametrize("way", WAYS)
def test_a_head_of_another_size(way: str, folder: Path) -> None:
    """torch's own words are clear here, so they stay in ours."""
    build, load = WAYS[way]
    other_size(num_labels=5).save_pretrained(folder)
    model = build().train()
    before = State.of(model)
    with pytest.raises(HeadFileError, match=r"size mismatch for .*classifier|ignore_mismatched_sizes"):
        load(model, folder)
    before.assert_same(model)


@pytest.mark.parametrize("way", WAYS)
def test_without_a_config(way: str, folder: Path) -> None:
    """PEFT asks for no second config where it has one, and says itself where it has none."""
    build, load = WAYS[way]
    (folder / CONFIG).unlink()
    model = build().train()
    if way in ("load_adapter-existing", "load_adapter-meta", "from_pretrained-config"):
        load(model, folder)
        cut(WEIGHTS, 0.5)(folder)
        model = build()
        before = State.of(model)
        with pytest.raises(AdapterFileError, match=BROKEN):
            load(model, folder)
        before.assert_same(model)
        return
    before = State.of(model)
    with pytest.raises(ValueError, match=f"Can't find '{CONFIG}'|adapter model file not found"):
        load(model, folder)
    before.assert_same(model)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("load_adapter", "Cannot combine adapters with different peft types"),
        ("load_adapter-existing", "holds an adapter of PEFT type .*LORA, not one of peft_lntune"),
        ("from_pretrained-config", "holds an adapter of PEFT type .*LORA, not one of peft_lntune"),
    ],
)
def test_an_adapter_of_another_type(way: str, message: str, tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path)
    build, load = WAYS[way]
    model = build()
    before = State.of(model)
    with pytest.raises(ValueError, match=message):
        load(model, tmp_path)
    before.assert_same(model)


VALUES, BITS = "base_model.model.lntune_packed.weight", "base_model.model.lntune_packed.mask"


def edit_signed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Change the weights and the digest with them, so that only what is in the tensors gives them away."""

    def damage(folder: Path) -> None:
        edit_tensors(change)(folder)
        config = json.loads((folder / CONFIG).read_text())
        digest = manifest_of(load_file(folder / WEIGHTS))["digest"]
        edit_config(manifest=config["manifest"] | {"digest": digest})(folder)
        seal_file(folder / CONFIG, folder / WEIGHTS)

    return damage


def edit_counts(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the numbers of tuned entries that the config records."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / CONFIG).read_text())["manifest"]
        change(manifest["tuned"])
        edit_config(manifest=manifest)(folder)
        seal_file(folder / CONFIG, folder / WEIGHTS)

    return damage


def exchange_counts(counts: dict[str, Any]) -> None:
    """Give one parameter an entry of another one: the sums stay as they are."""
    first, second, *_ = counts
    counts[first] += 1
    counts[second] -= 1


WRONG_BITS = UNFIT + "the mask of .* has .* entries.*, expected"
MASK_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "mask-dtype": (
        edit_tensors(lambda t: t.update({BITS: t[BITS].float()})),
        "lntune_packed.mask should be of uint8, but is torch.float32",
    ),
    "mask-flipped": (edit_tensors(lambda t: t[BITS].bitwise_not_()), "digests differ"),
    "mask-missing": (edit_tensors(lambda t: t.pop(BITS)), "digests differ"),
    "packed-nan": (edit_tensors(lambda t: t[VALUES].fill_(torch.nan)), "hold NaN or infinite values.*lntune_packed"),
    "bits": (edit_signed(lambda t: t[BITS].bitwise_not_()), WRONG_BITS),
    "bit": (edit_signed(lambda t: t[BITS][:1].bitwise_xor_(1)), WRONG_BITS),
    "mask-short": (
        edit_signed(lambda t: t.update({BITS: t[BITS][1:]})),
        UNFIT + r"lntune_packed.mask should be of shape .*bytes of mask of 10 parameters, but is of shape",
    ),
    "values-short": (
        edit_signed(lambda t: t.update({VALUES: t[VALUES][1:]})),
        UNFIT + r"lntune_packed.weight should be of shape .*the values of 10 parameters, but is of shape",
    ),
    "values-shape": (edit_signed(lambda t: t.update({VALUES: t[VALUES][None]})), UNFIT + r"but is of shape \(1, "),
    "values-missing": (edit_signed(lambda t: t.pop(VALUES)), UNFIT + "lntune_packed.weight .* but is missing"),
    "no-mask": (edit_signed(lambda t: t.pop(BITS)), UNFIT + "lntune_packed.mask .* but is missing"),
    "counts": (edit_counts(exchange_counts), WRONG_BITS),
    "counts-fewer": (edit_counts(lambda counts: counts.popitem()), UNFIT + "of 9 parameters"),
    "counts-dense": (edit_counts(lambda counts: counts.update(dict.fromkeys(counts))), "where all deltas are dense"),
    "counts-type": (edit_counts(lambda counts: counts.update(dict.fromkeys(counts, "3"))), "manifest.*but got '3'"),
    # Then all deltas are made dense.
    "no-manifest": (edit_config(manifest=None), "does not fit this model, where all deltas are dense. Choose the same"),
    "more-layers": (
        take_all(lambda: other_size(masked=True, num_hidden_layers=3)),
        f"{UNFIT}lntune_packed.weight should be of shape|chosen among 224 entries, and its config selects 160",
    ),
    "hidden-size": (
        take_all(lambda: other_size(masked=True, hidden_size=24)),
        f"{UNFIT}lntune_packed.mask should be of shape|chosen among 240 entries, and its config selects 160",
    ),
}


@pytest.mark.parametrize(
    ("way", "damage"),
    spread([way for way in WAYS if way not in ("load_adapter-existing", "load_adapter-meta")], MASK_DAMAGES),
)
def test_damaged_masks(way: str, damage: str, masked: Path, tmp_path: Path) -> None:
    build, load = WAYS[way]
    spoil, message = MASK_DAMAGES[damage]
    folder = Path(shutil.copytree(masked, tmp_path / "adapter"))
    spoil(folder)
    model = build()
    before = State.of(model)
    with pytest.raises(PeftLNTuneError, match=f"(?s){message}"):
        load(model, folder)
    before.assert_same(model)


@pytest.mark.parametrize("way", ["load_adapter-existing", "load_adapter-meta"])
def test_a_masked_file_for_a_dense_adapter(way: str, masked: Path) -> None:
    """As after `get_peft_model` with a `FisherLNConfig`, before its masks were fitted."""
    build, load = WAYS[way]
    model = build()
    before = State.of(model)
    with pytest.raises(
        AdapterFileError, match=r"all deltas are dense. Choose .* first \(fit_fisher_masks or set_masks"
    ):
        load(model, masked)
    before.assert_same(model)


KEEP = "base_model.model.bert.encoder.layer.1.attention.self.query.lntune_supermask.keep"
SCORES = KEEP.replace(".keep", ".weight")


def other_supermasks(**sizes: int) -> PeftModel:
    body = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return switch_off(BertForSequenceClassification(BertConfig(**{**body, "vocab_size": 40, "num_labels": 3, **sizes})))


SUPERMASK_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (cut(WEIGHTS, 0.6), BROKEN),
    "bits-as-floats": (
        edit_tensors(lambda t: t.update({KEEP: t[KEEP].float()})),
        "query.lntune_supermask.keep should be of uint8, but is torch.float32",
    ),
    "scores-as-bytes": (
        edit_tensors(lambda t: t.update({SCORES: torch.zeros(16, 16).byte()})),
        "query.lntune_supermask.weight should be of a floating dtype, but is torch.uint8",
    ),
    "flipped": (edit_tensors(lambda t: t[KEEP].bitwise_not_()), "digests differ"),
    "short": (
        edit_signed(lambda t: t.update({KEEP: t[KEEP][1:]})),
        UNFIT + r"supermask of .*query has 31 bytes, expected 32 for the 256 entries of \(16, 16\)",
    ),
    "long": (
        edit_signed(lambda t: t.update({KEEP: t[KEEP].repeat(2)})),
        UNFIT + r"supermask of .*query has 64 bytes, expected 32",
    ),
    "shape": (
        edit_signed(lambda t: t.update({KEEP: t[KEEP].view(4, 8)})),
        UNFIT + r"supermask of .*query has 32 bytes",
    ),
    "missing": (edit_signed(lambda t: t.pop(KEEP)), UNFIT + "1 missing, such as"),
    "unexpected": (
        edit_signed(lambda t: t.update({KEEP.replace("query", "value"): t[KEEP].clone()})),
        UNFIT + "1 unexpected, such as",
    ),
    "scores-nan": (edit_tensors(lambda t: t.update({SCORES: torch.full((16, 16), torch.nan)})), "hold NaN or infinite"),
    "hidden-size": (
        take_all(lambda: other_supermasks(hidden_size=24)),
        UNFIT + r"supermask of .* has 72 bytes, expected 32",
    ),
    "more-layers": (take_all(lambda: other_supermasks(num_hidden_layers=3)), UNFIT + "unexpected, such as.*layer.2"),
    "fewer-layers": (take_all(lambda: other_supermasks(num_hidden_layers=1)), UNFIT + "missing, such as.*layer.1"),
    "field": (
        edit_config(initial_sparsity=2.0),
        "initial_sparsity=2.0 should be at least 0 and below 1",
    ),
}
# What is loaded over an adapter of another kind, or with a config of another kind, fits in no case.
OF_ANOTHER_KIND = ["load_adapter-existing", "load_adapter-meta", "from_pretrained-config"]


ANEW = pytest.mark.filterwarnings(r"ignore:adapter '\w+' is loaded to be trained:UserWarning")  # of bits alone


@ANEW
@pytest.mark.parametrize(
    ("way", "damage"), spread([way for way in WAYS if way not in OF_ANOTHER_KIND], SUPERMASK_DAMAGES)
)
def test_damaged_supermasks(way: str, damage: str, supermasks: Path, tmp_path: Path) -> None:
    build, load = WAYS[way]
    spoil, message = SUPERMASK_DAMAGES[damage]
    folder = Path(shutil.copytree(supermasks, tmp_path / "adapter"))
    spoil(folder)
    model = build()
    before = State.of(model)
    with pytest.raises(PeftLNTuneError, match=f"(?s){message}"):
        load(model, folder)
    before.assert_same(model)


@pytest.mark.parametrize("way", OF_ANOTHER_KIND)
def test_supermasks_for_an_adapter_of_another_kind(way: str, supermasks: Path) -> None:
    build, load = WAYS[way]
    model = build()
    before = State.of(model)
    with pytest.raises(ConfigError, match="consists of LNTuningConfig, and the saved one of SupermaskConfig"):
        load(model, supermasks)
    before.assert_same(model)


@ANEW
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("damage", [d for d in SUPERMASK_DAMAGES if d not in ("field", "more-layers", "fewer-layers")])
def test_damaged_supermasks_over_good_ones(damage: str, trained: bool, supermasks: Path, tmp_path: Path) -> None:
    spoil, message = SUPERMASK_DAMAGES[damage]
    folder = Path(shutil.copytree(supermasks, tmp_path / "adapter"))
    model = switch_off(build_base()) if trained else PeftModel.from_pretrained(build_base(), folder)
    spoil(folder)
    before = State.of(model)
    with pytest.raises(PeftLNTuneError, match=f"(?s){message}"):
        model.load_adapter(folder, "default", is_trainable=trained)
    before.assert_same(model)


def test_an_interrupted_load_leaves_no_trace(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    model = wrapped()
    before = State.of(model)
    monkeypatch.setattr("peft.peft_model.set_peft_model_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.load_adapter(good, "other")
    before.assert_same(model)


def test_errors_are_of_the_kind_that_says_what_to_do(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "adapter"))
    for damage, error in (("too-new", ConfigError), ("torn", AdapterFileError)):
        DAMAGES[damage][0](folder)
        with pytest.raises(error, match=DAMAGES[damage][1]):
            wrapped().load_adapter(folder, "other")
        shutil.copytree(good, folder, dirs_exist_ok=True)


def test_a_failure_of_other_adapters_is_left_to_peft(tmp_path: Path) -> None:
    """The guards change nothing for adapters that are not ours, not even what PEFT leaves behind."""
    lora().save_pretrained(tmp_path)
    cut(WEIGHTS, 0.5)(tmp_path)
    base = build_base()
    with pytest.raises(Exception, match=r"incomplete|HeaderTooLarge|InvalidHeader|deserializ"):
        PeftModel.from_pretrained(base, tmp_path)
    assert any(".lora_A." in name for name in base.state_dict())
