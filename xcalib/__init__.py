"""xcalib: calibrated block sparse attention for long-context models.

``xcalib.search`` measures a model and finds one threshold per head, ``xcalib.load_profile`` and ``xcalib.apply_profile`` use the
result, ``xcalib.evaluate`` tells what it costs. Everything is imported on first use, so ``import xcalib`` is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xcalib import search
    from xcalib.evaluation import Evaluation, evaluate
    from xcalib.models.loading import load_model
    from xcalib.profile import Profile, load_profile, save_profile
    from xcalib.runtime import apply_profile

__all__ = [
    "Evaluation",
    "Profile",
    "apply_profile",
    "evaluate",
    "load_model",
    "load_profile",
    "save_profile",
    "search",
]
__version__ = "0.1.0"

_HOMES = {
    "Evaluation": "xcalib.evaluation",
    "Profile": "xcalib.profile",
    "apply_profile": "xcalib.runtime",
    "evaluate": "xcalib.evaluation",
    "load_model": "xcalib.models.loading",
    "load_profile": "xcalib.profile",
    "save_profile": "xcalib.profile",
}


def __getattr__(name: str) -> Any:
    if name == "search":  # a package that can be called: xcalib.search(model, data, target=...)
        return import_module("xcalib.search")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'xcalib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
