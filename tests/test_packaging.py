"""What an installation, a checkout and a wheel must be, each seen from a fresh process."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("dejavu_compile", "passes", "kernels")


def run_python(code: str, *arguments: str, cwd: Path, **environment: str) -> str:
    """Run `code` as `python -c`, which puts `cwd` first on the path, as an interactive session does."""
    inherited = {name: value for name, value in os.environ.items() if "PYTHON" not in name}
    done = subprocess.run(
        [sys.executable, *arguments, "-c", code],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def sources(*places: str) -> Iterator[Path]:
    """The Python files of folders, and files that are named themselves."""
    for place in (ROOT / name for name in places):
        yield from [place] if place.is_file() else sorted(place.rglob("*.py"))


# --- the name `kernels`, which Hugging Face's package has too (and transformers imports it) ---

USE_BOTH = """
import sys
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available
import dejavu_compile
import torch

assert not any(name.startswith("kernels.") and hasattr(module, "gathered_rows")
               for name, module in sys.modules.items()), "our folder was loaded as `kernels`"
assert not hasattr(sys.modules.get("kernels"), "gathered_rows"), "our folder was loaded as `kernels`"
assert torch.ops.dejavu.gathered_rows
print(is_kernels_available())
"""


@pytest.fixture(scope="module")
def site_without_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This interpreter's site-packages by links, but for Hugging Face's `kernels`."""
    site = tmp_path_factory.mktemp("site")
    for folder in (Path(entry) for entry in reversed(sys.path)):
        if folder.name not in ("site-packages", "dist-packages"):
            continue
        for entry in folder.iterdir():
            if not re.match(r"kernels(-[\d.]+\.dist-info)?$", entry.name):
                link = site / entry.name
                link.unlink(missing_ok=True)
                link.symlink_to(entry)
    return site


@pytest.mark.parametrize("where", ["in the checkout", "elsewhere"])
def test_transformers_imports_with_hugging_face_kernels(where, tmp_path):
    try:
        version("kernels")
    except PackageNotFoundError:
        pytest.skip("Hugging Face's kernels package isn't installed")
    cwd = ROOT if where == "in the checkout" else tmp_path
    assert run_python(USE_BOTH, cwd=cwd).split() == ["True"]


@pytest.mark.parametrize("where", ["in the checkout", "elsewhere"])
def test_transformers_imports_without_hugging_face_kernels(where, tmp_path, site_without_kernels):
    cwd = ROOT if where == "in the checkout" else tmp_path
    # -S leaves out the real site-packages; addsitedir also runs the editable installation's hook
    prelude = f"import site; site.addsitedir({str(site_without_kernels)!r})"
    assert run_python(f"{prelude}\n{USE_BOTH}", "-S", cwd=cwd).split() == ["False"]


# --- the backend, found by name ---


def test_backends_are_found_by_name_alone(tmp_path):
    code = """
import sys
import torch

assert {"dejavu", "dejavu_eager"} <= set(torch._dynamo.list_backends())
assert "dejavu_compile" not in sys.modules, "listing the backends imported the package"
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
x = torch.randn(1, 8)
with torch.no_grad():
    torch.testing.assert_close(torch.compile(model, backend="dejavu_eager")(x), model(x))
assert "dejavu_compile.backend" in sys.modules
"""
    run_python(code, cwd=tmp_path)


