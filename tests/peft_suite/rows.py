"""What each generic test of PEFT is parametrised with, when only one config class is of interest.

PEFT's tests carry tables of all its methods. A rule here reads such a table, keyed by the names of its columns, and
returns the rows for our class, or None where the table is not about methods in general: LoRA stands in all that are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import LNTuningConfig, LoraConfig

Row = Any
STRONG = {"init_weights": False}  # not the identity, so that a test sees the adapter


@dataclass(frozen=True)
class Tuner:
    """The config class under test, and what it is called with."""

    cls: type
    kwargs: dict[str, Any]

    def strong(self, **fields: Any) -> Any:
        """A config whose adapter changes the outputs from the start."""
        return self.cls(**(fields | self.kwargs | STRONG))

    def like(self, lora: LoraConfig) -> Any:
        """A strong config for the modules that this LoRA config is for."""
        targets = sorted(lora.target_modules or ())
        return self.strong(target_modules=targets, modules_to_save=lora.modules_to_save)


def _models(rows: list[Row], tuner: Tuner) -> list[Row]:
    """Custom models: the rows of PEFT's own LN tuning (norms and Linear), and other layers with a weight."""
    ours = [(name, model, fields) for name, model, cls, fields in rows if cls is LNTuningConfig]
    ours.append(("LayerNorm two", "MLP_LayerNorm", {"target_modules": ["layernorm0", "layernorm1"]}))
    ours.append(("Norm and Linear", "MLP_LayerNorm", {"target_modules": ["layernorm0", "lin0"]}))
    ours.append(("Embedding and Conv1d", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}))
    ours.append(("Conv2d", "Conv2d", {"target_modules": ["conv2d"]}))
    return [(name, model, tuner.cls, fields | tuner.kwargs) for name, model, fields in ours]


def _task(rows: list[Row], tuner: Tuner) -> list[Row] | None:
    """Transformers models: one row, with the task type of the others."""
    tasks = (fields["task_type"] for cls, fields in rows if cls is LoraConfig)
    return next(([(tuner.cls, {"task_type": task} | tuner.kwargs)] for task in tasks), None)


def _class(rows: list[Row], tuner: Tuner) -> list[Row] | None:
    return [tuner.cls] if LoraConfig in rows else None


def _class_and_fields(rows: list[Row], tuner: Tuner) -> list[Row] | None:
    return [(tuner.cls, tuner.kwargs)] if any(cls is LoraConfig for cls, _ in rows) else None


def _two_active(rows: list[Row], tuner: Tuner) -> list[Row]:
    first, second = ({"target_modules": [name]} | tuner.kwargs | STRONG for name in ("lin0", "lin1"))
    name = tuner.cls.__name__
    return [(f"{name} same", name, tuner.cls, first, first), (f"{name} different", name, tuner.cls, first, second)]


def _pair(rows: list[Row], tuner: Tuner) -> list[Row] | None:
    """A name and config objects: LoRA's first row becomes ours; its others differ in rank, which we have not."""
    for name, *configs in rows:
        if isinstance(configs[0], LoraConfig):
            return [(name.replace("LoRA", tuner.cls.__name__), *map(tuner.like, configs))]
    return None


def _single(rows: list[Row], tuner: Tuner) -> list[Row] | None:
    return next(([tuner.like(config)] for config in rows if isinstance(config, LoraConfig)), None)


RULES: dict[tuple[str, ...], Callable[[list[Row], Tuner], list[Row] | None]] = {
    ("test_name", "model_id", "config_cls", "config_kwargs"): _models,
    ("config_cls", "config_kwargs"): _task,
    ("config_cls",): _class,
    ("config_class",): _class,
    ("config_class", "mandatory_kwargs"): _class_and_fields,
    ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"): _two_active,
    ("test_name", "config0", "config1"): _pair,
    ("test_name", "config"): _pair,
    ("config0",): _single,
}

# Tests that carry a table of methods and yet do not apply.
LEFT_OUT: dict[str, str] = {
    "test_add_weighted_adapter_cat_with_rank_pattern": "never uses the class it is given",
    "test_default_target_modules_not_set_raises": "norms are found in any model, so nothing has to be set",
    "test_default_target_modules_not_set_model_type_set_raises": "the same",
    "test_default_target_modules_list_of_str": "patches the table of LoRA",
    "test_default_target_modules_str": "patches the table of LoRA",
    "test_from_pretrained_cache_dir": "downloads into an empty cache",
    "test_mixed_adapter_batches_mha_raises": "is about LoRA's wrapper of MultiheadAttention",
}
# Tests that go through all registered methods without a table.
LET_IN = {"test_from_peft_type"}
# Tests that PEFT closes to other methods by naming a class: the names that mean ours while such a test runs.
OPENED: dict[str, tuple[str, ...]] = {
    "test_mixed_adapter_batches": ("LoraConfig",),
    "test_generate_with_mixed_adapter_batches": ("LoraConfig",),
    "test_weighted_combination_of_adapters": ("IA3Config",),  # IA3's branch is the plain linear one
}
# OPT flattens samples and tokens into one axis before a layer's last norm, which then cannot tell the rows of a batch
# apart and says so.
FLATTENING = "peft-internal-testing/tiny-random-OPTForCausalLM"
ROUTED = {"test_mixed_adapter_batches", "test_generate_with_mixed_adapter_batches"}
