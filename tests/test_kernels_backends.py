"""Which backend serves: by device, by name and by environment; fallbacks are said once, with their reason."""

import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from xcalib.errors import XcalibWarning
from xcalib.kernels import backends, xattention
from xcalib.kernels.backends import resolve

pytest.importorskip("triton")

TENSOR = torch.zeros(1, 1, 8, 32)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("XCALIB_BACKEND", raising=False)
    for cached in (backends._warn_once, backends._has_triton, backends._too_old):
        cached.cache_clear()
    yield
    for cached in (backends._warn_once, backends._has_triton, backends._too_old):
        cached.cache_clear()


def test_the_cpu_takes_the_reference_unless_triton_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(None, TENSOR) == "reference"
    assert resolve("reference", TENSOR) == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve(None, TENSOR) == "triton"
    assert resolve("reference", TENSOR) == "reference"


def test_the_environment_changes_what_none_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("XCALIB_BACKEND", "reference")
    assert resolve(None, TENSOR) == "reference"
    assert resolve("triton", TENSOR) == "triton"
    monkeypatch.setenv("XCALIB_BACKEND", "cuda")
    with pytest.raises(ValueError, match="XCALIB_BACKEND is 'cuda', allowed are 'reference' and 'triton'"):
        resolve(None, TENSOR)


def test_triton_by_name_is_served_or_refused() -> None:
    with pytest.raises(ValueError, match="backend is 'triton', but the tensors are on cpu: Triton needs a CUDA device"):
        resolve("triton", TENSOR)
    with pytest.raises(ValueError, match="backend is 'tpu', allowed are None, 'reference' and 'triton'"):
        resolve("tpu", TENSOR)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (TENSOR.bfloat16(), r"Triton's interpreter computes wrongly in torch\.bfloat16"),
        (TENSOR.clone().requires_grad_(), "gradients are wanted"),
    ],
    ids=["bf16", "gradients"],
)
def test_a_fallback_is_said_once(tensor: torch.Tensor, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=reason):
        resolve("triton", tensor)
    with pytest.warns(XcalibWarning, match=f"the reference kernels .* instead of Triton: .*{reason}") as said:
        assert resolve(None, tensor) == "reference"
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(None, tensor) == "reference"


def test_without_triton_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(XcalibWarning, match="the package 'triton' is not installed"):
        assert resolve(None, TENSOR) == "reference"


def test_an_old_gpu_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    said = backends._too_old(torch.device("cuda", 0))
    assert said == "this GPU has compute capability 7.5, the kernels need 8.0 or higher"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backends._too_old.cache_clear()
    assert backends._too_old(torch.device("cuda", 0)) is None


def test_fp8_scores_are_not_silently_something_else() -> None:
    query = torch.randn(1, 2, 200, 64)
    with pytest.raises(ValueError, match="precision is 'fp8', but the reference backend serves this call"):
        xattention(query, query, query, 0.8, precision="fp8")
    with pytest.raises(ValueError, match="precision is 'fp4', allowed are 'native' and 'fp8'"):
        xattention(query, query, query, 0.8, precision="fp4")  # type: ignore[arg-type]


def test_the_package_loads_without_triton() -> None:
    import subprocess

    code = "import sys, xcalib.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
