"""What a user is told to do."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

import maskgit
from maskgit.apps.cli import commands as cli

PACKAGE = Path(maskgit.__file__).parent
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        ("serve", "fastapi", "serve"),
        ("serve", "prometheus_client", "serve"),
        ("app", "fastapi", "serve"),
        ("export cifar10 --out out", "onnx", "export"),
    ],
)
def test_missing_packages_are_named_with_a_cure_that_works(
    command, module, extra, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    for name in [
        name for name in sys.modules if name.startswith(("maskgit.apps.serving.", "maskgit.apps.webui."))
    ]:
        monkeypatch.delitem(sys.modules, name)
        # `from package import module` takes what the package holds before it imports.
        package, _, child = name.rpartition(".")
        if hasattr(sys.modules[package], child):
            monkeypatch.delattr(sys.modules[package], child)
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(command.split()) == 2
    told = capsys.readouterr().err
    assert module in told
    assert f"in a clone of the repository, run pip install -c constraints.txt '.[{extra}]'" in told


def test_extras_that_are_named_exist_and_no_registry_is_needed():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    sources = {path: path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}
    named = [extra for text in sources.values() for extra in re.findall(r"install_extra\('?\"?(\w+)", text)]
    assert len(named) >= 7
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    sources |= {path: path.read_text("utf-8") for path in documents}
    for path, text in sources.items():
        assert not re.search(r"pip install ['\"]?maskgit-torch", text), path
        named += re.findall(r"pip install [^\n]*'\.\[(\w+)\]'", text)
    assert {name for name in named if name != "extra"} <= extras.keys()
