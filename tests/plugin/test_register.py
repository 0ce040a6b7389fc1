"""PEFT knows the type as one of its own, however often it is told, and nobody else's entry is overwritten."""

import copy
import importlib
import json
import pickle
import sys
from collections.abc import Callable
from typing import Any

import peft
import pytest
from peft import PeftMixedModel, PeftModel, get_peft_model, mapping
from peft.utils import PeftType
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from peft_lntune.config import StoredConfig
from peft_lntune.errors import RegistrationError
from peft_lntune.plugin import install
from peft_lntune.tuner.model import LNTuneModel

LNTUNE = PeftType("LNTUNE")
MAPPINGS = {
    "PEFT_TYPE_TO_CONFIG_MAPPING": StoredConfig,
    "PEFT_TYPE_TO_TUNER_MAPPING": LNTuneModel,
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": LNTuneModel,
    "PEFT_TYPE_TO_PREFIX_MAPPING": "lntune_",
}


def registered() -> dict[str, object]:
    """Everything that an import of this package changes."""
    return {
        **{name: getattr(mapping, name)[LNTUNE] for name in MAPPINGS},
        "members": list(PeftType),
        "load": PeftModel.__dict__["load_adapter"],
        "from_pretrained": PeftModel.from_pretrained.__func__,
        "mixed": PeftMixedModel.from_pretrained.__func__,
        "native": PeftAdapterMixin.__dict__["load_adapter"],
        "types": peft.tuners.mixed.COMPATIBLE_TUNER_TYPES,
        "cases": peft.tuners.mixed.MixedModel._create_and_replace,
        "card": PeftModel.__dict__["create_or_update_model_card"],
    }


def test_what_is_registered() -> None:
    assert {name: getattr(mapping, name)[LNTUNE] for name in MAPPINGS} == MAPPINGS


def reloaded(name: str) -> Any:
    return importlib.reload(importlib.import_module(name))


AGAIN: dict[str, Callable[[], Any]] = {
    "install": install,
    "import": lambda: importlib.import_module("peft_lntune"),
    "reload": lambda: reloaded("peft_lntune"),
    "reload-plugin": lambda: reloaded("peft_lntune.plugin").install(),
    "reload-register": lambda: reloaded("peft_lntune.plugin.register").register(),
    "reload-loading": lambda: reloaded("peft_lntune.plugin.loading").guard_loading(),
    "reload-mixed": lambda: reloaded("peft_lntune.plugin.mixed").join_mixed_models(),
    "reload-cards": lambda: reloaded("peft_lntune.plugin.cards").name_import_in_cards(),
}


@pytest.mark.parametrize("way", AGAIN)
def test_again_changes_nothing(way: str) -> None:
    before = registered()
    AGAIN[way]()
    assert registered() == before


def test_a_fresh_import_registers_its_own_classes() -> None:
    """All modules of the package purged and imported anew, as some notebooks do."""
    members = list(PeftType)
    first = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "peft_lntune"}
    try:
        second = importlib.import_module("peft_lntune")
        model = get_peft_model(nn.Sequential(nn.LayerNorm(4)), second.LNTuningConfig())
        fresh = importlib.import_module("peft_lntune.tuner.model").LNTuneModel
        assert type(model.base_model) is fresh is not LNTuneModel
        assert list(PeftType) == members
    finally:
        sys.modules.update(first)
        install()  # the first classes again
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[LNTUNE] is LNTuneModel


def test_a_foreign_entry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stranger:
        pass

    monkeypatch.setitem(mapping.PEFT_TYPE_TO_TUNER_MAPPING, LNTUNE, Stranger)
    message = (
        r"type LNTUNE is held by tests\.plugin\.test_register\..*Stranger, and peft_lntune\.tuner\.model\.LNTuneModel"
    )
    with pytest.raises(RegistrationError, match=message):
        install()
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[LNTUNE] is Stranger


@pytest.mark.parametrize(
    "found",
    [
        lambda: PeftType("LNTUNE"),
        lambda: PeftType["LNTUNE"],
        lambda: PeftType.LNTUNE,
        lambda: PeftType(LNTUNE),
        lambda: PeftType.__members__["LNTUNE"],
        lambda: next(member for member in PeftType if member == "LNTUNE"),
        lambda: pickle.loads(pickle.dumps(LNTUNE)),
        lambda: copy.copy(LNTUNE),
        lambda: copy.deepcopy(LNTUNE),
    ],
    ids=["call", "index", "attribute", "call-member", "members", "iterate", "pickle", "copy", "deepcopy"],
)
def test_the_member_is_one_object(found: object) -> None:
    assert found() is LNTUNE


def test_the_member_is_like_the_others() -> None:
    lora = PeftType.LORA
    assert (LNTUNE.name, LNTUNE.value, LNTUNE) == ("LNTUNE", "LNTUNE", "LNTUNE")
    assert lora != LNTUNE
    assert hash(LNTUNE) == hash(copy.deepcopy(LNTUNE))
    assert {LNTUNE: 1, lora: 2}[PeftType("LNTUNE")] == 1
    assert list(PeftType)[-1] is LNTUNE
    assert len(PeftType) == len(list(PeftType)) == len(set(PeftType))
    assert LNTUNE in PeftType
    assert isinstance(LNTUNE, (PeftType, str))
    assert json.dumps({"peft_type": LNTUNE}) == '{"peft_type": "LNTUNE"}'
    assert (repr(LNTUNE), str(LNTUNE)) == (repr(lora).replace("LORA", "LNTUNE"), str(lora).replace("LORA", "LNTUNE"))
    with pytest.raises(ValueError, match=r"is not a valid PeftType"):
        PeftType("LNTUNED")
