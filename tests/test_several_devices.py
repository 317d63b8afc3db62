"""A model on several devices that do not exist: tensors say that they are on one, compute on the CPU, and refuse to meet those of
another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from xcalib.collect import CollectSettings, collect
from xcalib.collect.curves import ARRAYS
from xcalib.evaluation import evaluate_plans
from xcalib.models.placement import run_devices
from xcalib.models.sparse import SparsePlan

Build = Callable[..., Any]
SETTINGS = CollectSettings(
    stride=16,
    block_size=64,
    grid=(0.0, 0.5, 1.0),
    gain_samples=1,
    gain_density=0.6,
    joint_densities=(0.6, 0.7),
    gain_every=5,
    measures=("mass",),
)

KIND = "lazy"  # a kind that torch knows, with a device guard that does nothing
CPU = torch.device("cpu")


class _Placed(torch.Tensor):
    """A CPU tensor that says it is elsewhere."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> "_Placed":
        with torch.inference_mode(
            False
        ):  # torch takes no view, in inference, of what was made in inference and wrapped
            made = torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device=device,
            )  # fmt: skip
        made.inner = inner.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class FakeDevices(TorchDispatchMode):
    """While it is on, ``torch.device("lazy:0")``, ``lazy:1`` and so on can be used; what mixes them raises RuntimeError."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # in inference mode functions arrive that torch otherwise takes apart before
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                found = func.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    moves = func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.to)
    where = {tensor.device for tensor in tensors if tensor.ndim} or {tensor.device for tensor in tensors}
    if len(where) > 1 and not moves:
        raise RuntimeError(f"{func}: expected all tensors on one device, found {sorted(map(str, where))}")
    device = tensors[0].device if tensors and moves else next(iter(where), CPU)
    asked = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.device)]
    if func is torch.ops.aten.to.other:
        asked = [args[1].device]
    device = asked[0] if asked else device
    inner = tree_map(_without_place, (args, dict(kwargs)))
    found = func(*inner[0], **inner[1])
    if device.type != KIND:
        return found
    if func._schema.name.endswith("_"):  # in place
        return args[0]
    return tree_map(lambda value: _Placed(value, device) if isinstance(value, torch.Tensor) else value, found)


def _without_place(value: Any) -> Any:
    if isinstance(value, torch.device):
        return CPU
    return value.inner if isinstance(value, _Placed) else value


def spread_over(model: torch.nn.Module, places: dict[str, int]) -> None:
    """Put modules of a model on devices by number, and let each take its inputs there, as accelerate's hooks do."""
    for name, number in places.items():
        device = torch.device(KIND, number)
        module = model.get_submodule(name)
        for part in module.modules():
            for key, value in [*part._parameters.items(), *part._buffers.items()]:
                if value is not None:
                    placed = _Placed(value.detach(), device)
                    keep = part._parameters if key in part._parameters else part._buffers
                    keep[key] = torch.nn.Parameter(placed, requires_grad=False) if keep is part._parameters else placed

        def forward(*args: Any, own: Any = module.forward, device: torch.device = device, **kwargs: Any) -> Any:
            args, kwargs = tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, (args, kwargs))
            return own(*args, **kwargs)

        module.forward = forward


def test_each_tensor_on_its_own(tiny_model: Build, random_samples: Build, tmp_path: Path) -> None:
    """Fake devices refuse to meet: embeddings, layers, norm and head each have one."""
    samples = random_samples([200, 140])
    wanted = collect(tiny_model(), samples, tmp_path / "one", settings=SETTINGS)
    model = tiny_model()
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 1, "model.layers.1": 2}
    with FakeDevices():
        spread_over(model, places | {"model.norm": 3, "lm_head": 4})
        assert len(run_devices(model)) == 5
        for offload in (False, True):
            found = collect(model, samples, tmp_path / str(offload), settings=SETTINGS, offload=offload)
            for name in (*ARRAYS, "mass"):
                # functions that the fake takes apart round differently
                assert np.allclose(getattr(found, name), getattr(wanted, name), rtol=1e-4, equal_nan=True), name
        plan = SparsePlan(16, 64, "antidiagonal", ((0, None),), torch.zeros((1, 2, 4)))
        assert evaluate_plans(model, samples, {"none": plan}, tokenizer=None).plans[0].kl > 0


def test_the_fake_refuses_a_mixture() -> None:
    with FakeDevices():
        one = torch.ones(3, device="lazy:0")
        assert (one + 1).device == torch.device("lazy:0")
        assert (one + one.to("lazy:0")).cpu().tolist() == [2, 2, 2]
        for other in (torch.ones(3, device="lazy:1"), torch.ones(3)):
            with pytest.raises(RuntimeError, match="expected all tensors on one device"):
                one + other
