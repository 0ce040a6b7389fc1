"""Tune the normalization layers of a model as a Hugging Face PEFT adapter.

Importing this package registers it with PEFT. Then PEFT's own verbs do the work:

    from peft import get_peft_model
    from peft_lntune import LNTuningConfig

    model = get_peft_model(model, LNTuningConfig(task_type="SEQ_CLS"))
"""

from peft_lntune.bank import AdapterBank
from peft_lntune.config import (
    BottleneckConfig,
    FisherLNConfig,
    LNTuningConfig,
    ModuleTuningConfig,
    PrefixConfig,
    SupermaskConfig,
    UnifiedConfig,
)
from peft_lntune.errors import (
    AdapterFileError,
    ConfigError,
    DataError,
    NoMatchError,
    PeftLNTuneError,
    RegistrationError,
    RoutingError,
    UnsupportedError,
)
from peft_lntune.interop.peft_ln_tuning import from_stock, to_stock
from peft_lntune.interop.peft_lora import load_lora
from peft_lntune.interop.trainer_checkpoints import last_whole_checkpoint
from peft_lntune.norms.find import Norm, find_norms
from peft_lntune.planning.plan import plan
from peft_lntune.planning.types import Plan
from peft_lntune.plugin import install
from peft_lntune.selection import (
    FisherState,
    change_scores,
    combine_masks,
    fisher_scores,
    magnitude_scores,
    mask_density,
    mask_overlap,
    median_distance_scores,
    random_scores,
    select,
)
from peft_lntune.tasks import ManyTasks
from peft_lntune.tuner.fit_masks import FisherFit, fit_fisher_masks
from peft_lntune.version import __version__

__all__ = [
    "AdapterBank",
    "AdapterFileError",
    "BottleneckConfig",
    "ConfigError",
    "DataError",
    "FisherFit",
    "FisherLNConfig",
    "FisherState",
    "LNTuningConfig",
    "ManyTasks",
    "ModuleTuningConfig",
    "NoMatchError",
    "Norm",
    "PeftLNTuneError",
    "Plan",
    "PrefixConfig",
    "RegistrationError",
    "RoutingError",
    "SupermaskConfig",
    "UnifiedConfig",
    "UnsupportedError",
    "__version__",
    "change_scores",
    "combine_masks",
    "find_norms",
    "fisher_scores",
    "fit_fisher_masks",
    "from_stock",
    "last_whole_checkpoint",
    "load_lora",
    "magnitude_scores",
    "mask_density",
    "mask_overlap",
    "median_distance_scores",
    "plan",
    "random_scores",
    "select",
    "to_stock",
]

install()
del install
