"""A model as a request sees it: the whole of `MaskGIT`, whose networks run in the worker's batches.

What a method does besides (reading photos, finding windows, pasting results) happens in the request's own
thread.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maskgit.apps.serving.worker import Ticket, Worker
from maskgit.engine.batching import Job, News
from maskgit.pipeline import MaskGIT
from maskgit.results import Draw, Output, Trace, join_outputs
from maskgit.sampler.config import SamplerConfig


class SharedModel(MaskGIT):
    """One request's view of a worker's model; its methods wait for their results."""

    def __init__(self, worker: Worker, ticket: Ticket) -> None:
        """Make the view.

        Args:
            worker: runs the model.
            ticket: the request's; once it has ended, methods raise its fault.
        """
        tokenizer: Any = _SharedTokenizer(worker, ticket)
        super().__init__(worker.model.config, tokenizer, worker.model.transformer)
        self.guide = worker.model.guide
        self._worker = worker
        self._ticket = ticket

    @property
    def seconds_called(self) -> float:
        """Seconds that the worker's thread has spent on this request alone: encoding, decoding, guessing."""
        return self._ticket.called

    @property
    def device(self) -> torch.device:
        """Where tensors are put in a request's thread: only the worker uses another device than the CPU."""
        return torch.device("cpu")

    def fill_batches(
        self,
        sequences: Tensor,
        config: SamplerConfig,
        draw: Draw,
        *,
        start_step: int = 0,
        switch: tuple[int, Tensor] | None = None,
    ) -> Iterator[Output]:
        """Fill in masked sequences; see `MaskGIT.fill_batches`.

        Each image is a job of its own, so the callback is told of one image at a time, and the draw's batch
        size is not read: there is one `Output`.
        """
        callback = draw.callback
        jobs = [
            Job(
                row,
                config,
                draw.seed,
                draw.first_index + i,
                start_step,
                told=callback is not None,
                traced=draw.return_steps,
                switch=None if switch is None else (switch[0], int(switch[1][i])),
                pixels=draw.pixels,
            )
            for i, row in enumerate(sequences.cpu())
        ]
        steps: dict[Job, list[News]] = {job: [] for job in jobs}

        def told(news: News) -> None:
            if draw.return_steps:
                steps[news.job].append(news)
            if callback is not None and news.tokens is not None:
                callback(news.step, torch.tensor([news.job.index]), news.tokens[None])

        made = self._worker.fill(jobs, self._ticket, told)
        yield join_outputs([_output(news, steps[news.job]) for news in made])

    def predict_logits(self, sequence: Tensor) -> Tensor:
        """Return the logits of the image codes; see `MaskGIT.predict_logits`."""
        return self._worker.call(partial(self._worker.batcher.predict, sequence), self._ticket)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Return the images of tokens, decoded as those of finished jobs are; see `MaskGIT.decode_tokens`."""
        return self._worker.call(partial(self._worker.batcher.decode, tokens), self._ticket)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the tokens of images; see `MaskGIT.encode_pixels`."""
        return self._worker.call(partial(self._worker.model.encode_pixels, pixels), self._ticket)


def _output(news: News, steps: list[News]) -> Output:
    """Return a finished image as a batch of one, with the trace of its steps if there are any."""
    assert news.tokens is not None, "it is finished"
    parts = [(step.tokens, step.unknown, step.confidence) for step in steps]
    trace = Trace(*(torch.stack(part)[None] for part in zip(*parts, strict=True))) if parts else None
    pixels = torch.empty(3, 0, 0) if news.pixels is None else news.pixels
    return Output(pixels[None], news.tokens[None], trace)


class _SharedTokenizer:
    """What is used of a tokenizer outside the pipeline, run by the worker."""

    def __init__(self, worker: Worker, ticket: Ticket) -> None:
        self.guide = worker.model.guide
        self._worker = worker
        self._ticket = ticket
        self._own = worker.model.tokenizer
        self.config = self._own.config
        self.patch_size = self._own.patch_size

    def parameters(self) -> Iterator[Tensor]:
        """Give what says where tensors are to be put."""
        yield torch.empty(0)

    def encode(self, images: Tensor) -> Tensor:
        return self._worker.run(self._own.encode, images, self._ticket)

    def decode(self, tokens: Tensor) -> Tensor:
        return self._worker.run(self._own.decode, tokens, self._ticket)
