"""What is asked of CUDA by captured steps, read from a stand-in that records the calls."""

import contextlib

import pytest
import torch

from maskgit import MaskGIT, engine
from maskgit.engine.batching import Batcher, Job
from maskgit.engine.graphs import GraphedSteps, _Ground, _Program, fixed_size, fixed_sizes
from maskgit.foundation.devices import Landing
from maskgit.sampler.config import SamplerConfig
from ties import assert_same_tokens

SECOND = torch.device("cuda:1")


class Cuda:
    """Stands in for the calls of torch.cuda that captures make, and keeps what was asked."""

    def __init__(self, monkeypatch) -> None:
        self.calls = []
        self.devices = [torch.device("cuda:0")]
        self.streams = []
        cuda = self

        class Stream:
            def __init__(self, device=None) -> None:
                self.device = torch.device(device) if device is not None else cuda.devices[-1]

            def wait_stream(self, other) -> None:
                cuda.calls.append(("wait_stream", self, other))

            def wait_event(self, event) -> None:
                cuda.calls.append(("wait_event", self, event))

        class Event:
            def record(self, stream) -> None:
                cuda.calls.append(("record", stream, self))

            def synchronize(self) -> None:
                cuda.calls.append(("synchronize event", self))

        class Graph:
            def capture_begin(self, pool=None, capture_error_mode="global") -> None:
                cuda.calls.append(("begin", pool, capture_error_mode, cuda.current(), cuda.devices[-1]))

            def capture_end(self) -> None:
                cuda.calls.append(("end", self))
                if cuda.void:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self) -> None:
                cuda.calls.append(("replay", cuda.current(), cuda.devices[-1]))

        @contextlib.contextmanager
        def within(kept, one):
            kept.append(one)
            try:
                yield
            finally:
                kept.pop()

        self.void = False
        self.own = {}
        replaced = {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": Graph,
            "device": lambda device: within(self.devices, torch.device(device)),
            "stream": lambda stream: within(self.streams, stream),
            "current_stream": self.current,
            "graph_pool_handle": lambda: ("pool", cuda.devices[-1], len(cuda.calls)),
            "synchronize": lambda device=None: cuda.calls.append(("synchronize", device)),
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def current(self, device=None):
        """Return the stream that work goes to: that of the innermost context, else the device's own."""
        if self.streams:
            return self.streams[-1]
        where = torch.device(device) if device is not None else self.devices[-1]
        return self.own.setdefault(where, torch.cuda.Stream(where))

    def named(self, name):
        return [call for call in self.calls if call[0] == name]


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def double(x):
    return (2 * x,)


def test_captures_share_one_pool_and_bother_no_other_thread(cuda):
    ground = _Ground(SECOND)
    for size in (1, 2, 4):
        _Program(double, (torch.ones(size),), ground)
    begun = cuda.named("begin")
    assert {call[1:] for call in begun} == {(ground.pool, "thread_local", ground.stream, SECOND)}
    assert len(begun) == len(cuda.named("end")) == 3


def test_everything_belongs_to_the_tensors_own_device(cuda):
    ground = _Ground(SECOND)
    program = _Program(double, (torch.ones(2),), ground)
    program((torch.ones(2),), 1)
    assert ground.stream.device == ground.pool[1] == SECOND
    assert {call[1] for call in cuda.named("synchronize")} == {SECOND}
    streams = [part for call in cuda.calls for part in call if isinstance(part, torch.cuda.Stream)]
    assert {stream.device for stream in streams} == {SECOND}
    # And nothing else is changed for who calls.
    assert cuda.devices == [torch.device("cuda:0")]
    assert not cuda.streams


def test_replays_on_two_streams_follow_one_another(cuda):
    ground = _Ground(SECOND)
    first, second = (_Program(double, (torch.ones(2),), ground) for _ in range(2))
    cuda.calls.clear()
    streams = torch.cuda.Stream(SECOND), torch.cuda.Stream(SECOND)
    for program, stream in zip((first, second), streams, strict=True):
        with torch.cuda.stream(stream):
            program((torch.ones(2),), 2)
    # Their memory is shared: each waits for the last, and says when it is done.
    assert [(call[0], call[1]) for call in cuda.calls] == [
        (name, stream) for stream in streams for name in ("wait_event", "replay", "record")
    ]
    assert {call[2] for call in cuda.calls if call[0] != "replay"} == {ground.done}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), ValueError("bad")])
def test_what_fails_inside_a_capture_is_told(cuda, error):
    def fails(x):
        if cuda.named("begin"):
            cuda.void = True
            raise error
        return (x,)

    ground = _Ground(SECOND)
    with pytest.raises(type(error)) as raised:
        _Program(fails, (torch.ones(2),), ground)
    assert raised.value is error
    assert cuda.named("end")
    assert not cuda.streams
    # The next capture is as any other.
    cuda.void = False
    _Program(double, (torch.ones(2),), ground)


