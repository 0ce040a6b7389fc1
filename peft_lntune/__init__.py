"""Tune the normalization layers of a model as a Hugging Face PEFT adapter.

Importing this package registers it with PEFT. Then PEFT's own verbs do the work:

    from peft import get_peft_model
    from peft_lntune import LNTuningConfig

    model = get_peft_model(model, LNTuningConfig(task_type="SEQ_CLS"))
"""

from peft_lntune.config import LNTuningConfig
from peft_lntune.core.norms import Norm, find_norms
from peft_lntune.errors import (
    AdapterFileError,
    ConfigError,
    NoMatchError,
    PeftLNTuneError,
    RegistrationError,
    RoutingError,
    UnsupportedError,
)
from peft_lntune.plan import Plan, plan
from peft_lntune.plugin import install
from peft_lntune.stock import from_stock, to_stock
from peft_lntune.version import __version__

__all__ = [
    "AdapterFileError",
    "ConfigError",
    "LNTuningConfig",
    "NoMatchError",
    "Norm",
    "PeftLNTuneError",
    "Plan",
    "RegistrationError",
    "RoutingError",
    "UnsupportedError",
    "__version__",
    "find_norms",
    "from_stock",
    "plan",
    "to_stock",
]

install()
del install