# --- the wheel ---


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools writes beside its sources."""
    copy = tmp_path_factory.mktemp("wheel") / "checkout"
    copy.mkdir()
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    code = "from setuptools import build_meta; print('wheel:', build_meta.build_wheel('dist'))"
    name = run_python(code, cwd=copy).rpartition("wheel:")[2].strip()
    return copy / "dist" / name


def test_wheel_holds_the_three_folders_as_one_package(wheel):
    inside = {"passes": "dejavu_compile/passes", "kernels": "dejavu_compile/kernels"}
    expected = set()
    for path in sources(*PACKAGES):
        folder, _, rest = path.relative_to(ROOT).as_posix().partition("/")
        expected.add(f"{inside.get(folder, folder)}/{rest}")
    expected.add("dejavu_compile/kernels/cpu.cpp")  # built on the first call
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == expected


def test_wheel_imports_by_its_own_files(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = """
import dejavu_compile, dejavu_compile.kernels, dejavu_compile.passes
print(dejavu_compile.__file__, dejavu_compile.kernels.__file__, dejavu_compile.passes.__file__)
"""
    files = run_python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path)).split()
    assert [Path(file).relative_to(tmp_path).parent.as_posix() for file in files] == [
        "dejavu_compile",
        "dejavu_compile/kernels",
        "dejavu_compile/passes",
    ]


# --- the sources ---


def test_private_torch_imports_stay_in_compat():
    """The rule is the pre-commit hook's."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    hook = hooks["private-torch-imports"]
    rule = re.compile(hook["entry"], re.MULTILINE)
    assert rule.search("    from torch._dynamo.source import GlobalSource")
    assert rule.search("import torch.fx._utils")
    assert not rule.search("from torch import fx")
    found = []
    for path in sources(*PACKAGES):
        name = path.relative_to(ROOT).as_posix()
        assert re.search(hook["files"], name)
        if not re.search(hook["exclude"], name) and rule.search(path.read_text()):
            found.append(name)
    assert found == []


def imported_modules(path: Path) -> Iterator[str]:
    """The modules that a file imports, absolute; `from package import name` gives `package.name`."""
    package = path.relative_to(ROOT).parent.parts
    if package[0] != "dejavu_compile":
        package = ("dejavu_compile", *package)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        ("kernels", ("kernels", "_compat")),  # which imports nothing of ours
        ("passes", ("passes", "kernels", "_compat", "errors")),
        ("dejavu_compile/_compat.py", ()),
        ("dejavu_compile", None),  # may import all of itself
    ],
)
def test_imports_point_one_way(place, allowed):
    found = []
    for path in sources(place):
        for module in imported_modules(path):
            top, *rest = module.split(".")
            wrong = top in ("passes", "kernels")  # top-level: only works inside a checkout
            if top == "dejavu_compile" and allowed is not None:
                wrong = not rest or rest[0] not in allowed
            if wrong:
                found.append(f"{path.relative_to(ROOT)} imports {module}")
    assert found == []


def words(path: Path) -> set[str]:
    """The words of a file's identifiers and strings, without its comments and docstrings."""
    tree = ast.parse(path.read_text())
    scopes = (ast.Module, ast.FunctionDef, ast.ClassDef)
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, scopes) and node.body and isinstance(node.body[0], ast.Expr)
    }
    found = set()
    for node in ast.walk(tree):
        texts = [getattr(node, key, None) for key in ("id", "attr", "arg", "name", "value")]
        if node not in docstrings:
            for text in texts:
                if isinstance(text, str):
                    found |= set(re.findall(r"[a-z0-9]+", text.lower()))
                    found.add(re.sub(r"[^a-z0-9]", "", text.lower()))
    return found


def test_no_code_knows_an_architecture():
    """Neither a model type of transformers nor its class; only the shapes that are benchmarked and the demo."""
    names = pytest.importorskip("transformers.models.auto.modeling_auto")
    mapping = names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    classes = [re.split("ForCausalLM|LMHead|Model", str(name))[0] for name in mapping.values()]
    known = {re.sub(r"[^a-z0-9]", "", name.lower()) for name in (*mapping, *classes)}
    assert {"opt", "llama", "gptneox", "phi3"} <= known
    known -= {"codegen", "git"}  # what torch calls the making of code, and what names a commit
    exempt = {"shapes.py", "demo.py"}
    found = {p.name: words(p) & known for p in sources(*PACKAGES) if p.name not in exempt}
    assert not any(found.values()), found


# An absolute path below a folder where people and build machines keep checkouts
MACHINE_PATH = re.compile(r"(?<![\w.~/}-])/(?:work|root|home|Users|mnt|workspace|opt)/\w")
GENERATED = {"build", "dist", "out", "__pycache__"}


def test_no_file_names_a_path_of_one_machine():
    found = []
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in GENERATED
            and not name.endswith(".egg-info")
            and (name == ".ci" or not name.startswith("."))
        ]
        for path in (Path(folder, name) for name in names):
            try:
                text = path.read_text()
            except UnicodeDecodeError:
                continue
            if match := MACHINE_PATH.search(text):
                found.append(f"{path.relative_to(ROOT)}: {match.group()}")
    assert found == []
