"""What both loops share: run directories, stopping, precision, seeds, the log."""

import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from PIL import Image

from forking import Python
from maskgit.data.image_cache import ImageCache, write_image_cache
from maskgit.errors import ConfigError, DataError, OutputError
from maskgit.foundation.checks import Config
from maskgit.networks.config import TransformerConfig
from maskgit.networks.transformer import Transformer
from maskgit.sampler.config import SamplerConfig
from maskgit.training import distributed
from maskgit.training.distributed import Distributed, compile_blocks, parallelize
from maskgit.training.numerics import attention, autocast, choose_precision, seed_step
from maskgit.training.run import folder, progress
from maskgit.training.run.checkpoint import Checkpoints
from maskgit.training.run.folder import held_run, setup_run
from maskgit.training.run.progress import Logger, Sheet, Throughput
from maskgit.training.run.stopping import StopSignal, TrainingError, UpdateGate
from runs import run_two

ALONE = Distributed(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Run(Config):
    rate: float = 0.1
    steps: int = 5
    num_workers: int = 0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


def begin(folder, config=None, data="a", may_change=("num_workers",)):
    return setup_run(folder, config or Run(), {"train": data}, ALONE, may_change=may_change)


def test_a_run_directory_is_of_one_config(tmp_path):
    begin(tmp_path)
    Checkpoints(tmp_path).save(1, {"step": 1})
    begin(tmp_path)
    begin(tmp_path, Run(num_workers=2))
    changed = Run(rate=0.2, num_workers=3, sampler=replace(SamplerConfig(), steps=99))
    with pytest.raises(
        ConfigError, match=r"rate \(was 0\.1, is 0\.2\).*sampler\.steps \(was 8, is 99\)"
    ) as raised:
        begin(tmp_path, changed)
    assert "num_workers" not in str(raised.value)
    begin(tmp_path, changed, may_change=("num_workers", "rate", "sampler"))


def test_a_part_of_a_table_may_change(tmp_path):
    begin(tmp_path)
    Checkpoints(tmp_path).save(1, {"step": 1})
    changed = Run(sampler=replace(SamplerConfig(), steps=99, temperature=2.0))
    with pytest.raises(ConfigError, match=r"sampler\.temperature") as raised:
        begin(tmp_path, changed, may_change=("sampler.steps",))
    assert "sampler.steps" not in str(raised.value)
    begin(tmp_path, changed, may_change=("sampler.steps", "sampler.temperature"))


def test_a_setting_that_is_newer_than_a_run_has_its_default(tmp_path):
    begin(tmp_path)
    Checkpoints(tmp_path).save(1, {"step": 1})
    stored = json.loads((tmp_path / "run.json").read_text())
    del stored["config"]["rate"]
    (tmp_path / "run.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"rate \(was 0\.1, is 0\.5\)"):
        begin(tmp_path, Run(rate=0.5))
    begin(tmp_path)


def test_data_that_changed_are_an_error(tmp_path):
    begin(tmp_path)
    Checkpoints(tmp_path).save(1, {"step": 1})
    with pytest.raises(DataError, match=r"\(train\) changed since the checkpoint"):
        begin(tmp_path, data="b")
    begin(tmp_path, data="a")


def test_bytes_that_changed_under_their_fingerprint_are_an_error(tmp_path, monkeypatch):
    images, labels = np.zeros((3, 4, 4, 3), np.uint8), np.zeros(3, np.int64)
    cache = write_image_cache(tmp_path / "images", images, labels, ("a",))

    def go_on():
        opened = ImageCache.open(cache.path)
        fingerprints = {"train": opened.fingerprint}
        setup_run(tmp_path / "run", Run(), fingerprints, ALONE, caches=[opened])

    go_on()
    Checkpoints(tmp_path / "run").save(1, {"step": 1})
    go_on()
    with (cache.path / "images.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(DataError, match=r"changed since the checkpoint in .*images is damaged"):
        go_on()
    # Of what is too large to be read again, sizes are compared.
    monkeypatch.setattr(folder, "MAX_VERIFIED_BYTES", cache.num_bytes - 1)
    go_on()
    with (cache.path / "images.npy").open("r+b") as file:
        file.truncate((cache.path / "images.npy").stat().st_size - 1)
    with pytest.raises(DataError, match="images is damaged"):
        go_on()


def test_without_a_checkpoint_a_run_may_begin_anew(tmp_path):
    begin(tmp_path)
    begin(tmp_path, Run(rate=0.5), data="b")
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored == {"config": Run(rate=0.5).to_dict(), "data": {"train": "b"}}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request(number):
    before = signal.getsignal(number)
    with StopSignal(ALONE) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()
    assert signal.getsignal(number) is before


def test_a_second_interrupt_stops_at_once():
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with StopSignal(ALONE), pytest.raises(KeyboardInterrupt):
        twice()


class Joined(list):
    """Stands in for the processes' group: keeps what it is made with."""

    def __call__(self, **options: object) -> None:
        self.append(options)


def test_a_group_on_gpus_is_told_its_device(monkeypatch):
    joined = Joined()
    monkeypatch.setattr(distributed, "own_device", lambda name: torch.device("cuda:3"))
    monkeypatch.setattr(distributed.dist, "init_process_group", joined)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert Distributed.init("cuda").device == torch.device("cuda:3")
    assert joined == [{"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device("cuda:3")}]
    monkeypatch.setattr(distributed, "own_device", lambda name: torch.device("cpu"))
    Distributed.init("cpu")
    assert joined[1:] == [{"backend": "gloo"}]


def test_processes_agree_over_the_cpu(monkeypatch):
    def all_reduce(flags, op):
        assert flags.device == torch.device("cpu")
        flags.fill_(1)

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    assert Distributed(0, 2, torch.device("meta")).any(False)


def test_blocks_are_compiled_one_by_one(monkeypatch):
    built = []
    monkeypatch.setattr(torch, "compile", lambda forward, **_: built.append(forward) or forward)
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    names = list(network.state_dict())
    compile_blocks(network)
    assert [forward.__self__ for forward in built] == list(network)
    assert list(network.state_dict()) == names
    assert network(torch.ones(1, 2)).shape == (1, 2)


def test_blocks_that_are_compiled_no_more_say_so_once():
    class Double(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    block = Double()
    compile_blocks([block], backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for size in range(2, 7):
            assert torch.equal(block(torch.ones(size)), torch.full((size,), 2.0))
    assert len([one for one in told if "runs uncompiled, slower" in str(one.message)]) == 1


def test_compiled_layers_stay_compiled_under_plain_attention():
    network = Transformer(
        TransformerConfig(8, 2, 2, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=8)
    ).eval()
    sequence = torch.zeros(2, 5, dtype=torch.int64)
    with attention(torch.device("cpu")):
        wanted = network(sequence)
    compile_blocks(network.layers, backend="eager")
    with attention(torch.device("cpu"), compiled=True):
        torch.testing.assert_close(network(sequence), wanted)
    assert not any(layer.forward.stopped for layer in network.layers)


@pytest.mark.parametrize("autocasts", [False, True])
def test_plain_attention_is_torchs_and_one_threads_alone(autocasts):
    q, k, v = (torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    with autocast(torch.device("cpu"), torch.bfloat16 if autocasts else torch.float32):
        wanted = attend(q, k, v)
        with attention(torch.device("cpu")):
            made = attend(q, k, v, dropout_p=0.0)
            settings = (
                torch.backends.cuda.flash_sdp_enabled(),
                torch.backends.cuda.mem_efficient_sdp_enabled(),
            )
    assert settings == before, "other threads go on as they were"
    assert made.dtype == wanted.dtype
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=2e-2 if autocasts else 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stops_the_run_by_name(bad):
    gate, fine = UpdateGate(torch.device("cpu")), torch.tensor(1.0)
    gate.check(2, {"loss": fine, "gradient_norm": fine})
    with pytest.raises(TrainingError, match=r"step 3 before its update: gradient_norm is -?(nan|inf)\."):
        gate.check(3, {"loss": fine, "gradient_norm": torch.tensor(bad)})


def test_seeds_depend_on_seed_step_and_rank():
    draws = []
    for seed, step, rank in ((1, 2, 0), (1, 2, 0), (1, 3, 0), (2, 2, 0), (1, 2, 1)):
        seed_step(seed, step, rank)
        draws.append(float(torch.rand(())))
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4


def test_precision_by_name():
    cpu = torch.device("cpu")
    assert choose_precision("float32", cpu) == torch.float32
    assert choose_precision("bfloat16", cpu) == torch.bfloat16
    assert choose_precision("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(ConfigError, match="bfloat16"):
        choose_precision("bfloat61", cpu)


def test_a_process_alone_needs_no_group():
    distributed = Distributed.init("cpu")
    assert distributed == ALONE
    value = torch.tensor(3.0, requires_grad=True)
    assert distributed.mean(value) is value
    assert distributed.any(True)
    module = torch.nn.Linear(1, 1)
    assert parallelize(module, distributed) is module
    distributed.close()


def test_scalars_go_to_a_file_and_what_is_done_again_is_logged_once(tmp_path):
    logger = Logger(tmp_path, ALONE)
    for step in range(1, 6):
        logger.scalars(step, {"loss": torch.tensor(step / 2)})
    logger.close()
    with (tmp_path / "scalars.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    logger = Logger(tmp_path, ALONE, start_step=3)
    logger.scalars(4, {"loss": 9})
    logger.close()
    lines = [json.loads(line) for line in (tmp_path / "scalars.jsonl").read_text().splitlines()]
    assert lines == [{"step": s, "loss": loss} for s, loss in ((1, 0.5), (2, 1.0), (3, 1.5), (4, 9.0))]


def test_without_tensorboard_there_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Logger(tmp_path, ALONE).close()
    assert "pip install tensorboard" in capsys.readouterr().err


def test_sheets_are_enlarged_and_say_what_they_show(tmp_path):
    images = torch.arange(5).view(5, 1, 1, 1).expand(5, 3, 8, 8) / 10
    images[4] = torch.nan
    logger = Logger(tmp_path, ALONE)
    for captions in (("cat",) * 5, ("dog",) * 5):
        logger.sheet(7, captions[0], Sheet(images, captions, 3))
    logger.close()
    cat, dog = (np.asarray(Image.open(tmp_path / "samples" / f"{n}-00000007.png")) for n in ("cat", "dog"))
    # Pixels become 16 × 16 each, below each image is its caption, and what is no number is black.
    step = (len(cat) - 2) // 2
    grey = np.round(np.array([[0, 0.1, 0.2], [0.3, 0, 1]]) * 255)
    assert np.abs(cat[2 + 64 :: step, 2 + 64 :: 130, 0] - grey).max() <= 1
    assert step > 130
    differ = (cat != dog).any((1, 2))
    assert not differ[:130].any()
    assert differ[130 : step + 2].any()


def test_only_the_main_process_writes(tmp_path, capsys):
    logger = Logger(tmp_path, Distributed(1, 2, torch.device("cpu")))
    logger.scalars(1, {"loss": 1})
    logger.sheet(1, "samples", Sheet(torch.zeros(1, 3, 2, 2), ("cat",), 1))
    logger.warn("name", 1, "Something.")
    logger.progress(1, 2, loss=0.5, learning_rate=0.1, throughput=Throughput(1), left=1.0)
    logger.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_a_warning_is_said_once(tmp_path, capsys):
    logger = Logger(tmp_path, ALONE)
    for step in (4, 5):
        logger.warn("collapse", step, "The codebook has collapsed.")
    logger.close()
    assert capsys.readouterr().err.count("Warning at step 4: The codebook has collapsed.") == 1


def test_throughput_counts_images_and_leaves_out_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    throughput = Throughput(32, flops_per_image=1e9, peak=1e11)
    for _ in range(10):
        now[0] += 0.5
        throughput.step()
    with throughput.paused():
        now[0] += 1000
    assert throughput.read() == (pytest.approx(64.0), pytest.approx(0.64))
    # Pauses come again: one of 1,000 s in ten steps is two in twenty.
    assert throughput.time_left({1e9: 20}) == pytest.approx(2010.0)
    # Steps may cost different numbers of FLOPs.
    for flops in (0.5e9, 1.5e9, 1.5e9):
        now[0] += 0.5
        throughput.step(flops)
    assert throughput.read() == (pytest.approx(64.0), pytest.approx(0.64 * 3.5 / 3))


def test_the_time_left_foresees_steps_that_cost_more(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    throughput = Throughput(4)
    assert np.isnan(throughput.time_left({1e9: 10}))
    for step in range(25):
        # The first steps take longer, and say nothing of the others.
        now[0] += 9.0 if step < 5 else 1.0
        throughput.step(1e9)
    throughput.read()
    assert throughput.images_per_second == pytest.approx(4.0)
    assert throughput.time_left({1e9: 10, 3e9: 100}) == pytest.approx(10 + 300)
    # Once they come, they are measured.
    for _ in range(10):
        now[0] += 2.5
        throughput.step(3e9)
    throughput.read()
    assert throughput.time_left({1e9: 0, 3e9: 90}) == pytest.approx(225)


def test_a_line_tells_loss_test_rate_speed_time_and_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "peak_memory", lambda device: 3 * 2**29)
    throughput = Throughput(64)
    throughput.images_per_second = 1234.0
    logger = Logger(tmp_path, ALONE)
    told = {"loss": 2.5, "learning_rate": 1e-4, "throughput": throughput, "left": 725.0}
    logger.progress(10, 30, **told)
    logger.scalars(15, {"test_loss": 2.75, "test_psnr": 20.0})
    logger.progress(20, 30, **told)
    logger.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == [
        "step 10/30: loss 2.5000, lr 0.0001, 1,234 images/s, 12 min 05 s left, 1.50 GiB",
        "step 20/30: loss 2.5000, test loss 2.7500 (step 15), lr 0.0001, 1,234 images/s, 12 min 05 s left, 1.50 GiB",
    ]


def test_the_mean_loss_is_of_all_steps_since_the_last_line():
    mean = progress.RunningMean()
    for value in (1.0, 2.0, 6.0):
        mean.update(torch.tensor(value))
    assert float(mean.read()) == 3.0
    mean.update(torch.tensor(5.0))
    assert float(mean.read()) == 5.0


def test_hours_count_those_before_a_run_was_stopped(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    for start, expected in ((0, 2.0), (5, 4.0)):
        logger = Logger(tmp_path, ALONE, start_step=start, tracker="none")
        now[0] += 7200
        assert logger.hours == pytest.approx(expected)
        logger.scalars(start + 5, {"hours": logger.hours})
        logger.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5.2, "5 s"), (125, "2 min 05 s"), (3 * 3600 + 300, "3 h 05 min"), (float("nan"), "unknown time")],
)
def test_durations_as_people_read_them(seconds, text):
    assert progress.duration(seconds) == text


HOLD = """
import sys, torch
from maskgit.training.distributed import Distributed
from maskgit.training.run.folder import held_run
with held_run(sys.argv[1], Distributed(0, 1, torch.device("cpu"))):
    print("holds", flush=True)
    sys.stdin.read()
"""


def holding(folder):
    process = Python("-c", HOLD, folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds\n"
    return process


def test_a_second_run_in_a_folder_is_refused_with_the_firsts_process_and_host(tmp_path):
    folder = tmp_path / "run"
    first = holding(folder)
    named = f"run is the folder of a run that process {first.pid} on {socket.gethostname()} is at"
    with pytest.raises(OutputError, match=named), held_run(folder, ALONE):
        pass
    assert [path.name for path in folder.iterdir()] == ["run.lock"]
    first.communicate()
    # A refused run leaves nothing, and what a killed one leaves is in nobody's way.
    assert not folder.exists()
    first = holding(folder)
    first.kill()
    first.communicate()
    with held_run(folder, ALONE):
        (folder / "run.json").touch()
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_a_run_that_failed_can_be_started_again_in_the_same_process(tmp_path):
    for _ in range(2):
        with pytest.raises(TrainingError), held_run(tmp_path / "run", ALONE):
            raise TrainingError("stopped")


TWO = """
import os, sys
from maskgit.errors import OutputError
from maskgit.training.distributed import Distributed
from maskgit.training.run.folder import held_run
distributed = Distributed.init("cpu")
try:
    with held_run(sys.argv[1], distributed):
        print("holds", *os.listdir(sys.argv[1]), file=sys.stderr)
        distributed.barrier()
except OutputError as error:
    print("refused:", error, file=sys.stderr)
distributed.close()
"""


def test_of_several_processes_the_main_one_holds_the_folder_and_all_are_refused(tmp_path):
    assert all("holds run.lock" in text for text in run_two(TWO, str(tmp_path)))
    other = holding(tmp_path)
    main, second = run_two(TWO, str(tmp_path))
    assert f"refused: {tmp_path} is the folder of a run that process {other.pid}" in main
    assert f"refused: {tmp_path} cannot be used" in second
    other.communicate()


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(tmp_path):
    pictures = tmp_path / "photos"
    (pictures / "cat").mkdir(parents=True)
    refused = pytest.raises(OutputError, match=r"holds no run \(cat\)\. Set `out` to a new folder")
    with refused, held_run(pictures, ALONE):
        pass
    assert [path.name for path in pictures.iterdir()] == ["cat"]
    # What a run that was killed at once left behind, and an empty folder, are fine.
    (tmp_path / "empty").mkdir()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "run.lock").touch()
    for name in ("empty", "killed"):
        with held_run(tmp_path / name, ALONE):
            pass


def test_a_tilde_in_a_run_folder_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with held_run("~/run", ALONE):
        assert begin("~/run") == tmp_path / "run"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.json"]
    assert not (tmp_path / "~").exists()
