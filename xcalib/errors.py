"""Every error that xcalib raises on purpose; the command line prints its one line and exits with code 2.

A target that held-out data say is missed ends with code 3. Bad tensor arguments to :mod:`xcalib.kernels` are plain
:class:`ValueError`, as in torch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xcalib.profile import Profile
    from xcalib.search.gate import Verdict

__all__ = [
    "AblationError",
    "BenchError",
    "BusyError",
    "CurvesError",
    "DataError",
    "MemoryLimitError",
    "ModelError",
    "NonFiniteError",
    "PlanError",
    "ProfileError",
    "RankError",
    "RecipeError",
    "ReportError",
    "StudyError",
    "TargetError",
    "TargetMissedError",
    "XcalibError",
    "XcalibWarning",
]


class XcalibError(Exception):
    """Base class. The message is one line: what is wrong, where, and what to do."""


class DataError(XcalibError):
    """Calibration or evaluation data is missing, malformed or too short."""


class ModelError(XcalibError):
    """The model cannot be loaded, measured or patched, or is not the one a profile was made for."""


class NonFiniteError(ModelError):
    """Activations, gradients or logits hold NaN or infinite numbers; the message names the layer where it is known.

    Attributes:
        reason: the message without the sample.
        sample: index in the set that was measured, None where it is not known.
    """

    def __init__(self, reason: str, sample: int | None = None) -> None:
        super().__init__(reason, sample)  # both, so that the error can be pickled
        self.reason = reason
        self.sample = sample

    def __str__(self) -> str:
        return self.reason if self.sample is None else f"sample {self.sample}: {self.reason}"


class MemoryLimitError(XcalibError):
    """The work does not fit into memory, or into what it was allowed."""


class CurvesError(XcalibError):
    """A curves folder is missing, incomplete, damaged or was made with other settings."""


class TargetError(XcalibError):
    """A search target is malformed or cannot be reached with these curves."""


class TargetMissedError(TargetError):
    """What a search found misses a target on held-out data.

    Attributes:
        profile: what was found, with the figures; points that miss are marked ``verified: false``.
        verdicts: one :class:`~xcalib.search.Verdict` for every point, in the profile's order.
    """

    def __init__(self, message: str, profile: "Profile", verdicts: "Sequence[Verdict]") -> None:
        super().__init__(message, profile, verdicts)  # all three, so that the error can be pickled
        self.profile = profile
        self.verdicts = tuple(verdicts)

    def __str__(self) -> str:
        return str(self.args[0])


class ProfileError(XcalibError):
    """A profile file is not valid; the message names the line or the key."""


class RecipeError(XcalibError):
    """A recipe is not valid; the message names the file, the line and the key."""


class StudyError(XcalibError):
    """The storage of a refinement cannot be opened, or holds a study of something else."""


class RankError(XcalibError):
    """Of a job in several processes, one failed, or they cannot reach each other."""


class BusyError(XcalibError):
    """Another process is at work in the same folder or on the same file; the message names it."""


class BenchError(XcalibError):
    """A bench suite is malformed, or this machine cannot run it."""


class PlanError(XcalibError):
    """A plan's machine cannot be read or measured, or what is to be planned makes no sense."""


class ReportError(XcalibError):
    """A report cannot be made of what was given, or not written where it was asked for."""


class AblationError(XcalibError):
    """An ablation is unknown or its settings or results cannot be used."""


class XcalibWarning(UserWarning):
    """Something was done in another way than asked (a dense fallback, say); the message names the reason."""
