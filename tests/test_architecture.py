"""The rules that hold the package together: layers, no circles, a light core, a cheap start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "maskgit"
# Bottom first: a room (a file at the top of the package, or a folder) may use the rooms of the layers before its own
# and, except among the parts, those of its own. CONTRIBUTING.md says what lives in each.
LAYERS = {
    "ground": ("errors", "foundation"),
    "parts": ("images", "networks", "sampler"),
    "data": ("data",),
    "model": ("config", "results", "model", "checkpoints"),
    "doing": ("engine", "editing", "explain"),
    "face": ("__init__", "pipeline", "convert", "diffusers", "export", "hub", "regions"),
    "judging": ("evaluation",),
    "making": ("training",),
    "apps": ("apps", "__main__"),
}
LAYER_OF = {room: layer for layer, rooms in LAYERS.items() for room in rooms}
HEIGHT = {layer: height for height, layer in enumerate(LAYERS)}
CORE_LIBRARIES = {"torch", "numpy", "PIL", "safetensors", "msgpack", "tqdm"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: Path, *, top_level: bool) -> set[str]:
    """Return the modules that a file imports; late imports and those for type checking count unless `top_level`."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else str(node.module))
    return found


GRAPH = {name: imports(path, top_level=False) & MODULES.keys() - {name} for name, path in MODULES.items()}


def test_every_room_stands_in_a_layer():
    assert {room_of(name) for name in MODULES} == LAYER_OF.keys()


@pytest.mark.parametrize("module", MODULES)
def test_dependencies_go_one_way(module):
    layer = LAYER_OF[room_of(module)]
    for other in GRAPH[module]:
        other_layer = LAYER_OF[room_of(other)]
        assert HEIGHT[other_layer] <= HEIGHT[layer], f"{module} ({layer}) imports {other} ({other_layer})"
        if layer == other_layer == "parts":
            assert room_of(module) == room_of(other), (
                f"{module} imports {other}: parts know nothing of each other"
            )


def test_no_circles():
    left = {name: set(used) for name, used in GRAPH.items()}
    while free := {name for name, used in left.items() if not used & left.keys()}:
        for name in free:
            del left[name]
    assert not left, f"these files import one another in a circle, or import one that does: {sorted(left)}"


@pytest.mark.parametrize("module", [name for name in MODULES if LAYER_OF[room_of(name)] != "apps"])
def test_the_core_needs_few_libraries(module):
    for name in imports(MODULES[module], top_level=True):
        library = name.split(".")[0]
        assert library in CORE_LIBRARIES | {"maskgit"} | sys.stdlib_module_names, (
            f"{module} imports {library}"
        )


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_import_loads_nothing_heavy():
    heavy = {"torch", "numpy", "PIL", "tyro", "huggingface_hub", "msgpack"}
    assert not heavy & loaded_by("import maskgit")


def test_the_command_line_helps_without_torch():
    code = "from maskgit.apps.cli.commands import main\ntry: main(['generate', '--help'])\nexcept SystemExit: pass"
    assert not {"torch", "numpy", "huggingface_hub"} & loaded_by(code)


def test_public_names_are_there():
    import maskgit

    for name in maskgit.__all__:
        assert getattr(maskgit, name) is not None
    assert set(maskgit.__all__) <= set(dir(maskgit))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        maskgit.nonsense  # noqa: B018
