"""The rules that hold the package together: one-way imports, a light core, a cheap start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "maskgit"
# Later layers may use earlier ones.
LAYERS = ["core", "data", "evaluation", "training", "apps"]
CORE_LIBRARIES = {"torch", "numpy", "PIL", "safetensors", "msgpack", "tqdm"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        yield path, "apps" if parts[0] == "__main__.py" else parts[0] if parts[0] in LAYERS else "core"


def imports(path: Path, *, top_level: bool) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(("path", "layer"), list(modules()), ids=lambda value: getattr(value, "stem", value))
def test_dependencies_go_one_way(path, layer):
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    for name in imports(path, top_level=False):
        if name.startswith("maskgit."):
            other = name.split(".")[1]
            other = other if other in LAYERS else "core"
            assert other in allowed, f"{path.name} ({layer}) imports {name} ({other})"


@pytest.mark.parametrize(("path", "layer"), list(modules()), ids=lambda value: getattr(value, "stem", value))
def test_the_core_needs_few_libraries(path, layer):
    if layer == "apps":
        return
    for name in imports(path, top_level=True):
        library = name.split(".")[0]
        assert library in CORE_LIBRARIES | {"maskgit"} | sys.stdlib_module_names, (
            f"{path.name} imports {library}"
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
