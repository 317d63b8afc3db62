"""How long a calibration takes, what memory it needs and what it costs, before anything runs."""

from xcalib.plan.calibration import CalibrationPlan, Placement, PlannedStep, Sharding, plan_calibration
from xcalib.plan.check import Row, check_run
from xcalib.plan.cost import Work
from xcalib.plan.machine import SHIPPED, Machine, Timing, fit, load_machine
from xcalib.plan.measure import measure_machine
from xcalib.plan.shape import ModelShape, read_shape, shape_of
from xcalib.plan.steps import Job, Step, steps

__all__ = [
    "SHIPPED",
    "CalibrationPlan",
    "Job",
    "Machine",
    "ModelShape",
    "Placement",
    "PlannedStep",
    "Row",
    "Sharding",
    "Step",
    "Timing",
    "Work",
    "check_run",
    "fit",
    "load_machine",
    "measure_machine",
    "plan_calibration",
    "read_shape",
    "shape_of",
    "steps",
]
