"""Decoding steps as CUDA graphs: captured once for a size of batch and a policy, then replayed.

Everything else that differs between steps and images is an input: sequences, seeds, indices, and the numbers of
each row's plan. So other settings need no other graph.

Shapes: B batch, S the sequence with its class token.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from maskgit.foundation.compiled import Compiled
from maskgit.foundation.forks import resets
from maskgit.sampler.guidance import PredictLogits
from maskgit.sampler.loop import Made, begin, decode_step
from maskgit.sampler.noise import ImageNoise, Noise, gumbels
from maskgit.sampler.plans import Numbers
from maskgit.sampler.policies import Memory, Policy

# They share the memory of their activations, but each keeps its inputs and outputs.
KEPT_GRAPHS = 64
WARM_UP = 3


def fixed_size(count: int) -> int:
    """Return the number of rows that a batch of `count` is padded to: 1, 2, 4, 8 or a multiple of 8.

    From 64 on there are 8 sizes to each doubling, so that at most an eighth of the rows is padding.
    """
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = max(8, 1 << ((count - 1).bit_length() - 4))
    return -(-count // step) * step


def fixed_sizes(most: int) -> tuple[int, ...]:
    """Return the sizes that batches of up to `most` rows are padded to, rising; the last is `most` itself."""
    return (*sorted({size for size in map(fixed_size, range(1, most)) if size < most}), most)


class GraphedSteps:
    """Makes decoding steps as `sampler.decode_step` does, by replaying CUDA graphs.

    Batches are padded to a few fixed sizes. What it returns are copies, and it may be called from several threads
    and streams, of which one at a time is served. All graphs belong to the device of the first call.
    """

    def __init__(self, *, capture: bool = True, compile_noise: bool = True) -> None:
        """Prepare to capture; nothing is captured yet.

        Args:
            capture: whether to capture and replay; without, the same code runs step by step on any device.
            compile_noise: whether the noise is drawn by a compiled kernel, not by a hundred small ones.
        """
        self.capture = capture
        self.compile_noise = compile_noise
        self._programs: OrderedDict[tuple[Any, ...], _Program] = OrderedDict()
        self._lock = threading.Lock()
        self._ground: _Ground | None = None
        resets(self)

    def after_fork(self) -> None:
        """Take a new lock: another thread may have held the old one."""
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Drop what is captured and the memory that it holds; it is captured anew when it is needed."""
        with self._lock:
            self._programs.clear()
            self._ground = None

    def __call__(
        self,
        predict_logits: PredictLogits,
        sequence: Tensor,
        free: Tensor,
        memory: Memory | None,
        numbers: Numbers,
        *,
        policy: Policy,
        mask_token: int,
        noise: Noise,
        guides: bool,
        truncates: bool = False,
        last: bool = False,
        groups: int = 1,
        drafts: bool = True,
    ) -> Made:
        """See `sampler.decode_step`; noise of another kind than `ImageNoise` is not captured."""
        options: dict[str, Any] = {"policy": policy, "mask_token": mask_token, "guides": guides, "last": last}
        options |= {"groups": groups, "drafts": drafts, "truncates": truncates}
        if not isinstance(noise, ImageNoise):
            return decode_step(predict_logits, sequence, free, memory, numbers, noise=noise, **options)
        if memory is None:
            memory = begin(policy, free, noise.num_codes, noise, groups)
        batch = len(sequence)
        size = fixed_size(batch)
        inputs = (sequence, free, noise.words(), noise.indices, *numbers, *memory)
        inputs = tuple(_padded(part, size) for part in inputs)
        key = (size, sequence.shape[1], noise.num_codes, *options.values())
        with self._lock:
            if self.capture and self._ground is None:
                self._ground = _Ground(sequence.device)
            program = self._programs.get(key)
            if program is None:
                kind = CompiledNoise if self.compile_noise else ImageNoise
                step = _step(predict_logits, noise.num_codes, kind, options)
                program = self._programs[key] = _Program(step, inputs, self._ground)
                while len(self._programs) > KEPT_GRAPHS:
                    self._programs.popitem(last=False)
            self._programs.move_to_end(key)
            outputs = program(inputs, batch)
        logits, tokens, unknown, again, following, *kept = outputs
        return Made(logits, tokens, unknown, again, following, tuple(kept))


class CompiledNoise(ImageNoise):
    """`ImageNoise` whose largest draw is one compiled kernel."""

    def tokens(self, step: int | Tensor) -> Tensor:
        return self._tokens(step, _compiled_gumbels())


@functools.cache
def _compiled_gumbels() -> Callable[..., Tensor]:
    return Compiled(gumbels)


def _step(
    predict_logits: PredictLogits, num_codes: int, kind: type[ImageNoise], options: dict[str, Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """Return a step as a function of tensors alone."""
    count = len(Numbers._fields)

    def step(
        sequence: Tensor, free: Tensor, words: Tensor, indices: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        noise = kind.of_words(words, indices, sequence.shape[1], num_codes)
        numbers, memory = Numbers(*rest[:count]), rest[count:]
        made = decode_step(predict_logits, sequence, free, memory, numbers, noise=noise, **options)
        return (*made[:5], *made.memory)

    return step


class _Ground:
    """What all graphs of a device are captured with, and how their replays follow one another.

    They share one pool of memory, so that what one computes in is overwritten by the next. A graph that begins on
    another stream than the last therefore waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()
            # Graphs that share a pool are to be captured on one stream.
            self.stream = torch.cuda.Stream(device)
        self.done = torch.cuda.Event()

    def capture(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        """Return the graph of a call and its outputs."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            # Libraries and the allocator settle before the capture.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP):
                    function(*inputs)
            torch.cuda.synchronize(self.device)
            with torch.cuda.stream(self.stream):
                # Other threads may go on using the device.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    outputs = function(*inputs)
                except BaseException:
                    # The capture is void, and says so at its end, which is not what went wrong.
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return graph, outputs


class _Program:
    """A function of tensors with inputs and outputs at fixed places, captured as a CUDA graph."""

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Tensor, ...],
        ground: _Ground | None,
    ) -> None:
        """Capture it, or without a ground let it run as it is."""
        self.function = function
        # Those of inference mode could be filled nowhere else.
        with torch.inference_mode(False):
            self.inputs = tuple(part.clone() for part in inputs)
        self.ground = ground
        if ground is not None:
            self.graph, self.outputs = ground.capture(function, self.inputs)

    def __call__(self, inputs: tuple[Tensor, ...], rows: int) -> list[Tensor]:
        """Return copies of the first rows of what it makes of other inputs."""
        if self.ground is None:
            self._place(inputs)
            return [part[:rows].clone() for part in self.function(*self.inputs)]
        with torch.cuda.device(self.ground.device):
            stream = torch.cuda.current_stream(self.ground.device)
            stream.wait_event(self.ground.done)
            self._place(inputs)
            self.graph.replay()
            made = [part[:rows].clone() for part in self.outputs]
            self.ground.done.record(stream)
        return made

    def _place(self, inputs: tuple[Tensor, ...]) -> None:
        for place, part in zip(self.inputs, inputs, strict=True):
            place.copy_(part)


def _padded(part: Tensor, size: int) -> Tensor:
    """Return a batch with its first row repeated behind the last."""
    missing = size - len(part)
    return part if not missing else torch.cat([part, part[:1].expand(missing, *part.shape[1:])])
