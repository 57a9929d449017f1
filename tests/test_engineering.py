"""What keeps the tree readable: layers, style, types, file sizes, mirrored tests."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dist_peft"
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))


def run_tool(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.e2e
@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("mypy",),
        ("tests.support.lint_imports",),
    ],
    ids=["ruff check", "ruff format", "mypy", "import-linter"],
)
def test_tool_is_content(command: tuple[str, ...]) -> None:
    run_tool(*command)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file_and_function_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, "longer than 400 lines: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 80, f"{node.name} has {lines} lines: split it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_has_mirrored_test(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    assert (ROOT / "tests" / relative.parent / f"test_{relative.name}").is_file()


COMMANDS = sorted(p for p in (PACKAGE / "app" / "commands").glob("*.py") if p in SOURCES)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda p: p.stem)
def test_command_is_thin(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 150, "longer than 150 lines: move the work to a module of app"
    modules = [n.module or "" for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)]
    others = [m for m in modules if m.startswith("dist_peft.app.commands")]
    assert not others, "a command imports no other command"


def find_derived_configs(text: str) -> list[str]:
    """Expressions that make a configuration of another one, or bind ``config`` a second time."""
    tree, found = ast.parse(text), list[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            of = ast.unparse(node.args[0]) if node.args else ""
            sections = r"(^|[._])(config|resolved|base|data|train|engine)$"
            derives = called.endswith(("model_copy", "model_construct", "model_validate"))
            replaces = called.endswith("replace") and re.search(sections, of)
            if derives or replaces or called.endswith("RunConfig"):
                found.append(ast.unparse(node))
        if isinstance(node, ast.FunctionDef):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            bound = [a.arg for a in arguments] + [
                n.id
                for n in ast.walk(node)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            ]
            found += [f"{node.name}: {n}" for n in ("config", "resolved") if bound.count(n) > 1]
    return found


def test_configuration_is_resolved_in_one_module() -> None:
    resolving = PACKAGE / "app" / "resolved_config.py"
    for path in sorted((PACKAGE / "app").rglob("*.py")):
        if path != resolving:
            assert find_derived_configs(path.read_text()) == [], path
    assert find_derived_configs(resolving.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "config = config.model_copy(update=update)",
        "config = load_run()",
        "other = replace(setup.config, path=path)",
        "base = dataclasses.replace(config.base, path=path)",
        "run = RunConfig(base=base)",
    ],
)
def test_derived_configurations_are_found(line: str) -> None:
    assert find_derived_configs(f"def run(config: RunConfig) -> None:\n    {line}\n")


@cache
def imports(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports, and ``torch.distributed``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        else:
            continue
        for name in names:
            found.add(name.split(".")[0])
            if name.startswith("torch.distributed"):
                found.add("torch.distributed")
    return found


ALLOWED = {
    "torch.distributed": (
        "core/world",
        "core/collective_errors",
        "core/rendezvous",
        "core/text_exchange",
        "core/flight_recorder",
        "engine/",
        "train/checkpoint",
    ),
    "deepspeed": ("engine/zero", "engine/deepspeed_setup"),
    "transformers": ("model/", "data/chat", "data/tokens", "export/verify", "quickstart/"),
    "bitsandbytes": ("quant/", "train/optimizers", "export/verify"),
    "peft": ("export/verify",),
    "triton": ("quant/device",),
    "liger_kernel": ("engine/liger_kernels",),
}


@pytest.mark.parametrize("library", ALLOWED)
def test_library_stays_in_its_place(library: str) -> None:
    for path in SOURCES:
        relative = str(path.relative_to(PACKAGE))
        if library in imports(path):
            assert relative.startswith(ALLOWED[library]), f"{relative} imports {library}"


PICKLING = {
    "pickle": ("train/checkpoint_reader.py", "train/checkpoint_verify.py"),
    "dill": (),
    "cloudpickle": (),
    "joblib": (),
    "shelve": (),
    "marshal": (),
}
"""Modules that read or write pickles -> files that may import them: the reader of ``.metadata``,
whose unpickler knows the few names that it may contain, and a file that names its errors."""

_OBJECT_COLLECTIVE = re.compile(
    r"^(all_gather|gather|scatter|broadcast|send|recv|reduce_scatter)_object(_list)?$"
)
_MPI_PICKLES = {"bcast", "gather", "allgather", "scatter", "alltoall", "reduce", "allreduce"}


def find_unpickling(text: str) -> list[str]:
    """Code that unpickles what a peer or a file says: collectives of objects, ``torch.load``
    (unless ``weights_only=True``), ``numpy.load`` with pickles, modules of ``PICKLING`` but
    ``pickle``, mpi4py's methods in lower case."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
            found += [n for n in names if n.split(".")[0] in PICKLING and n != "pickle"]
            found += [n for n in names if _OBJECT_COLLECTIVE.search(n)]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        owner, _, name = called.rpartition(".")
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if owner and _OBJECT_COLLECTIVE.search(name) and not owner.startswith("self"):
            found.append(called)
        if called == "torch.load" and options.get("weights_only") != "True":
            found.append(called)
        if options.get("allow_pickle", "False") != "False":
            found.append(called)
        if owner.rpartition(".")[2] in ("comm", "COMM_WORLD") and name in _MPI_PICKLES:
            found.append(called)
        if called in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
            found.append(called)
    return found


