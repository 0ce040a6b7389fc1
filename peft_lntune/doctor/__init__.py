"""Whether norms learn in a training run, with this package or without, and if not, why."""

from peft_lntune.doctor.callback import NormDoctor
from peft_lntune.doctor.checkpoints import compare_norms
from peft_lntune.doctor.faults import FAULTS, Fault, Finding
from peft_lntune.doctor.movement import can_move, movement_between, spacing
from peft_lntune.doctor.places import norm_parameters
from peft_lntune.doctor.records import Record, diagnose
from peft_lntune.doctor.report import Report
from peft_lntune.doctor.watch import NormWatch

__all__ = [
    "FAULTS",
    "Fault",
    "Finding",
    "NormDoctor",
    "NormWatch",
    "Record",
    "Report",
    "can_move",
    "compare_norms",
    "diagnose",
    "movement_between",
    "norm_parameters",
    "spacing",
]
