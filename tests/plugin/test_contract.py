"""Every private name of PEFT and transformers that this package relies on, and what breaks without it.

A new version of either that moves one of them fails here first, by name, and not in some user's training.
"""

import ast
import importlib
import inspect
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

import peft_lntune
from peft_lntune import LNTuningConfig
from peft_lntune.architectures.attention import IMPLEMENTATION
from peft_lntune.plugin import install
from peft_lntune.plugin.optional import PluginWarning, apply_optional
from peft_lntune.plugin.wrapping import MARK
from tests import adapted

PACKAGE = Path(peft_lntune.__file__).parent


@dataclass(frozen=True)
class Name:
    """A name of somebody else's.

    Attributes:
        path: where it lives, `module:attribute` or `module:Class.attribute`.
        feature: what breaks without it.
        files: the files that use it, within the package.
    """

    path: str
    feature: str
    files: tuple[str, ...]

    @property
    def owner(self) -> Any:
        module, _, attribute = self.path.partition(":")
        found: Any = importlib.import_module(module)
        for part in attribute.split(".")[:-1]:
            found = getattr(found, part)
        return found

    @property
    def attribute(self) -> str:
        return self.path.partition(":")[2].split(".")[-1]


MIXED = "adapters in a PeftMixedModel"
GUARD = "refusing damaged adapters without a trace, and masked ones in transformers' load_adapter"
SAVING = "saving over an older adapter in one step"
PREFIXES = "prefixes"
CARDS = "the line `import peft_lntune` in cards that PEFT or push_to_hub write"
DECAY = "no weight decay of deltas in Trainer"
CONTINUOUS = "continuous batching with an adapter per request"
PREFIX_CACHE = "cached prefixes that belong to one adapter"
ENGINE = "transformers.generation.continuous_batching"
LORA = "planning/methods/lora.py"
TUNER, LAYER = "peft.tuners.tuners_utils:BaseTuner", "peft.tuners.tuners_utils:BaseTunerLayer"

