"""Continuous batching: images of any class, seed, settings and step share batches, each as it would be alone.

At every step boundary finished images leave and waiting ones join; where there are more images than rows, requesters
share the rows fairly. Batches are padded with copies of their first row to a fixed size, because the rounding of a
matrix product may depend on its shape: so the same job gives the same bytes whatever its companions are.

Shapes: B rows, S = N + 1 the sequence with its class token, K codes, h × w the token grid, H × W pixels, T
steps.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from maskgit.engine.batch_sizes import free_memory, in_parts, ran_out_of_memory
from maskgit.engine.turns import ANYONE, Requester, Turns
from maskgit.errors import ConfigError
from maskgit.foundation.checks import check_count, check_seed, check_whole
from maskgit.foundation.devices import upload
from maskgit.model import Model
from maskgit.results import DEFAULT_BATCH_SIZE
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.loop import Made, begin, free_tokens
from maskgit.sampler.noise import ImageNoise, seed_words
from maskgit.sampler.plans import Numbers, plan_steps
from maskgit.sampler.policies import Memory, Policy, make_policy
from maskgit.sampler.policies.base import log_probs_of

# Decoders gain little from batches on a CPU, and an image that is finished alone pays for all that is padded.
DECODE_SIZES = {"cpu": 1}
DEFAULT_DECODE_SIZE = 8
# Finished images that are decoded after one step, in such batches; the others wait for the next steps.
_DECODED_AT_ONCE = 4
# Settings whose plans are kept.
_KEPT_PLANS = 256


@dataclass(frozen=True, eq=False)
class Job:
    """One image to be made.

    Attributes:
        sequence: int64 (S,), a row as `Vocabulary.sequence` makes it, on the CPU.
        config: how it is decoded.
        seed: in [0, 2⁶⁴).
        index: of the image, ≥ 0; with the seed it decides the noise.
        start_step: the step to begin decoding at.
        told: whether every step's tokens are told, not only the result.
        traced: whether what a `Trace` keeps of every step is told, too.
        switch: (step, class token) to go on with another class from that step, or None.
        pixels: whether the tokens are decoded to an image.

    Raises:
        ConfigError: a number is out of range.
    """

    sequence: Tensor
    config: SamplerConfig
    seed: int = 0
    index: int = 0
    start_step: int = 0
    told: bool = False
    traced: bool = False
    switch: tuple[int, int] | None = None
    pixels: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", check_seed(self.seed))
        object.__setattr__(self, "index", check_count("index", self.index, 0, 2**63 - 1))
        object.__setattr__(self, "start_step", check_whole("start_step", self.start_step))
        if not 0 <= self.start_step < self.config.steps:
            raise ConfigError(
                f"start_step must be from 0 to {self.config.steps - 1} for {self.config.steps} steps, "
                f"but is {self.start_step}."
            )


class News(NamedTuple):
    """What a step brought for one job.

    Attributes:
        job: which.
        step: the number of the step.
        tokens: int64 (h, w), all filled in, on the CPU.
        unknown, confidence: bool and float32 (h, w), on the CPU, as in a `Trace`, of a job that is traced.
        pixels: float32 (3, H, W) in [0, 1], on the CPU, of a finished job whose tokens are decoded.
        error: what ended it instead.
        last: whether no more will come.
    """

    job: Job
    step: int
    tokens: Tensor | None = None
    unknown: Tensor | None = None
    confidence: Tensor | None = None
    pixels: Tensor | None = None
    error: Exception | None = None
    last: bool = False


@dataclass
class _Plan:
    """What jobs of the same settings, start and number of masked tokens share.

    Attributes:
        key: jobs of one key can be rows of one batch.
        policy: which tokens stay.
        guides: whether any step is guided; every step of a batch then is, at a scale of 1 where it is not.
        truncates: whether tokens are sampled from some codes alone.
        first: the step that decoding begins at.
        numbers: float32 (steps made, 11), each step's `Numbers`, packed.
    """

    key: tuple[str, str, bool, bool]
    policy: Policy
    guides: bool
    truncates: bool
    first: int
    numbers: Tensor


@dataclass
class _Row:
    """A job in the batch; its tensors are on the device: sequence and free (S,), its seed's words and its index."""

    job: Job
    requester: Requester
    plan: _Plan
    sequence: Tensor
    free: Tensor
    words: Tensor
    index: Tensor
    memory: Memory = ()
    made: int = 0

    @property
    def step(self) -> int:
        return self.plan.first + self.made

    def read(self) -> Tensor:
        """Return what the next step reads: from the step of a switch on, the other class comes first."""
        switch = self.job.switch
        if switch is None or self.step < switch[0]:
            return self.sequence
        return torch.cat([self.sequence.new_tensor([switch[1]]), self.sequence[1:]])

    @property
    def at_last(self) -> bool:
        return self.made == len(self.plan.numbers) - 1