def test_graphs_go_where_the_sequence_is(cuda, tiny, monkeypatch):
    from maskgit.engine import graphs

    grounds = []
    monkeypatch.setattr(graphs, "_Ground", lambda device: grounds.append(device))
    model = tiny.optimize("exact", linear="torch")
    model.decode_step = GraphedSteps(compile_noise=False)
    model.generate([0, 1], seed=1, steps=2)
    assert set(grounds) == {torch.device("cpu")}


def test_batches_are_padded_to_few_sizes():
    assert [fixed_size(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 63, 64, 65, 129)] == [
        1, 2, 4, 8, 8, 16, 16, 24, 64, 64, 72, 144,
    ]  # fmt: skip
    for count in range(1, 1025):
        size = fixed_size(count)
        assert size >= count
        assert size <= 8 or size % 8 == 0
        assert count <= 64 or size <= 1.125 * count
        assert fixed_size(size) == size
    assert fixed_sizes(1) == (1,)
    assert fixed_sizes(10) == (1, 2, 4, 8, 10)
    assert fixed_sizes(24) == (1, 2, 4, 8, 16, 24)


@pytest.mark.parametrize(("rows", "padded"), [(1, 1), (3, 4), (9, 16), (65, 72)])
def test_what_is_padded_is_not_returned(tiny, rows, padded):
    model = tiny.optimize("exact", linear="torch")
    model.decode_step = steps = GraphedSteps(capture=False, compile_noise=False)
    labels = [n % 10 for n in range(rows)]
    made = model.generate(labels, seed=3, steps=2, batch_size=rows)
    assert_same_tokens(made.tokens, tiny.generate(labels, seed=3, steps=2, batch_size=rows).tokens)
    assert {key[0] for key in steps._programs} == {padded}


def test_a_first_call_in_inference_mode_spoils_no_later_one(tiny):
    model = tiny.optimize("exact", linear="torch")
    model.decode_step = GraphedSteps(capture=False, compile_noise=False)
    with torch.inference_mode():
        first = model.generate([1, 2], seed=3, steps=2)
    assert torch.equal(model.generate([1, 2], seed=3, steps=2).tokens, first.tokens)
    with torch.inference_mode():
        assert torch.equal(model.generate([1, 2], seed=3, steps=2).tokens, first.tokens)


@pytest.mark.parametrize(
    ("dtype", "compile", "last"),
    [
        ("float32", False, False),
        ("float32", True, False),
        ("bfloat16", False, False),
        ("bfloat16", True, True),
        ("float16", True, True),
    ],
)
def test_off_the_cpu_channels_are_last_only_where_norms_are_compiled_between(
    tiny, monkeypatch, dtype, compile, last
):
    # A norm that is not compiled wants its channels first, and would copy before and after itself.
    monkeypatch.setitem(engine.COMPILE_OPTIONS, "meta", {})
    model = engine.build(tiny, engine.Engine(device="meta", dtype=dtype, compile=compile))
    weights = [m.weight for m in model.tokenizer.modules() if isinstance(m, torch.nn.Conv2d)]
    told = [w for w in weights if w.shape[1] > 1 and w.shape[2] > 1]
    assert told
    assert all(w.is_contiguous() != last for w in told)
    assert all(w.is_contiguous(memory_format=torch.channels_last) == last for w in told)


def test_captured_steps_are_forgotten_before_smaller_batches_are_tried(tiny):
    model = tiny.optimize("exact", linear="torch")
    model.decode_step = steps = GraphedSteps(capture=False, compile_noise=False)
    predict, seen = model.predict_logits, []

    def small(sequence):
        seen.append((len(sequence), len(steps._programs)))
        if len(sequence) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return predict(sequence)

    model.predict_logits = small
    batcher = Batcher(model, max_batch=4, sizes=(1, 2, 4))
    config = model.sampler_config(steps=2, guidance_scale=1.0)
    sequence = model.vocabulary.sequence(torch.tensor([1]))[0]
    batcher.add(Job(sequence, config))
    while len(batcher):
        assert all(news.error is None for news in batcher.step())
    assert len(steps._programs) == 1
    for index in range(4):
        batcher.add(Job(sequence, config, index=index))
    while len(batcher):
        assert all(news.error is None for news in batcher.step())
    failed = next(i for i, (size, _) in enumerate(seen) if size == 4)
    assert seen[failed][1] == 2
    # The one that is being made, and nothing besides.
    assert seen[failed + 1] == (2, 1)
    assert batcher.halvings == 1