@pytest.mark.parametrize(
    "line",
    [
        "dist.all_gather_object(everyone, mine)",
        "dist.broadcast_object_list(told, src=0, group=group)",
        "torch.distributed.gather_object(mine)",
        "from torch.distributed import scatter_object_list",
        "dist.recv_object_list(found)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "comm.bcast(offer, root=0)",
        "pickle.loads(data)",
        "pickle.load(file)",
        "import cloudpickle",
    ],
)
def test_unpickling_is_found(line: str) -> None:
    assert find_unpickling(line)


def test_nothing_is_unpickled() -> None:
    """Neither from a peer nor from a file, but by the one reader that allows a few names."""
    for path in SOURCES:
        relative = path.relative_to(PACKAGE).as_posix()
        assert find_unpickling(path.read_text()) == [], relative
        if "pickle" in imports(path):
            assert relative in PICKLING["pickle"], f"{relative} imports pickle"


def test_launch_imports_app_only() -> None:
    for path in (ROOT / "launch").glob("*.py"):
        own = [n for n in path.read_text().splitlines() if "dist_peft" in n and "import" in n]
        assert all("dist_peft.app" in line for line in own), path


def list_test_module_imports(source: str) -> list[str]:
    """Names ``test_*`` that ``source`` imports, also in code that one of its strings holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [*(getattr(node, "module", None) or "").split(".")]
            names += [part for alias in node.names for part in alias.name.split(".")]
            found += [name for name in names if name.startswith("test_")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += re.findall(r"^\s*(?:from|import) [\w.]*\b(test_\w+)", node.value, re.MULTILINE)
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from tests.app.test_train import run_tree", ["test_train"]),
        ("import tests.app.test_train", ["test_train"]),
        ("from tests.app import (\n    test_train,\n    helpers,\n)", ["test_train"]),
        ("from .test_train import run_tree", ["test_train"]),
        ('code = "import torch\\nfrom tests.app.test_train import x"', ["test_train"]),
        ("from tests.support.runs import tree  # not from test_train", []),
    ],
)
def test_imports_of_test_files_are_found(source: str, expected: list[str]) -> None:
    assert list_test_module_imports(source) == expected


def test_no_import_between_test_files() -> None:
    """Helpers are in ``tests/support/``: a test file can be moved, split or run alone."""
    for path in (ROOT / "tests").rglob("*.py"):
        if path != Path(__file__):
            assert not list_test_module_imports(path.read_text()), path


def list_module_assignments(source: str) -> list[str]:
    """Assignments of ``source`` to attributes of modules that it imports from this package."""
    tree = ast.parse(source)
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dist_peft"):
            modules |= {alias.asname or alias.name for alias in node.names}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            owners = [target.value for target in targets if isinstance(target, ast.Attribute)]
            if any(isinstance(owner, ast.Name) and owner.id in modules for owner in owners):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("outer_units.MIN_UNIT_BYTES = 1024", 1),
        ("outer_units.MIN_UNIT_BYTES += 1", 1),
        ("unit.parameters = []", 0),
        ("with mock.patch.object(outer_units, 'MIN_UNIT_BYTES', 1024): pass", 0),
    ],
)
def test_assignments_to_modules_are_found(line: str, count: int) -> None:
    source = f"from dist_peft.engine import outer_units\n{line}"
    assert len(list_module_assignments(source)) == count


def test_no_test_changes_a_module_for_good() -> None:
    """One that does changes the results of the tests that its process runs later: patch instead."""
    for path in (ROOT / "tests").rglob("*.py"):
        assert not list_module_assignments(path.read_text()), path


def test_no_conflict_marker_is_left() -> None:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    for name in filter(None, files.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".md", ".py", ".toml", ".yaml", ".yml", ".cff", ".sh", ".txt"):
            lines = path.read_text().splitlines()
            assert not any(line.startswith(("<<<<<<< ", ">>>>>>> ")) for line in lines), name
