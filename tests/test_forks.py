"""After a fork, what a process did before does not hang its child.

Each test runs a program in a process of its own, which forks, computes in the child, and is ended after a while.
"""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

PRELUDE = """
import os, sys, threading
import torch
from maskgit import MaskGIT
from maskgit.engine import host
# Few machines' defaults are 1, with which nothing could hang.
torch.set_num_threads(2)

def forked(work):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

def made(model=None):
    return (model or pipe).generate("frog", num_images=2, steps=2, seed=1).tokens

def check():
    assert torch.equal(made(), wanted)

def optimized():
    # Not measured, which takes long on a busy machine.
    host.measured = lambda **_: dict.fromkeys(host.names(), 1.0)
    return pipe.optimize("exact")

pipe = MaskGIT.from_pretrained()
wanted = made()
"""

PROGRAMS = {
    "a child": "forked(check); check()",
    "a child's child": "forked(lambda: forked(check))",
    "a thread of a child": """
def work():
    found = []
    thread = threading.Thread(target=lambda: found.append(made()))
    thread.start()
    thread.join()
    assert torch.equal(found[0], wanted)
forked(work)
""",
    "a child of a thread that computed": """
def work():
    made()
    forked(check)
thread = threading.Thread(target=work)
thread.start()
thread.join()
""",
    "an optimized model": """
fast = optimized()
made(fast)
forked(lambda: made(fast))
""",
    "training": """
def work():
    loss = torch.nn.functional.conv2d(torch.randn(8, 16, 64, 64), weight).square().mean()
    loss.backward()
weight = torch.randn(16, 16, 3, 3, requires_grad=True)
pipe.tokenizer.encode(torch.rand(2, 3, 32, 32))
forked(work)
""",
    "a data loader's workers": """
class Made(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        torch.set_num_threads(2)
        return pipe.generate("frog", steps=2, seed=1, first_index=index).tokens
loaded = torch.utils.data.DataLoader(Made(), batch_size=2, num_workers=2, multiprocessing_context="fork")
rows = torch.cat(list(loaded))[:, 0]
assert torch.equal(rows[:2], wanted)
""",
    "multiprocessing": """
import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    for tokens in pool.map(made, [None] * 3):
        assert torch.equal(tokens, wanted)
""",
    "without OpenMP's help": """
from maskgit.foundation import forks
forks.give_back_threads = lambda: False
def work():
    assert torch.get_num_threads() == 1
    check()
forked(work)
assert torch.get_num_threads() == 2
""",
    "a lock that another thread held": """
fast = optimized()
made(fast)
held = [fast.masked_predictor._lock]
held[0].acquire()
forked(lambda: made(fast))
""",
}


def run(program: str) -> None:
    # Threads that spin while they wait would have the busy machine's other processes wait for them.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-c", PRELUDE + program]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        _, told = process.communicate(timeout=120)
    finally:
        # A child that hangs, too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, told


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_child_computes(name):
    run(PROGRAMS[name])


def test_a_service_started_before_a_fork_says_so():
    run("""
from maskgit.apps.serving.errors import UnavailableError
from maskgit.apps.serving.service import Limits, Service
service = Service(pipe, "cifar10", Limits(max_batch=2))
service.start()
service.wait_ready()
service.submit(lambda model: model.generate("frog", steps=1)).future.result()
# As if a request were just being accepted.
service._changed.acquire(), service._worker._changed.acquire()

def work():
    for method in (service.start, service.wait_ready, lambda: service.submit(lambda model: 1)):
        try:
            method()
        except UnavailableError as error:
            assert "start it in each process" in str(error), error
        else:
            raise AssertionError("no error")
    assert not service.ready
    service.close()

forked(work)
service._changed.release(), service._worker._changed.release()
service.close()
""")


def test_a_gpu_that_was_used_before_a_fork_is_refused():
    # No GPU is needed for it: CUDA is only asked whether it was used.
    run("""
from maskgit.foundation.devices import choose_device
from maskgit.errors import ConfigError
torch.cuda.is_initialized = lambda: True

class OnGpu(MaskGIT):
    device = torch.device("cuda")

there = OnGpu(pipe.config, pipe.tokenizer, pipe.transformer)

def work():
    for attempt in (
        lambda: choose_device("cuda"),
        lambda: pipe.to("cuda:0"),
        lambda: there.generate("frog", steps=1),
        lambda: there.encode_pixels(torch.zeros(1, 3, 32, 32)),
        lambda: there.decode_on_device(wanted),
    ):
        try:
            attempt()
        except ConfigError as error:
            assert "spawn" in str(error), error
        else:
            raise AssertionError("no error")
    check()

forked(work)
""")


def test_batches_begun_before_a_fork_say_so():
    run("""
from maskgit.errors import DataError
from maskgit.data.batches import ahead
batches = ahead(lambda step: (step, made()), 5, 2)
assert next(batches)[0] == 5

def work():
    try:
        next(batches)
    except DataError as error:
        assert "begin them anew" in str(error)
    else:
        raise AssertionError("no error")
    step, tokens = next(ahead(lambda step: (step, made()), 6, 2))
    assert step == 6 and torch.equal(tokens, wanted)

forked(work)
assert next(batches)[0] == 6
batches.close()
""")


def test_a_service_that_was_not_started_starts_after_a_fork():
    run("""
from maskgit.apps.serving.service import Limits, Service
service = Service(pipe, "cifar10", Limits(max_batch=2))

def work():
    service.start()
    service.wait_ready()
    tokens = service.submit(lambda model: made(model)).future.result()
    assert torch.equal(tokens, wanted)
    service.close()

forked(work)
""")


def test_a_client_has_connections_of_its_own_after_a_fork():
    run("""
from maskgit.apps.client.client import Client
client = Client("http://127.0.0.1:9", api_key="secret")
mine = client._http

def work():
    assert client._http is not mine
    assert client._http.headers["authorization"] == mine.headers["authorization"]

forked(work)
assert client._http is mine
""")