Item = TypeVar("Item", _Row, News)


class Batcher:
    """Takes jobs and makes their images, a step of all of them at a time; for one thread alone."""

    def __init__(
        self,
        model: Model,
        *,
        max_batch: int = DEFAULT_BATCH_SIZE,
        sizes: Sequence[int] | None = None,
        decode_size: int | None = None,
    ) -> None:
        """Describe the batches; nothing is run yet.

        Args:
            model: makes the images.
            max_batch: images that make a step together; further ones wait.
            sizes: rows that a batch is padded to, the fewest that are enough; None is max_batch alone. Only
                sizes whose rows get the same bits (`equal_sizes`) keep a job's result independent of its
                companions to the bit.
            decode_size: images that go through the tokenizer's decoder at once; None is 1 on a CPU and 8
                elsewhere.

        Raises:
            ConfigError: a size is out of range.
        """
        self.model = model
        self.max_batch = check_count("max_batch", max_batch, 1, 4096)
        self.sizes = tuple(sorted(check_count("sizes", size, 1, max_batch) for size in sizes or (max_batch,)))
        if decode_size is None:
            decode_size = DECODE_SIZES.get(model.device.type, DEFAULT_DECODE_SIZE)
        self.decode_size = check_count("decode_size", decode_size, 1, 4096)
        # How often memory ran out and a size was halved, for good.
        self.halvings = 0
        # The jobs that the last `step` advanced.
        self.stepped: list[Job] = []
        self._waiting: dict[Job, Requester] = {}
        self._rows: list[_Row] = []
        self._finished: list[News] = []
        self._turns = Turns()
        self._plans: OrderedDict[tuple[str, int, int], _Plan] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting)

    @property
    def num_rows(self) -> int:
        """Jobs that have begun."""
        return len(self._rows) + len(self._finished)

    def __len__(self) -> int:
        """Return how many jobs are not done."""
        return self.num_waiting + self.num_rows

    def add(self, job: Job, requester: Requester = ANYONE) -> None:
        """Take a job, which makes its steps whenever it is its requester's turn; jobs of one begin in order."""
        self._waiting[job] = requester

    def drop(self, job: Job) -> None:
        """Forget a job, if it is there."""
        self._rows = [row for row in self._rows if row.job is not job]
        self._finished = [news for news in self._finished if news.job is not job]
        self._waiting.pop(job, None)

    def step(self) -> list[News]:
        """Make one step of the jobs whose turn it is, and decode images that are finished.

        A batch that fails is tried again in halves, down to the row that fails alone; where memory runs out,
        batches are of half the size from then on.

        Returns:
            What it brought, for some jobs nothing.
        """
        chosen, news = self._choose()
        groups: dict[tuple[str, str, bool, bool], list[_Row]] = {}
        for row in chosen:
            groups.setdefault(row.plan.key, []).append(row)
        for rows in groups.values():
            news += self._survive(rows, self._advance, self._halve_steps, lambda: self.sizes[-1])
        done = {item.job for item in news if item.error is not None}
        done |= {row.job for row in self._rows if row.made == len(row.plan.numbers)}
        self._finished += [item for item in news if item.error is None and item.job in done]
        news = [item for item in news if item.error is not None or item.job not in done]
        self._rows = [row for row in self._rows if row.job not in done]
        count = _DECODED_AT_ONCE * self.decode_size
        finished, self._finished = self._finished[:count], self._finished[count:]
        return news + self._survive(finished, self._show, self._halve_decoding, lambda: self.decode_size)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the images of tokens, in the batches that finished jobs are decoded in.

        Args:
            tokens: int64 (B, h, w).

        Returns:
            float32 (B, 3, H, W) in [0, 1], on the CPU.
        """

        def work(part: Tensor) -> Tensor:
            padded = torch.cat([part, part[:1].expand(self.decode_size - len(part), -1, -1)])
            return self.model.decode_tokens(padded)[: len(part)]

        return in_parts(self.model, tokens, work, lambda: self.decode_size, self._halve_decoding)

    def predict(self, sequence: Tensor) -> Tensor:
        """Return the logits of sequences, no more at once than there are rows in a batch.

        Args:
            sequence: int64 (B, S).

        Returns:
            float (B, S, K), on the CPU.
        """

        def work(part: Tensor) -> Tensor:
            return self.model.predict_logits(part.to(self.model.device)).cpu()

        return in_parts(self.model, sequence, work, lambda: self.sizes[-1], self._halve_steps)

    def _choose(self) -> tuple[list[_Row], list[News]]:
        """Return the rows that make the next step, and what came of jobs that could not begin."""
        begun: list[_Row | tuple[Job, Requester]] = [*self._rows, *self._waiting.items()]
        requesters = [one.requester if isinstance(one, _Row) else one[1] for one in begun]
        # A step takes about as long as it has rows on a CPU, and elsewhere hardly longer than with one.
        narrow = self.model.device.type == "cpu" and len(self.sizes) > 1
        chosen: list[_Row] = []
        failed = []
        for number in sorted(self._turns.choose(requesters, self.max_batch, narrow=narrow)):
            one = begun[number]
            if isinstance(one, _Row):
                chosen.append(one)
                continue
            job, requester = one
            del self._waiting[job]
            try:
                chosen.append(self._begin(job, requester))
            # Whatever it is, the other jobs go on.
            except Exception as error:
                failed.append(News(job, job.start_step, error=error, last=True))
            else:
                self._rows.append(chosen[-1])
        self.stepped = [row.job for row in chosen]
        return chosen, failed

    @torch.no_grad()
    def _begin(self, job: Job, requester: Requester) -> _Row:
        free = free_tokens(job.sequence[None], self.model.vocabulary.mask)[0]
        plan = self._plan(job, int(free.sum()))
        size, about = len(free), seed_words([job.seed])[0]
        # All at once, since each copy has a price.
        packed = upload(
            torch.cat([job.sequence, free.long(), about, torch.tensor([job.index])]), self.model.device
        )
        sequence, free, words, index = packed.split([size, size, 2, 1])
        row = _Row(job, requester, plan, sequence, free.bool(), words, index[0])
        noise, groups = self._noise([row]), self.model.vocabulary.groups
        memory = begin(plan.policy, row.free[None], self.model.vocabulary.num_logits, noise, groups)
        row.memory = tuple(part[0] for part in memory)
        return row

    def _plan(self, job: Job, num_free: int) -> _Plan:
        key = (json.dumps(job.config.to_dict(), sort_keys=True), job.start_step, num_free)
        if key not in self._plans:
            self._plans[key] = _make_plan(job, num_free)
            if len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _noise(self, rows: list[_Row]) -> ImageNoise:
        return ImageNoise.of_words(
            torch.stack([row.words for row in rows]),
            torch.stack([row.index for row in rows]),
            self.model.vocabulary.num_tokens + 1,
            self.model.vocabulary.num_logits,
        )

    @torch.no_grad()
    def _advance(self, rows: list[_Row]) -> list[News]:
        """Make a step of rows of one key; they are changed only once all has gone well.

        Where the policy does not adapt, the device is waited for by rows that tell their steps alone. The tokens of
        rows that have ended stay there, to be decoded.
        """
        plan = rows[0].plan
        size = next(size for size in self.sizes if size >= len(rows))
        padded = rows + rows[:1] * (size - len(rows))
        numbers = upload(torch.stack([row.plan.numbers[row.made] for row in padded]), self.model.device)
        made = self.model.decode_step(
            self.model.predictor(),
            torch.stack([row.read() for row in padded]),
            torch.stack([row.free for row in padded]),
            tuple(torch.stack(parts) for parts in zip(*(row.memory for row in padded), strict=True)),
            Numbers.unpack(numbers),
            policy=plan.policy,
            mask_token=self.model.vocabulary.mask,
            noise=self._noise(padded),
            guides=plan.guides,
            truncates=plan.truncates,
        )
        if plan.policy.adapts:
            ended = (~made.again.any(-1)).tolist()
        else:
            ended = [row.at_last for row in padded]
        grids = self.model.vocabulary.grid(made.tokens).unbind()
        told = [i for i, row in enumerate(rows) if (row.job.told or row.job.traced) and not ended[i]]
        traces = self._traces(made, [i for i, row in enumerate(rows) if row.job.traced])
        news = [
            News(row.job, row.step, grids[i], *traces.get(i, ())) for i, row in enumerate(rows) if ended[i]
        ]
        if told:
            landed = torch.stack([grids[i] for i in told]).cpu()
            pairs = zip(told, landed, strict=True)
            news += [News(rows[i].job, rows[i].step, tokens, *traces.get(i, ())) for i, tokens in pairs]
        for i, row in enumerate(rows):
            row.sequence, row.memory = made.sequence[i], tuple(part[i] for part in made.memory)
            row.made = len(row.plan.numbers) if ended[i] else row.made + 1
        return news

    def _traces(self, made: Made, rows: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Return what was unknown, bool (h, w), and the tokens' probabilities, float32 (h, w), of some rows."""
        if not rows:
            return {}
        confidence = log_probs_of(made.logits[rows], made.tokens[rows]).exp()
        parts = (self.model.vocabulary.grid(part).cpu() for part in (made.unknown[rows], confidence))
        return dict(zip(rows, zip(*parts, strict=True), strict=True))

    def _show(self, finished: list[News]) -> list[News]:
        grids = [item.tokens for item in finished if item.tokens is not None]
        wanted = [grid for item, grid in zip(finished, grids, strict=True) if item.job.pixels]
        decoded = iter(self.decode(torch.stack(wanted)) if wanted else ())
        return [
            item._replace(tokens=grid, pixels=next(decoded) if item.job.pixels else None, last=True)
            for item, grid in zip(finished, torch.stack(grids).cpu(), strict=True)
        ]

    def _survive(
        self,
        items: list[Item],
        work: Callable[[list[Item]], list[News]],
        halve: Callable[[], bool],
        at_once: Callable[[], int],
    ) -> list[News]:
        """Return what work on items brings, in parts; items that fail alone bring their errors."""
        news: list[News] = []
        while items:
            part, items = items[: at_once()], items[at_once() :]
            failure = None
            try:
                news += work(part)
            # Whatever it is, the other jobs go on.
            except Exception as error:
                failure = error
            if failure is None:
                continue
            if ran_out_of_memory(failure):
                free_memory(self.model, failure)
                if halve():
                    items = part + items
                    continue
            if len(part) == 1:
                news.append(News(part[0].job, part[0].step, error=failure, last=True))
                continue
            failure, half = None, len(part) // 2
            for some in (part[:half], part[half:]):
                news += self._survive(some, work, halve, at_once)
        return news

    def _halve_steps(self) -> bool:
        half = self.sizes[-1] // 2
        if half:
            self.sizes = tuple(size for size in self.sizes if size <= half) or (half,)
            self.halvings += 1
        return half > 0

    def _halve_decoding(self) -> bool:
        can = self.decode_size > 1
        if can:
            self.decode_size //= 2
            self.halvings += 1
        return can


def _make_plan(job: Job, num_free: int) -> _Plan:
    config = job.config
    policy = make_policy(config.policy, config.policy_options)
    plan = plan_steps(config, len(job.sequence) - 1, remasks=policy.remasks)
    first = min(job.start_step, plan.steps - 1)
    free = torch.tensor([[num_free]])
    guides = any(plan.guides(number) for number in range(first, plan.steps))
    numbers = torch.cat([plan.numbers(number, first, free).pack() for number in range(first, plan.steps)])
    options = json.dumps(config.policy_options, sort_keys=True)
    key = (config.policy, options, guides, plan.truncates)
    return _Plan(key, policy, guides, plan.truncates, first, numbers)
