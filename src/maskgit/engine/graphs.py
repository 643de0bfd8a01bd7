"""Decoding steps as CUDA graphs: captured once for a size of batch and a policy, then replayed.

Everything else that differs between steps and images is an input: sequences, seeds, indices, and the numbers of
each row's plan. So other settings need no other graph.

Shapes: B batch, S the sequence with its class token.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskgit.forks import resets
from maskgit.guidance import PredictLogits
from maskgit.noise import ImageNoise, Noise, gumbels
from maskgit.plans import Numbers
from maskgit.policies import Memory, Policy
from maskgit.sampler import Made, begin, decode_step

# Each holds its activations in memory.
KEPT_GRAPHS = 16
WARM_UP = 3


class GraphedSteps:
    """Makes decoding steps as `sampler.decode_step` does, by replaying CUDA graphs.

    Batches are padded to the next power of two. What it returns are copies, and it may be called from several
    threads.
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
        resets(self)

    def after_fork(self) -> None:
        """Take a new lock: another thread may have held the old one."""
        self._lock = threading.Lock()

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
        last: bool = False,
    ) -> Made:
        """See `sampler.decode_step`; noise of another kind than `ImageNoise` is not captured."""
        options: dict[str, Any] = {"policy": policy, "mask_token": mask_token, "guides": guides, "last": last}
        if not isinstance(noise, ImageNoise):
            return decode_step(predict_logits, sequence, free, memory, numbers, noise=noise, **options)
        if memory is None:
            memory = begin(policy, free, noise.num_codes, noise)
        batch = len(sequence)
        size = 1 << (batch - 1).bit_length()
        inputs = (sequence, free, noise.words(), noise.indices, *numbers, *memory)
        inputs = tuple(_padded(part, size) for part in inputs)
        key = (size, sequence.shape[1], noise.num_codes, *options.values())
        with self._lock:
            program = self._programs.get(key)
            if program is None:
                kind = CompiledNoise if self.compile_noise else ImageNoise
                step = _step(predict_logits, noise.num_codes, kind, options)
                program = self._programs[key] = _Program(step, inputs, capture=self.capture)
                while len(self._programs) > KEPT_GRAPHS:
                    self._programs.popitem(last=False)
            self._programs.move_to_end(key)
            outputs = [part[:batch].clone() for part in program(inputs)]
        logits, tokens, unknown, again, following, *kept = outputs
        return Made(logits, tokens, unknown, again, following, tuple(kept))


class CompiledNoise(ImageNoise):
    """`ImageNoise` whose largest draw is one compiled kernel."""

    def tokens(self, step: int | Tensor) -> Tensor:
        return self._tokens(step, _compiled_gumbels())


@functools.cache
def _compiled_gumbels() -> Callable[..., Tensor]:
    return torch.compile(gumbels, dynamic=False)


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


class _Program:
    """A function of tensors with inputs and outputs at fixed places, captured as a CUDA graph."""

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], *, capture: bool
    ) -> None:
        self.inputs = tuple(part.clone() for part in inputs)
        self.replay: Callable[[], object]
        if not capture:
            self.replay = lambda: setattr(self, "outputs", function(*self.inputs))
            return
        # Libraries and the allocator settle before the capture, on a stream of their own, as graphs demand.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = function(*self.inputs)
        self.replay = graph.replay

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for place, part in zip(self.inputs, inputs, strict=True):
            place.copy_(part)
        self.replay()
        return self.outputs


def _padded(part: Tensor, size: int) -> Tensor:
    """Return a batch with its first row repeated behind the last."""
    missing = size - len(part)
    return part if not missing else torch.cat([part, part[:1].expand(missing, *part.shape[1:])])
