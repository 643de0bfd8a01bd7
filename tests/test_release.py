"""What is released: the wheel and the source archive, and the wheel installed where there is nothing else of ours."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
# What need not be copied to be built from, and what a build must not take along.
LEFT_OUT = (".git", ".venv", "out", "build", "dist", "runs", "data", "*.egg-info", "__pycache__", ".*_cache")
# Tests that need no file of the repository but those beside them.
TESTS = (
    "test_bundled_model.py",
    "test_classes.py",
    "test_convert.py",
    "test_noise.py",
    "test_plans.py",
    "test_regions.py",
    "test_schedules.py",
    "test_vocabulary.py",
)
# Commands of the README that fetch, or need photographs and hours.
ELSEWHERE = ("imagenet", "photos")


def run(command: list[str], cwd: Path, **environment: str) -> str:
    """Run a program that knows nothing of this checkout, and return what it prints."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=given | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The folder of the two archives, the wheel made from the other one."""
    folder = tmp_path_factory.mktemp("release")
    ignore = shutil.ignore_patterns(*LEFT_OUT)

    def left_out(path: str, names: list[str]) -> set[str]:
        # The package has folders of such names, too.
        return ignore(path, names) - ({"data", "runs"} if path != str(ROOT) else set())

    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    # Needs no network: setuptools is here.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    run([*command, str(folder / "source")], folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def python(dist, tmp_path_factory) -> Path:
    """The Python of an environment that has the wheel, and beside it only what it depends on."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
    python = folder / "bin" / "python"
    wheel = next(dist.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install"]
    run([*pip, "--no-deps", "--no-index", str(wheel)], folder)
    own = Path(
        run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    )
    # Dependencies come after it. Path files in their folder, such as an editable install's, are not read.
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def package_files() -> set[str]:
    """The files of the package, as paths from `src`."""
    found = (path for path in (ROOT / "src" / "maskgit").rglob("*") if path.is_file())
    return {path.relative_to(ROOT / "src").as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        names = set(archive.namelist())
        metadata = {PurePosixPath(name) for name in names if ".dist-info/" in name}
        kept = {path.relative_to(path.parts[0]).as_posix(): str(path) for path in metadata}
        assert names - {str(path) for path in metadata} == package_files()
        assert kept.keys() == {
            "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt",
        }  # fmt: skip
        assert archive.read(kept["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()
        assert b"maskgit = maskgit.apps.cli:main" in archive.read(kept["entry_points.txt"])
        about = archive.read(kept["METADATA"]).decode()
    assert "License-Expression: Apache-2.0" in about
    assert "maskgit/py.typed" in names
    assert sum(name.endswith("model.safetensors") for name in names) == 2


def test_the_source_archive_holds_what_a_wheel_is_made_of(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        members = (PurePosixPath(member.name) for member in archive.getmembers() if member.isfile())
        names = {path.relative_to(path.parts[0]).as_posix() for path in members}
    about = {name for name in names if not name.startswith("src/")}
    assert about == {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    package = {name.removeprefix("src/") for name in names - about if ".egg-info/" not in name}
    assert package == package_files()


def test_the_installed_package_is_the_wheels(python, tmp_path):
    code = "import maskgit; print(maskgit.__file__, maskgit.__version__)"
    place, version = run([str(python), "-c", code], tmp_path).split()
    assert Path(place).is_relative_to(python.parents[1])
    assert run([str(python.with_name("maskgit")), "--version"], tmp_path).strip() == version


def test_tests_pass_on_the_wheel(python, tmp_path):
    shutil.copytree(ROOT / "tests" / "golden", tmp_path / "tests" / "golden")
    for path in [*(ROOT / "tests" / name for name in TESTS), *(ROOT / "tests").glob("*.py")]:
        if path.name in TESTS or not path.name.startswith("test_"):
            shutil.copy(path, tmp_path / "tests")
    # Numbers of full-size networks do not depend on how the package came here.
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not full_size", *TESTS]
    run(command, tmp_path / "tests")


def test_the_readme_works_on_the_wheel(python, tmp_path):
    rows, columns = np.mgrid[0:427, 0:640]
    photo = np.stack([rows // 3, columns // 3, rows * 0 + 90], axis=-1).astype(np.uint8)
    # What `make demo` writes.
    demo = tmp_path / "out" / "demo"
    demo.mkdir(parents=True)
    Image.fromarray(photo).save(demo / "photo.png")
    mask = np.zeros(photo.shape[:2], np.uint8)
    mask[60:220, 130:290] = 255
    Image.fromarray(mask).save(demo / "mask.png")
    readme = (ROOT / "README.md").read_text("utf-8")
    lines = [
        line for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL) for line in block.splitlines()
    ]
    commands = [line.partition("#")[0].strip() for line in lines if line.startswith("maskgit ")]
    here = [line for line in commands if not any(word in line for word in ELSEWHERE)]
    assert len(here) == 4
    # Fewer images take less time; the commands are the same. One process for all imports torch once.
    few = [shlex.split(re.sub(r"--num-images \d+", "--num-images 2", line))[1:] for line in here]
    (script,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    one_by_one = (
        f"from maskgit.apps.cli.commands import main\nassert not any([main(line) for line in {few}])\n"
    )
    run([str(python), "-c", one_by_one + script], tmp_path)
    for made in ("frogs/sheet.png", "edited/sheet.png", "filled/sheet.png", "wider/sheet.png"):
        assert (tmp_path / made).is_file(), made
    assert Image.open(tmp_path / "frog.png").size == (32, 32)