# Patches that can be left out: one warning, and the rest works.
OPTIONAL = [
    Name("peft.tuners.mixed.model:COMPATIBLE_TUNER_TYPES", MIXED, ("plugin/mixed.py",)),
    Name("peft.tuners.mixed:COMPATIBLE_TUNER_TYPES", MIXED, ("plugin/mixed.py",)),
    Name("peft.tuners.mixed.model:PREFIXES", MIXED, ("plugin/mixed.py",)),
    Name("peft.tuners.mixed.model:Configs", MIXED, ("plugin/mixed.py",)),
    Name("peft.tuners.mixed.model:Layers", MIXED, ("plugin/mixed.py",)),
    Name("peft.tuners.mixed.model:MixedModel", MIXED, ("plugin/mixed.py",)),
    Name("peft.mapping:PEFT_TYPE_TO_MIXED_MODEL_MAPPING", MIXED, ("plugin/mixed.py",)),
    Name("peft:PeftMixedModel", GUARD, ("plugin/loading.py",)),
    Name("peft.peft_model:PeftModel.load_adapter", GUARD, ("plugin/loading.py",)),
    Name("peft.peft_model:PeftModel.from_pretrained", GUARD, ("plugin/loading.py",)),
    Name("peft.mixed_model:PeftMixedModel.from_pretrained", GUARD, ("plugin/loading.py",)),
    Name("peft.utils.save_and_load:load_peft_weights", GUARD, ("plugin/loading.py",)),
    Name("peft.config:PeftConfigMixin.from_json_file", GUARD, ("plugin/loading.py",)),
    Name("peft.auto:AutoPeftModel.from_pretrained", GUARD, ("plugin/loading.py",)),
    Name("peft.peft_model:PeftModel.save_pretrained", SAVING, ("plugin/saving.py",)),
    Name("transformers.modeling_utils:PreTrainedModel.save_pretrained", SAVING, ("plugin/saving.py",)),
    Name("transformers.integrations.peft:PeftAdapterMixin", GUARD, ("plugin/loading.py",)),
    Name("transformers.integrations.peft:PeftAdapterMixin.load_adapter", GUARD, ("plugin/loading.py",)),
    Name(
        "transformers.configuration_utils:PreTrainedConfig._attn_implementation",
        PREFIXES,
        ("layers/prefix.py", "plugin/attention.py", "routing/entries.py"),
    ),
    Name("transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS", PREFIXES, ("architectures/attention.py",)),
    Name("transformers.modeling_utils:AttentionInterface.register", PREFIXES, ("plugin/attention.py",)),
    Name("transformers.trainer_pt_utils:get_parameter_names", DECAY, ("plugin/decay.py",)),
    Name("peft.peft_model:PeftModel.create_or_update_model_card", CARDS, ("plugin/cards.py",)),
    Name("transformers.utils.hub:PushToHubMixin", CARDS, ("plugin/cards.py",)),
    Name("transformers.utils.hub:PushToHubMixin._upload_modified_files", CARDS, ("plugin/cards.py",)),
]
# What the tuner and its layers are made of, and registration: nothing works without.
REQUIRED = [
    Name("peft.utils:register_peft_method", "registration", ("plugin/register.py",)),
    Name("peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING", "registration", ("plugin/register.py",)),
    Name("peft.mapping:PEFT_TYPE_TO_CONFIG_MAPPING", "registration", ("plugin/register.py",)),
    *(
        Name(f"peft.utils:PeftType.{name}", "registration: a member of the enum", ("plugin/register.py",))
        for name in ("_member_names_", "_member_map_", "_value2member_map_")
    ),
    Name(f"{TUNER}._prepare_adapter_config", "injection", ("tuner/model.py", "plugin/mixed.py", LORA)),
    Name(f"{TUNER}.inject_adapter", "planning before anything changes", ("tuner/model.py", "plugin/mixed.py")),
    Name(f"{TUNER}._check_target_module_exists", "choosing modules", ("tuner/model.py", "plugin/mixed.py")),
    Name(f"{TUNER}._create_and_replace", "injection", ("tuner/model.py", "plugin/mixed.py")),
    Name(
        f"{TUNER}._replace_module",
        "injection, and taking heads out",
        ("planning/methods/replacing.py", "tuner/model.py"),
    ),
    Name(f"{TUNER}._cast_adapter_dtype", "float32 deltas over a half precision base", ("tuner/model.py",)),
    Name(f"{TUNER}._check_merge_allowed", "merging", ("tuner/model.py", "plugin/mixed.py")),
    Name(f"{TUNER}._unload_and_optionally_merge", "safe_merge, and beside LoRA", ("tuner/model.py", "plugin/mixed.py")),
    Name(f"{TUNER}._get_adapter_state_dict", "the manifest, and tensors told by structure", ("tuner/model.py",)),
    Name(f"{TUNER}._remove_adapter_name_from_key", "adapters of any name", ("tuner/model.py",)),
    Name(
        f"{TUNER}._remap_adapter_state_dict_for_load",
        "refusing weights that do not fit",
        ("tuner/model.py", "plugin/loading.py"),
    ),
    Name(
        "peft.peft_model:PeftModel._enable_peft_forward_hooks",
        "adapter_names, and the warning before masks are fitted",
        ("tuner/model.py",),
    ),
    Name(
        f"{LAYER}._disable_adapters",
        "disable_adapter, and a bank on a PeftModel",
        ("layers/replacing.py", "layers/inserted.py", "layers/bottleneck.py", "layers/switched.py"),
    ),
    Name(f"{LAYER}._active_adapter", "which cached values are those of the active adapters", ("layers/replacing.py",)),
    Name(
        f"{LAYER}._move_adapter_to_device_of_base_layer",
        "deltas keep their dtype",
        ("layers/replacing.py", "layers/inserted.py", "layers/module.py"),
    ),
    Name("peft.tuners.tuners_utils:check_adapters_to_merge", "merging", ("layers/replacing.py",)),
    Name("peft.tuners.tuners_utils:cast_adapter_dtype", "float32 LoRA over a half precision base", ("tuner/model.py",)),
    Name("peft.tuners.tuners_utils:_maybe_include_all_linear_layers", 'LoRA at "all-linear"', (LORA,)),
    Name("peft.tuners.tuners_utils:_check_lora_target_modules_mamba", "export as LoRA of Mamba", ("interop/folds.py",)),
    Name(
        "peft.utils.transformers_weight_conversion:convert_peft_config_for_transformers",
        "export as LoRA of models with experts",
        ("interop/folds.py",),
    ),
    Name("peft.tuners.lora:LoraModel._prepare_adapter_config", "LoRA as a part", (LORA,)),
    Name("peft.tuners.lora:LoraModel._check_target_module_exists", "LoRA as a part", (LORA,)),
    Name("peft.tuners.lora:LoraModel._create_and_replace", "LoRA as a part under offloading", (LORA,)),
    Name("peft.utils.other:get_pattern_key", "counting LoRA by rank_pattern", (LORA,)),
    Name("transformers.pytorch_utils:Conv1D", "LoRA on GPT-2", (LORA,)),
    Name(
        "peft.tuners.tuners_utils:check_target_module_exists",
        "choosing modules",
        ("planning/methods/deltas.py", "tuner/inject.py"),
    ),
    Name(
        "transformers.models.bert.modeling_bert:eager_attention_forward",
        "prefixes under eager",
        ("architectures/attention.py",),
    ),
    Name("peft.utils.other:ModulesToSaveWrapper", "heads in mixed batches", ("tuner/heads.py",)),
    *(
        Name(f"transformers:Trainer.{name}", "TaskTrainer", ("tasks/trainer.py",))
        for name in (
            "_load_from_checkpoint",
            "_set_signature_columns_if_needed",
            "_remove_unused_columns",
            "_get_collator_with_removed_columns",
        )
    ),
    *(
        Name(f"transformers.generation:ContinuousBatchingManager.{name}", CONTINUOUS, ("continuous/manager.py",))
        for name in ("_create_batch_processor", "_generation_step", "add_request", "add_requests", "start")
    ),
    *(
        Name(f"{ENGINE}.cache:PagedAttentionCache.{name}", PREFIX_CACHE, ("continuous/prefixes.py",))
        for name in ("search_prefix_match", "mark_complete_blocks")
    ),
    Name(f"{ENGINE}.cache:PagedAttentionCache.evict_cached_blocks", PREFIX_CACHE, ("tuner/continuous.py",)),
    Name(
        f"{ENGINE}.continuous_api:ContinuousMixin.init_continuous_batching",
        CONTINUOUS,
        ("bank/continuous.py", "continuous/manager.py"),
    ),
    Name(
        f"{ENGINE}.continuous_api:ContinuousMixin.generate_batch",
        CONTINUOUS,
        ("bank/continuous.py", "tuner/continuous.py"),
    ),
    *(
        Name(f"peft.utils.merge_utils:{name}", "add_weighted_adapter", ("planning/methods/deltas.py",))
        for name in ("dare_linear", "dare_ties", "magnitude_prune", "task_arithmetic", "ties")
    ),
]


