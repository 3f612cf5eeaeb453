"""The layer table: what each room may import of the package, read off the sources with ``ast``."""

import ast
from pathlib import Path

import pytest

import resnet_fused

ROOT = Path(resnet_fused.__file__).parent
PACKAGE = "resnet_fused"

#: Room → the rooms it may import; every room may import itself. A name with a dot is one module,
#: "resnet_fused" the public names.
LAYERS = {
    "files": set(),
    "backends": {
        "functional",
        "files",
    },  # functional: explain() fills in an op's defaults; inside the function
    "ops": {"backends"},
    "functional": {"ops"},
    "nn": {"ops", "backends"},
    "models": set(),
    "testing": set(),
    "convert": {"nn", "ops", "backends"},
    "engine": {"nn", "ops", "backends"},
    "freeze": {"engine", "convert", "nn", "ops", "backends"},
    "step_graph": {"engine", "ops", "backends"},
    "flops": {"models"},
    "roofline": {"backends", "convert", "flops", "models", "ops"},
    "tuning": {"flops", "freeze", "engine", "convert", "nn", "ops", "backends", "testing"},
    "verify": {"freeze", "convert", "ops", "testing"},
    "env": {PACKAGE, "backends"},
    "bench": {
        PACKAGE,
        "models",
        "flops",
        "testing",
        "tuning",
        "env",
        "verify",
        "backends",
        "files",
    },
    "inspection": {PACKAGE, "bench", "engine", "models", "backends"},
    "cli": {"inspection", "bench", "roofline", "env"},
    "__main__": {"cli"},
    "__init__": {
        "functional",
        "backends",
        "convert",
        "freeze",
        "models",
        "flops",
        "step_graph",
        "tuning",
    },
}

#: What one file alone may name.
ALONE = {
    "resnet_fused._C": {"backends/native.py"},
    "torch.library": {"ops/_register.py", "testing.py"},
    "torch.ops.mkldnn": {"backends/onednn.py"},
    "torch.cudnn_convolution_relu": {"backends/cudnn.py"},
    "torch.cudnn_convolution_add_relu": {"backends/cudnn.py"},
}

FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path) -> list[str]:
    """The dotted names of the package's own modules that ``path`` imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [n.removeprefix(f"{PACKAGE}.") for n in names if n.split(".")[0] == PACKAGE]


def inside(name: str, layer: str) -> bool:
    return f"{name}.".startswith(f"{layer}.")


def allowed(name: str, here: str) -> bool:
    if name.split(".")[0] in (here, "_C", "__version__"):
        return True
    return any(inside(name, layer) for layer in LAYERS[here])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path):
    here = room(path)
    assert here in LAYERS, f"{here} has no line in the layer table"
    wrong = [name for name in imports(path) if not allowed(name, here)]
    assert not wrong, f"{here} may import {sorted(LAYERS[here]) or 'nothing'}, not {wrong}"


@pytest.mark.parametrize("here", LAYERS)
def test_every_line_of_the_table_is_used(here):
    names = [name for path in FILES if room(path) == here for name in imports(path)]
    unused = {layer for layer in LAYERS[here] if not any(inside(name, layer) for name in names)}
    assert not unused, f"{here} does not import {sorted(unused)}: take it out of LAYERS"


def test_the_table_has_no_cycle_but_explain_s():
    below: dict[str, set[str]] = {}

    def reach(layer: str, path: tuple[str, ...] = ()) -> set[str]:
        assert layer not in path, " -> ".join((*path, layer))
        if layer not in below:
            uses = {"__init__" if n == PACKAGE else n.split(".")[0] for n in LAYERS[layer]}
            uses -= {"functional"} if layer == "backends" else set()
            below[layer] = uses.union(*(reach(n, (*path, layer)) for n in uses))
        return below[layer]

    for layer in LAYERS:
        reach(layer)


def test_explain_imports_upward_inside_its_function_only():
    module = ast.parse((ROOT / "backends/__init__.py").read_text())
    at_top = [n for n in module.body if isinstance(n, ast.ImportFrom)]
    assert not any(n.module == PACKAGE for n in at_top)


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("name", ALONE)
def test_named_in_one_place(name):
    users = set()
    for path in FILES:
        used = {dotted(n) for n in ast.walk(ast.parse(path.read_text()))}
        used |= {f"{PACKAGE}.{n}" for n in imports(path)}
        if any(inside(u, name) for u in used):
            users.add(str(path.relative_to(ROOT)))
    assert users <= ALONE[name]


def test_every_file_is_short():
    long = {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_no_room_is_called_utils():
    assert not [p for p in FILES if "util" in p.stem]
