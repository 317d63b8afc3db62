"""``xcalib doctor``: what is installed, whether the kernels are right on this machine, and what a model allows."""

from xcalib.doctor.machine import EXTRAS, Extra, Gpu, gpus, missing_extras, required_problems, versions
from xcalib.doctor.selftest import Check, Target, check_kernels, targets

__all__ = [
    "EXTRAS",
    "Check",
    "Extra",
    "Gpu",
    "Target",
    "check_kernels",
    "gpus",
    "missing_extras",
    "required_problems",
    "targets",
    "versions",
]
