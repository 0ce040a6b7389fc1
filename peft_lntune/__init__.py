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
from peft_lntune.errors import PeftLNTuneError
from peft_lntune.interop import load_lora
from peft_lntune.norms import find_norms
from peft_lntune.planning.plan import plan
from peft_lntune.plugin import install
from peft_lntune.selection import fisher_scores, select
from peft_lntune.tasks import ManyTasks
from peft_lntune.tuner.fit_masks import fit_fisher_masks
from peft_lntune.tuner.parameter_groups import parameter_groups
from peft_lntune.version import __version__

__all__ = [
    "AdapterBank",
    "BottleneckConfig",
    "FisherLNConfig",
    "LNTuningConfig",
    "ManyTasks",
    "ModuleTuningConfig",
    "PeftLNTuneError",
    "PrefixConfig",
    "SupermaskConfig",
    "UnifiedConfig",
    "__version__",
    "find_norms",
    "fisher_scores",
    "fit_fisher_masks",
    "load_lora",
    "parameter_groups",
    "plan",
    "select",
]

install()
del install
