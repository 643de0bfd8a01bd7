"""What all tests share."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes depends on what else the machine does.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# What /proc/cpuinfo says of vector instructions is true; to have it confirmed, torch.compile would build and run a
# program for each set of them, which takes longer than all that is compiled here.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"


# The files that take longest, longest first.
LONG = (
    "test_on_device.py",
    "test_train_transformer.py",
    "test_engine.py",
    "test_webui_browser.py",
    "test_ray_serve.py",
    "test_killed.py",
    "test_notebook.py",
    "test_train_tokenizer.py",
    "test_server_process.py",
    "test_export_compiled.py",
    "test_environments.py",
    "test_release.py",
    "test_export.py",
    "test_behind_proxies.py",
    "test_hub.py",
    "test_streaming.py",
    "test_benchmarks.py",
    "test_benchmark_gpu.py",
    "test_streams.py",
    "test_peers.py",
    "test_training_commands.py",
    "test_evaluation_commands.py",
    "test_serving.py",
    "test_openapi.py",
    "test_sampling.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, lest one process end with them alone; `make test` keeps the order."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def _quiet_machine(tmp_path_factory: pytest.TempPathFactory):
    """Keep tests off the user's cache and the network."""
    import torch

    os.environ["MASKGIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    # A kernel that was kept for vectors of another width (`ATEN_CPU_CAPABILITY`) would write beyond its results.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    # The tests' tensors are small: a second thread would mostly wait for the first.
    torch.set_num_threads(1)
    # Under `nohup` it is ignored, and the servers that tests start would inherit that.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    _settle_the_engine()


def _settle_the_engine() -> None:
    """Fill the cache with times, so that what the engine chooses depends on what the CPU has and not on its load."""
    from maskgit.engine import host
    from maskgit.engine.host import has_bfloat16_units

    bfloat16 = 1 if has_bfloat16_units() else 10
    ranks = {"float32 mkl": 2, "float32 onednn": 3, "float32 torch": 4, "int8 int8": 5}
    ranks |= {"bfloat16 onednn": bfloat16, "bfloat16 torch": 20}
    # Processes that tests start have as many threads as there are processors.
    for threads in {1, os.cpu_count() or 1}:
        host.keep(host.place(threads), {name: float(ranks[name]) for name in host.names()}, replace=True)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden records."""
    return GOLDEN


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """The folder of the golden records that are too large to commit."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("needs ../shared/golden, whose full-size records are not in this repository")
    return folder


@pytest.fixture(scope="session")
def tiny():
    """The tiny golden model; must not be changed."""
    from maskgit.convert import load_official

    return load_official(GOLDEN / "tiny_tokenizer.msgpack", GOLDEN / "tiny_transformer.msgpack")


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory) -> Path:
    """The tiny golden model as a folder."""
    return Path(tiny.save_pretrained(tmp_path_factory.mktemp("tiny") / "model"))
