"""Tensor-parallel models: each rank's attention has some of the heads, and numbers them from 0.

Read in transformers 5.23: with a tensor-parallel plan the query, key and value projections are sharded by rows and the output
projection by columns, so that rank r of n has query heads r * h / n to (r + 1) * h / n, and the same share of the KV heads.
Hidden states, logits and what the output projection answers (after the sum over ranks) are whole on every rank.
"""

from dataclasses import dataclass
from typing import Any

import torch

from xcalib.errors import ModelError

__all__ = ["HeadShards", "head_shards", "local_tensor"]


@dataclass(frozen=True)
class HeadShards:
    """Which heads this process has.

    Attributes:
        heads: query heads of the model.
        rank: of this process among those that share the model.
        size: number of these processes.
        group: their process group; None for one process.
    """

    heads: int
    rank: int = 0
    size: int = 1
    group: Any = None

    def own(self, values: torch.Tensor, local: int, dim: int = 0) -> torch.Tensor:
        """The part of values of all heads that belongs to the ``local`` heads of an attention call on this rank."""
        return values if local == self.heads else values.narrow(dim, self.rank * local, local)

    def all(self, values: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Values of all heads in the model's order, from those of this rank's; every rank has to call it."""
        if values.shape[dim] == self.heads:
            return values
        self.check(values.shape[dim])
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(self.size)]
        torch.distributed.all_gather(parts, values.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def fits(self, local: int) -> bool:
        """Whether an attention call with this many query heads is the whole layer or this rank's share of it."""
        return local in (self.heads, self.heads / self.size)

    def check(self, local: int) -> None:
        """Raise ModelError unless :meth:`fits`."""
        if not self.fits(local):
            raise ModelError(
                f"a layer has {local} query heads on rank {self.rank}, expected {self.heads} / {self.size}"
            )


def head_shards(model: Any) -> HeadShards:
    """How a model's heads lie on the ranks; one rank with all of them for a model that is not tensor parallel."""
    heads = int(model.config.get_text_config().num_attention_heads)
    mesh = getattr(model, "_device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    if mesh is None or ("tp" not in names and mesh.ndim != 1):
        return HeadShards(heads)
    part = mesh["tp"] if "tp" in names else mesh
    if part.size() == 1:
        return HeadShards(heads)
    return HeadShards(heads, part.get_local_rank(), part.size(), part.get_group())


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a distributed tensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
