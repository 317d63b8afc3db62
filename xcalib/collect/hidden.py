"""Hidden states on disk, between one layer and the next."""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from xcalib.collect.curves import write_atomically
from xcalib.errors import CurvesError

__all__ = ["HiddenStates"]


class HiddenStates:
    """A folder of hidden states ``(1, length, hidden)``, each with the number of blocks that it has gone through.

    Every state is replaced as a whole, so that a killed run goes on with the last block that it finished.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, room: int) -> None:
        """Make the folder.

        Args:
            room: bytes that will be written beside what is there.

        Raises:
            CurvesError: it cannot be made, or the disk has less room.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            raise CurvesError(f"{self._folder}: cannot be made: {error.strerror or error}") from error
        held = sum(file.stat().st_size for file in self._folder.glob("*.safetensors"))
        if room > free + held:
            raise CurvesError(
                f"{self._folder}: hidden states take {room / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free: "
                "choose another folder, shorter samples or fewer --gain-samples"
            )

    def layer(self, name: str) -> int | None:
        """Blocks that a state has gone through; None where there is none (a damaged file counts as none)."""
        try:
            with safe_open(self._path(name), framework="pt") as file:
                return int((file.metadata() or {})["layer"])
        except (OSError, SafetensorError, LookupError, ValueError):
            return None

    def load(self, name: str, device: torch.device) -> torch.Tensor | None:
        """A state in the dtype that it had; None where there is none."""
        try:
            with safe_open(self._path(name), framework="pt") as file:
                return file.get_tensor("hidden").to(device)
        except (OSError, SafetensorError):
            return None

    def save(self, name: str, layer: int, hidden: torch.Tensor) -> None:
        """Keep a state that has gone through ``layer`` blocks, in the place of the one before."""
        write_atomically(self._path(name), save({"hidden": hidden.cpu().contiguous()}, {"layer": str(layer)}))

    def drop(self, name: str) -> None:
        """Forget a state."""
        self._path(name).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"
