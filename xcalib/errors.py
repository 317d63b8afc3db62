"""Every error that xcalib raises on purpose; the command line prints its one line and exits with code 2.

Bad tensor arguments to :mod:`xcalib.kernels` are plain :class:`ValueError`, as in torch.
"""

__all__ = [
    "BenchError",
    "CurvesError",
    "DataError",
    "ModelError",
    "ProfileError",
    "TargetError",
    "XcalibError",
    "XcalibWarning",
]


class XcalibError(Exception):
    """Base class. The message is one line: what is wrong, where, and what to do."""


class DataError(XcalibError):
    """Calibration or evaluation data is missing, malformed or too short."""


class ModelError(XcalibError):
    """The model cannot be loaded, measured or patched, or is not the one a profile was made for."""


class CurvesError(XcalibError):
    """A curves folder is missing, incomplete, damaged or was made with other settings."""


class TargetError(XcalibError):
    """A search target is malformed or cannot be reached with these curves."""


class ProfileError(XcalibError):
    """A profile file is not valid; the message names the line or the key."""


class BenchError(XcalibError):
    """A bench suite is malformed, or this machine cannot run it."""


class XcalibWarning(UserWarning):
    """Something was done in another way than asked (a dense fallback, say); the message names the reason."""
