"""Make PEFT know the type LNTUNE. PEFT has no entry points, so a member is added to its enum, then registered."""

from peft import mapping
from peft.utils import PeftType, register_peft_method

from peft_lntune.config import StoredConfig
from peft_lntune.config.base import PEFT_TYPE
from peft_lntune.errors import RegistrationError
from peft_lntune.tuner.model import LNTuneModel

__all__ = ["register"]


def register() -> None:
    """Register the PEFT type of this package. Calling it again changes nothing.

    Raises:
        RegistrationError: another package has registered this type. Nothing has changed.
    """
    if PEFT_TYPE not in PeftType.__members__:
        _add_member(PEFT_TYPE)
    peft_type = PeftType(PEFT_TYPE)
    holder = mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type)
    if holder is LNTuneModel:
        return
    if holder is not None and _name(holder) != _name(LNTuneModel):
        raise RegistrationError(
            f"the PEFT type {PEFT_TYPE} is held by {_name(holder)}, and {_name(LNTuneModel)} "
            "needs it. Uninstall one of the two, or do not import it."
        )
    if holder is not None:  # this package was imported again: replace its first classes
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = LNTuneModel
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = StoredConfig
        return
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=StoredConfig, model_cls=LNTuneModel)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _add_member(name: str) -> None:
    """Add a member as the class body of `PeftType` would; an enum with members cannot be subclassed."""
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
