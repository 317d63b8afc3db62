"""What is packaged is what is there, it installs without stealing a name, and the sources keep to their rules."""

import ast
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MAPPED = {"kernels": "xcalib.kernels", "profiles": "xcalib.profiles"}
SOURCES = sorted(path for folder in ("xcalib", *MAPPED) for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """``kernels/api.py`` is ``xcalib.kernels.api``."""
    first, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in (MAPPED.get(first, first), *rest) if part != "__init__")


def test_the_list_of_packages_is_complete() -> None:
    folders = [path.parent for folder in ("xcalib", *MAPPED) for path in (ROOT / folder).rglob("__init__.py")]
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(
        module_name(folder / "__init__.py") for folder in folders
    )
    assert PYPROJECT["tool"]["setuptools"]["package-dir"] == {"xcalib": "xcalib"} | {v: k for k, v in MAPPED.items()}


def test_every_source_lies_in_a_package() -> None:
    assert not [path for path in SOURCES if not (path.parent / "__init__.py").is_file()]


def test_version() -> None:
    import xcalib

    assert PYPROJECT["project"]["version"] == xcalib.__version__


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, built from a copy, without network."""
    if find_spec("setuptools") is None or find_spec("setuptools.build_meta") is None:
        pytest.skip("setuptools is not installed")
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("xcalib", *MAPPED):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy)
    build = "from setuptools import build_meta as b; b.build_sdist({out!r}); b.build_wheel({out!r})"
    command = [sys.executable, "-c", build.format(out=str(out))]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return out


def wheel_of(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


def test_wheel_has_one_top_level_name(built: Path) -> None:
    with zipfile.ZipFile(wheel_of(built)) as wheel:
        names = wheel.namelist()
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        assert {name.partition("/")[0] for name in names} == {"xcalib", info}
        assert wheel.read(f"{info}/top_level.txt").decode().split() == ["xcalib"]
        assert "xcalib = xcalib.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def expected_files() -> set[str]:
    """What the wheel must hold, by its name there."""
    sources = {f"{module_name(path.parent / '__init__.py').replace('.', '/')}/{path.name}" for path in SOURCES}
    corpus = (ROOT / "xcalib" / "data" / "corpus").rglob("*")
    data = {str(path.relative_to(ROOT)) for path in corpus if path.suffix in (".txt", ".md", ".json")}
    shipped = {
        f"xcalib/profiles/{path.name}" for path in (ROOT / "profiles").iterdir() if path.suffix in (".yaml", ".md")
    }
    machines = {str(path.relative_to(ROOT)) for path in (ROOT / "xcalib" / "plan" / "machines").glob("*.json")}
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "xcalib" / "report" / "templates").iterdir()}
    return sources | data | shipped | machines | templates | {"xcalib/py.typed", "xcalib/kernels/tuned.json"}


def test_wheel_holds_everything_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(wheel_of(built)) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        licences = {name.rpartition("/licenses/")[2] for name in wheel.namelist() if "/licenses/" in name}
    assert names == expected_files()
    assert {"LICENSE", "xcalib/data/corpus/LICENSE.md"} <= licences
    for part in ("xcalib/kernels/reference.py", "xcalib/profiles/__init__.py", "xcalib/py.typed"):
        assert part in names
    assert sum(name.startswith("xcalib/data/corpus/") and name.endswith(".txt") for name in names) >= 30


def test_sdist_can_be_built_from(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "kernels/api.py", "profiles/__init__.py"} <= names
    assert {str(path.relative_to(ROOT)) for path in SOURCES} <= names
    assert "xcalib/py.typed" in names
    assert any(name.startswith("xcalib/data/corpus/prose/") for name in names)


SMOKE = """
import sys
sys.path.insert(0, sys.argv[1])
import xcalib, xcalib.kernels, xcalib.data
from importlib.resources import files
assert xcalib.__file__.startswith(sys.argv[1]), xcalib.__file__
assert xcalib.kernels.__file__.startswith(sys.argv[1]), xcalib.kernels.__file__
assert files("xcalib.profiles").is_dir()
assert len(xcalib.data.categories()) >= 4
import torch
print(tuple(xcalib.kernels.xattention(*torch.ones(3, 1, 1, 100, 32), 0.5).shape))
"""


def test_installed_wheel_works_from_another_folder(built: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(target)]
    install = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(wheel_of(built))],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    if "No module named pip" in install.stderr:
        pytest.skip("pip is not installed")
    assert install.returncode == 0, install.stderr
    assert not (target / "kernels").exists()
    command = [sys.executable, "-c", SMOKE, str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "(1, 1, 100, 32)\n"


def test_kernels_refuse_to_be_a_top_level_package() -> None:
    command = [sys.executable, "-c", "import kernels"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 1
    assert "this folder is imported as 'xcalib.kernels'" in result.stderr


def test_the_checkout_is_left_clean(built: Path) -> None:
    assert built.is_dir()
    assert not (ROOT / "build").exists()


# --- rules for the sources


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports, inside functions and under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            # "from xcalib import kernels" imports a module, "from xcalib.kernels import xattention" a name
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "xcalib" else {module}
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


# Who may not import whom; `xcalib.x: {y}` forbids xcalib.y in xcalib.x.
FORBIDDEN: dict[str, set[str]] = {
    "xcalib.ablate": {"cli"},
    "xcalib.models": {"collect", "search", "evaluation", "cli", "runtime"},
    "xcalib.data": {"collect", "search", "evaluation", "cli", "runtime", "models", "kernels", "profile"},
    "xcalib.collect": {"search", "evaluation", "runtime", "cli"},
    "xcalib.evaluation": {"search", "cli"},
    "xcalib.search": {"cli"},
    "xcalib.bench": {"search", "collect", "evaluation", "cli", "data", "models", "profile", "runtime"},
    "xcalib.runtime": {"search", "collect", "evaluation", "cli", "data"},
    "xcalib.plan": {"cli"},
    "xcalib.interop": {"search", "collect", "evaluation", "cli", "data", "kernels", "runtime"},
    "xcalib.profile": {"search", "collect", "evaluation", "cli", "data", "models", "kernels", "runtime"},
}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    name = module_name(path)
    for imported in imports(path):
        if within(name, "xcalib.kernels"):
            neutral = within(imported, "xcalib.kernels") or imported in ("xcalib.errors", "xcalib.choices")
            assert not within(imported, "xcalib") or neutral, imported
        for package, others in FORBIDDEN.items():
            if within(name, package):
                assert not [other for other in others if within(imported, f"xcalib.{other}")], imported
        assert name.split(".")[1:2] in (["ablate"], ["cli"]) or not within(imported, "xcalib.ablate"), imported
        if not within(name, "xcalib.cli") and name not in ("xcalib.bench.report", "xcalib.ablate.report"):
            assert imported.partition(".")[0] not in ("typer", "rich", "click"), imported
        assert imported.partition(".")[0] not in (
            "pickle",
            "cPickle",
            "dill",
            "cloudpickle",
            "joblib",
            "marshal",
            "shelve",
        )


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_nothing_runs_foreign_code(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call):
            continue
        called, place = ast.unparse(node.func), f"{path}:{node.lineno}"
        assert called not in ("eval", "exec", "torch.load", "np.load", "numpy.load", "os.system"), place
        assert called not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load"), place
        for keyword in node.keywords:
            dangerous = keyword.arg in ("trust_remote_code", "allow_pickle", "shell")
            assert not (dangerous and ast.unparse(keyword.value) == "True"), f"{place}: {keyword.arg}=True"
