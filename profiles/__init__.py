"""Profiles that ship with xcalib, each with its evidence: ``xcalib.load_profile("smollm2-135m")``, ``xcalib profiles``.

Only names and bytes: what a file holds is :mod:`xcalib.profile`'s.
"""

from importlib.resources import files

__all__ = ["names", "read"]

_SUFFIX = ".yaml"


def names() -> tuple[str, ...]:
    """The shipped profiles by name, in alphabetical order."""
    found = (entry.name for entry in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX)))


def read(name: str) -> bytes:
    """The file of a shipped profile; KeyError where there is none of this name."""
    if name not in names():
        raise KeyError(name)
    return files(__name__).joinpath(name + _SUFFIX).read_bytes()