def ids(name: Name) -> str:
    return name.path


@pytest.mark.parametrize("name", OPTIONAL + REQUIRED, ids=ids)
def test_it_is_there(name: Name) -> None:
    assert hasattr(name.owner, name.attribute), f"gone: {name.path}. Without it: {name.feature}."


@pytest.mark.parametrize("name", OPTIONAL + REQUIRED, ids=ids)
def test_it_is_used_where_the_table_says(name: Name) -> None:
    users = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if name.attribute in words(file)}
    assert set(name.files) <= users


# Taking them away.


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PEFT and transformers as they are without our optional patches; afterwards with them again."""
    for owner, attribute in (
        (importlib.import_module("transformers.trainer_pt_utils"), "get_parameter_names"),
        (PeftModel, "load_adapter"),
        (PeftModel, "create_or_update_model_card"),
        (PeftModel, "save_pretrained"),
        (transformers.PreTrainedModel, "save_pretrained"),
        (importlib.import_module("transformers.integrations.peft").PeftAdapterMixin, "load_adapter"),
        (importlib.import_module("transformers.utils.hub").PushToHubMixin, "_upload_modified_files"),
    ):
        monkeypatch.setattr(owner, attribute, getattr(owner, attribute).__wrapped__)
    for owner, attribute in (
        (PeftModel, "from_pretrained"),
        (peft.PeftMixedModel, "from_pretrained"),
        (peft.AutoPeftModel.__mro__[1], "from_pretrained"),
        (peft.PeftConfig.__mro__[1], "from_json_file"),
    ):
        monkeypatch.setattr(owner, attribute, classmethod(getattr(owner, attribute).__func__.__wrapped__))
    mixed = importlib.import_module("peft.tuners.mixed.model")
    for owner in (mixed, importlib.import_module("peft.tuners.mixed")):
        monkeypatch.setattr(owner, "COMPATIBLE_TUNER_TYPES", mixed.COMPATIBLE_TUNER_TYPES[:6])
    for attribute in ("PREFIXES", "Configs", "Layers", "MixedModel"):  # set again, so that they are put back
        monkeypatch.setattr(mixed, attribute, getattr(mixed, attribute))
    for attribute in (
        "_create_and_replace",
        "_prepare_adapter_config",
        "inject_adapter",
        "_check_target_module_exists",
        "_unload_and_optionally_merge",
        "merge_adapter",
        "unmerge_adapter",
    ):
        kept = inspect.getattr_static(mixed.MixedModel, attribute)
        monkeypatch.setattr(mixed.MixedModel, attribute, kept)
    monkeypatch.delitem(transformers.AttentionInterface._global_mapping, IMPLEMENTATION)
    for patch in ("mixed", "loading", "attention", "cards", "decay", "saving"):
        monkeypatch.delitem(sys.modules, f"peft_lntune.plugin.{patch}", raising=False)
    yield
    monkeypatch.undo()
    install()


def patched(feature: str) -> bool:
    """Whether the patch that gives a feature is in force, wholly or in part."""
    mixed = importlib.import_module("peft.tuners.mixed.model")
    native = importlib.import_module("transformers.integrations.peft")
    hub = importlib.import_module("transformers.utils.hub")
    if feature == MIXED:
        return "LNTUNE" in getattr(mixed, "COMPATIBLE_TUNER_TYPES", ())
    if feature == PREFIXES:
        return IMPLEMENTATION in transformers.AttentionInterface()
    places: dict[str, list[Any]] = {
        GUARD: [(PeftModel, "load_adapter"), (PeftModel, "from_pretrained"), (native, "PeftAdapterMixin.load_adapter")],
        DECAY: [(importlib.import_module("transformers.trainer_pt_utils"), "get_parameter_names")],
        SAVING: [(PeftModel, "save_pretrained"), (transformers.PreTrainedModel, "save_pretrained")],
        CARDS: [(PeftModel, "create_or_update_model_card"), (hub, "PushToHubMixin._upload_modified_files")],
    }
    functions = []
    for place, path in places[feature]:
        for part in path.split("."):
            place = getattr(place, part, None)
        functions.append(place)
    return any(hasattr(function, MARK) for function in functions)


def tune_once() -> None:
    """Plain LN-tuning: inject, train a step, disable."""
    model = get_peft_model(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), LNTuningConfig())
    x = torch.randn(2, 3)
    before = model(x)
    before.square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert not torch.equal(model(x), before)
    with model.disable_adapter():
        assert torch.equal(model(x), before)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("name", OPTIONAL, ids=ids)
def test_without_it_one_warning_and_the_rest_works(name: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = next((cls for cls in getattr(name.owner, "__mro__", ()) if name.attribute in vars(cls)), name.owner)
    features = {MIXED, GUARD, SAVING, PREFIXES, CARDS, DECAY}
    assert not any(patched(feature) for feature in features)
    monkeypatch.delattr(owner, name.attribute)
    with pytest.warns(PluginWarning, match=f"Everything works except: {name.feature}. Upgrade peft_lntune") as caught:
        install()
    # One name may serve several patches; each is named once, and is either in force or not at all.
    lost = {feature for feature in features if any(feature in str(warning.message) for warning in caught)}
    assert len(caught) == len(lost)
    assert {feature for feature in features if patched(feature)} == features - lost
    tune_once()


@pytest.mark.usefixtures("forgotten")
def test_with_all_of_them_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install()
    assert all(patched(feature) for feature in (MIXED, GUARD, SAVING, PREFIXES, CARDS, DECAY))
    tune_once()


def test_other_errors_of_a_patch_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("a_patch")
    module.patch = lambda: 1 / 0
    monkeypatch.setitem(sys.modules, "a_patch", module)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        apply_optional("something", "a_patch.patch")


# The table is complete.


@cache
def words(file: Path) -> set[str]:
    """Every identifier in a file: names, attributes, functions, imports and strings that could be one."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.alias)):
            found.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def private_names_of_others() -> set[str]:
    """Underscored attributes of the classes of PEFT and transformers that ours extend, patch or look into."""
    named = {name.owner for name in OPTIONAL + REQUIRED if inspect.isclass(name.owner)}
    hosts = {*named, peft.PeftConfig, transformers.PreTrainedModel, *adapted_classes()}
    owned = {cls for host in hosts for cls in host.__mro__ if cls.__module__.split(".")[0] in ("peft", "transformers")}
    inherited = set(dir(nn.Module)) | set(dir(object))
    return {n for cls in owned for n in vars(cls) if n.startswith("_") and not n.startswith("__")} - inherited


