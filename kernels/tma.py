"""Whether tensors can be loaded by TMA, Hopper's engine for tiles, and the strides that its descriptors take."""

import torch

from xcalib.kernels.tuning import family, interpreted

__all__ = ["descriptor_strides", "fits_tma"]


def fits_tma(*tensors: torch.Tensor) -> bool:
    """Whether the tensors' GPU has TMA (the interpreter has), and addresses and steps are multiples of 16 bytes, no step 0.

    Args:
        tensors: any shape, the last dimension contiguous; steps of dimensions of size 1 do not matter.
    """
    if not interpreted() and int(family(tensors[0].device).removeprefix("sm")) < 90:
        return False
    for tensor in tensors:
        if tensor.data_ptr() % 16:
            return False
        size = tensor.element_size()
        for count, step in zip(tensor.shape[:-1], tensor.stride(), strict=False):
            if count > 1 and (step <= 0 or step * size % 16):
                return False
    return True


def descriptor_strides(tensor: torch.Tensor) -> list[int]:
    """Strides of all dimensions but the last: those of dimensions of size 1 are arbitrary, and TMA rejects unaligned ones."""
    return [step if size > 1 else 16 for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)]