def test_scores_on_a_gpu_are_whole():
    # The last projection of half-precision networks, on a device that computes nothing.
    from maskgit.networks.config import TransformerConfig
    from maskgit.networks.transformer import Transformer

    config = TransformerConfig(
        num_codes=32, num_classes=4, grid_size=4, hidden_size=48, num_layers=1, num_heads=4
    )
    for device, dtype, expected in (
        ("meta", torch.bfloat16, torch.float32),
        ("meta", torch.float16, torch.float32),
        ("meta", torch.float32, torch.float32),
        ("cpu", torch.bfloat16, torch.bfloat16),
    ):
        network = Transformer(config).to(device, dtype).eval()
        sequence = torch.zeros(2, 17, dtype=torch.int64, device=device)
        assert network(sequence, codes=32).dtype == expected


class OnSecond:
    """A tensor of another device, of which only its landing is asked."""

    def __init__(self, kind: str) -> None:
        self.is_cuda = kind == "cuda"
        self.device = torch.device(kind, 1)
        self.asked = []

    def to(self, device, non_blocking=False):
        self.asked.append((device, non_blocking))
        return torch.zeros(1)


def test_a_batch_lands_by_its_own_device(cuda):
    pixels, tokens = OnSecond("cuda"), OnSecond("cuda")
    landing = Landing(pixels, tokens)
    ((_, stream, event),) = cuda.named("record")
    assert stream.device == SECOND
    assert pixels.asked == tokens.asked == [("cpu", True)]
    landing.wait()
    assert cuda.named("synchronize event") == [("synchronize event", event)]


def test_a_batch_on_mps_has_landed_when_it_is_there(cuda):
    # There is no event to wait for.
    pixels, tokens = OnSecond("mps"), OnSecond("mps")
    Landing(pixels, tokens).wait()
    assert pixels.asked == tokens.asked == [("cpu", False)]
    assert not cuda.calls


def test_a_served_batch_sends_one_tensor_a_step(tiny, monkeypatch):
    from maskgit.engine import batching

    sent = []
    monkeypatch.setattr(batching, "upload", lambda tensor, device: sent.append(tensor) or tensor)
    model = tiny.optimize("exact", linear="torch")
    model.decode_step = GraphedSteps(capture=False, compile_noise=False)
    batcher = Batcher(model, max_batch=2)
    sequence = model.vocabulary.sequence(torch.tensor([1]))[0]
    for index in range(2):
        batcher.add(Job(sequence, model.sampler_config(steps=4), seed=2**64 - 1, index=index))
    batcher.step()
    # Each of two images once, and their numbers.
    assert [tuple(tensor.shape) for tensor in sent] == [(2 * len(sequence) + 3,)] * 2 + [(2, 11)]
    sent.clear()
    batcher.step()
    assert [tuple(tensor.shape) for tensor in sent] == [(2, 11)]
    # There are no float64 numbers on MPS.
    assert sent[0].dtype == torch.float32


def test_the_numbers_of_a_step_are_whole_in_float32():
    from maskgit.sampler.plans import Numbers, plan_steps

    config = SamplerConfig(steps=10_000, temperature=0.1, choice_temperature=1e6, guidance_scale=1.7)
    plan = plan_steps(config, 16_384, remasks=True)
    for number in (0, 1, 5000, 9999):
        numbers = plan.numbers(number, 0, torch.tensor([[16_384], [3]]))
        for part, again in zip(numbers, Numbers.unpack(numbers.pack()), strict=True):
            assert part.dtype == again.dtype
            assert torch.equal(part, again)


@pytest.fixture
def graphed(tiny):
    """A model as it runs on a GPU, without the capture."""
    from maskgit.engine import Engine

    model = MaskGIT(tiny.config, tiny.tokenizer, tiny.transformer)
    model.decode_step = GraphedSteps(capture=False, compile_noise=False)
    model.engine = Engine(device="cuda", graphs=True)
    return model


def test_one_request_does_not_pay_for_the_whole_batch(graphed, monkeypatch):
    pytest.importorskip("fastapi")
    from maskgit.apps.serving.worker import Worker

    worker = Worker(graphed, max_batch=10)
    worker._warm_up()
    assert worker.batcher.sizes == (1, 2, 4, 8, 10)
    warm = set(graphed.decode_step._programs)
    assert {key[0] for key in warm} == {1, 2, 4, 8, 16}
    predict, rows = graphed.predict_logits, []
    monkeypatch.setattr(graphed, "predict_logits", lambda s: rows.append(len(s)) or predict(s))
    # What was captured calls what it was captured with.
    graphed.decode_step.forget()
    sequence = graphed.vocabulary.sequence(torch.tensor([1]))[0]
    worker.batcher.add(Job(sequence, graphed.sampler_config(guidance_scale=1.0)))
    while len(worker.batcher):
        worker.batcher.step()
    assert set(rows) == {1}
    assert set(graphed.decode_step._programs) <= warm
