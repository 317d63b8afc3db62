"""Serve a model by a profile: ``apply_profile(model, profile)``.

Light to import: torch and transformers come when it is called, and nothing of the search ever does.
"""

import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any

from xcalib.errors import XcalibWarning

if TYPE_CHECKING:
    from xcalib.kernels.api import Backend
    from xcalib.models.sparse import SparseAttention, SparsePlan
    from xcalib.profile import OperatingPoint, Profile

__all__ = ["Handle", "apply_profile", "check_fits", "sparse_plan"]


def apply_profile(
    model: Any,
    profile: "Profile",
    point: str | None = None,
    *,
    force: bool = False,
    backend: "Backend | None" = None,
    min_length: int | None = None,
) -> "Handle":
    """Make a model prefill by a profile.

    Plain causal prefill runs block sparse with the thresholds of its layer, heads and length; everything else
    (decoding, padded batches, sliding windows, ...) runs as the model's own attention did before, and ``Handle.stats``
    counts why. Call the model under ``torch.no_grad()`` or ``torch.inference_mode()``: the sparse kernels have no
    gradients, so where some are wanted attention stays dense. A point that its profile marks as unverified (no held-out
    figures, or figures that miss its target) gives one :class:`~xcalib.errors.XcalibWarning` for each handle.

    Args:
        model: a transformers causal language model, the one that the profile was made for.
        profile: from :func:`xcalib.load_profile`.
        point: name of an operating point, default the profile's.
        force: apply it although the model's config differs, as long as its shape does not.
        backend: of the kernels, ``"reference"`` or ``"triton"``; None for the fastest that exists for the device.
        min_length: keys, in tokens, below which prefill stays dense; None for those with which dense attention was measured
            to be faster on the GPU at hand (on the CPU, where nothing is faster, 0).

    Returns:
        The handle; the model stays patched until its ``remove()`` is called.

    Raises:
        ModelError: the model is not the profile's, is patched already, or cannot be patched.
        ProfileError: no such operating point.
    """
    from xcalib.models.sparse import SparseAttention

    check_fits(model, profile, force=force)
    chosen = profile.point(point)
    plan = sparse_plan(profile, chosen.name)
    _warn_unverified(chosen)
    attention = SparseAttention(model, plan, backend=backend, min_length=min_length)
    return Handle(attention, profile, chosen.name)


class Handle:
    """A model under a profile: ``with apply_profile(model, profile): ...``, or ``remove()`` at the end.

    Attributes:
        profile: the profile.
        point: name of the operating point in use.
    """

    def __init__(self, attention: "SparseAttention", profile: "Profile", point: str) -> None:
        self.profile = profile
        self.point = point
        self._attention = attention
        self._seen = {point}  # an unverified point is warned of once

    def use(self, point: str | None = None) -> None:
        """Go on with another operating point, None for the profile's default; ProfileError if there is no such."""
        chosen = self.profile.point(point)
        if chosen.name not in self._seen:
            self._seen.add(chosen.name)
            _warn_unverified(chosen)
        self._attention.use(sparse_plan(self.profile, chosen.name))
        self.point = chosen.name

    def stats(self) -> dict[str, Any]:
        """Calls and densities so far: see :meth:`xcalib.models.sparse.SparseAttention.stats`."""
        return self._attention.stats()

    def reset_stats(self) -> None:
        """Forget all counts."""
        self._attention.reset_stats()

    def remove(self) -> None:
        """Give the model its own attention back; the second time nothing happens."""
        self._attention.remove()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _warn_unverified(point: "OperatingPoint") -> None:
    if point.verified is not False:
        return
    reason = "it has no held-out figures" if point.heldout is None else "held-out data do not confirm its target"
    message = f"operating point {point.name!r} ({point.target}) is not verified: {reason}"
    warnings.warn(message, XcalibWarning, stacklevel=3)


def sparse_plan(profile: "Profile", point: str | None = None) -> "SparsePlan":
    """What an operating point, None for the default one, tells the kernels; ProfileError if there is no such point."""
    import torch

    from xcalib.models.sparse import SparsePlan

    return SparsePlan(
        stride=profile.method.stride,
        block_size=profile.method.block_size,
        pattern=profile.method.pattern,
        bins=tuple((length.min_length, length.max_length) for length in profile.length_bins),
        thresholds=torch.tensor(profile.point(point).thresholds, dtype=torch.float32),
        dense_layers=frozenset(profile.dense_layers),
        order=profile.method.order,
    )


def check_fits(model: Any, profile: "Profile", *, force: bool = False) -> None:
    """Raise ModelError unless the profile was made for this model: same shape and, without ``force``, same config."""
    from xcalib.models.structure import describe_model

    profile.model.check(describe_model(model), any_config=force, otherwise="force=True applies it all the same")