def adapted_classes() -> set[type]:
    model = adapted.adapt(adapted.build("bert-classifier"), task_type="SEQ_CLS")
    return {type(module) for module in model.modules()} | {type(model.peft_config["default"])}


def test_no_other_private_name_is_used() -> None:
    theirs = private_names_of_others()
    assert "_create_and_replace" in theirs  # or the scan sees nothing
    used = {(str(file.relative_to(PACKAGE)), word) for file in PACKAGE.rglob("*.py") for word in words(file) & theirs}
    declared = {(file, name.attribute) for name in OPTIONAL + REQUIRED for file in name.files}
    assert {(file, word) for file, word in used - declared if not ours(file, word)} == set()


def ours(file: str, word: str) -> bool:
    """Whether a file itself defines this name, at its top or in a class of its own that extends nobody's."""
    tree = ast.parse((PACKAGE / file).read_text())
    return word in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_no_private_name_is_imported() -> None:
    imported = {
        (str(file.relative_to(PACKAGE)), alias.name)
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("peft", "transformers")
        for alias in node.names
    }
    assert {name for name in imported if name[1].startswith("_")} == set()


# What is set on the engine's objects at run time, and cannot be looked up on a class.


def test_a_request_and_a_batch_have_what_the_engine_is_asked_for() -> None:
    requests = importlib.import_module(f"{ENGINE}.requests")
    state = requests.RequestState("request", [1, 2], logit_processor_kwargs={"adapter": 3})
    assert state.fork("child").logit_processor_kwargs == {"adapter": 3}
    assert state.create_equivalent_initial_request().logit_processor_kwargs == {"adapter": 3}
    assert {"state", "query_length"} <= set(requests.FutureRequestState.__slots__)
    processors = importlib.import_module(f"{ENGINE}.cb_logits_processors")
    processor = processors.ContinuousBatchingLogitsProcessorList(transformers.LogitsProcessorList())
    processor.supported_keys["adapter"] = int
    processor.check_kwargs({"adapter": 3})
    source = inspect.getsource(importlib.import_module(f"{ENGINE}.input_outputs"))
    for name in ("requests_in_batch", "io_pairs", "current_pair", "host_io"):
        assert f"self.{name} = " in source or f"{name}: " in source, name
