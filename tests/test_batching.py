"""Continuous batching against the pipeline, and what it does when something fails."""

from dataclasses import replace

import pytest
import torch

from maskgit import MaskGIT
from maskgit.engine.batch_sizes import equal_sizes
from maskgit.engine.batching import Batcher, Job
from maskgit.engine.turns import Requester
from maskgit.errors import ConfigError
from maskgit.results import Draw

MIXED = [
    ("frog", {"steps": 4}),
    ("cat", {"steps": 6, "guidance_scale": 1.0}),
    ("deer", {"steps": 5, "policy": "halton"}),
    ("dog", {"steps": 6, "policy": "entropy_bounded"}),
    ("dog", {"steps": 7, "policy": "stable", "policy_options": {"confidence": 0.1}}),
    (None, {"steps": 3, "temperature": 0.5}),
    ("ship", {"steps": 5, "policy": "remdm"}),
    ("truck", {"steps": 2, "policy": "self_critic"}),
    ("bird", {"steps": 1}),
    ("horse", {"steps": 5, "guidance_schedule": "linear"}),
]


@pytest.fixture(scope="module")
def pipe():
    return MaskGIT.from_pretrained()


def job(pipe, label="frog", seed=0, index=0, told=False, start_step=0, **settings):
    sequence = pipe.vocabulary.sequence(torch.tensor([pipe.label(label)]))[0]
    return Job(sequence, pipe.sampler_config(**settings), seed, index, start_step, told)


def finish(batcher):
    """Run a batcher to its end; return the last news of every job, and all news."""
    every = []
    while len(batcher):
        every += batcher.step()
    last = {news.job: news for news in every if news.last}
    assert len([news for news in every if news.last]) == len(last), "told twice"
    return last, every


def test_mixed_jobs_give_the_pipelines_tokens(pipe):
    batcher = Batcher(pipe, max_batch=4, sizes=(2, 4))
    jobs = [
        job(pipe, label, seed=2**63 + i, index=i, **settings) for i, (label, settings) in enumerate(MIXED)
    ]
    for one in jobs:
        batcher.add(one)
    results, _ = finish(batcher)
    for i, (label, settings) in enumerate(MIXED):
        wanted = pipe.generate(label, seed=2**63 + i, first_index=i, **settings)
        assert torch.equal(results[jobs[i]].tokens, wanted.tokens[0]), settings
        torch.testing.assert_close(results[jobs[i]].pixels, wanted.images[0], rtol=0, atol=1 / 510)


def test_an_edit_begins_later_and_keeps_what_is_known(pipe):
    tokens = pipe.generate("cat", seed=3, steps=2).tokens
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 3:7] = True
    sequences = pipe.vocabulary.sequence(torch.tensor([5]), tokens, mask)
    config = pipe.sampler_config(steps=6)
    batcher = Batcher(pipe, max_batch=2)
    edit = Job(sequences[0], config, seed=4, start_step=2)
    for one in (job(pipe, steps=6), edit):
        batcher.add(one)
    made = finish(batcher)[0][edit]
    assert torch.equal(made.tokens, pipe.fill(sequences, config, Draw(seed=4), start_step=2).tokens[0])
    assert torch.equal(made.tokens[~mask], tokens[0][~mask])


def test_the_same_bytes_alone_and_among_others(pipe):
    alone = Batcher(pipe, max_batch=4)
    first = job(pipe, "frog", seed=7, steps=5)
    alone.add(first)
    wanted = finish(alone)[0][first]
    crowded = Batcher(pipe, max_batch=4)
    second = job(pipe, "frog", seed=7, steps=5)
    for i in range(3):
        crowded.add(job(pipe, i, seed=i, steps=2 + i))
    crowded.step()
    crowded.add(second)
    for i in range(4):
        crowded.add(job(pipe, i, seed=i, steps=3))
    made = finish(crowded)[0][second]
    assert torch.equal(made.tokens, wanted.tokens)
    assert torch.equal(made.pixels, wanted.pixels)


def test_finished_rows_leave_and_waiting_ones_join(pipe):
    batcher = Batcher(pipe, max_batch=2)
    short, long, waiting = job(pipe, steps=1), job(pipe, steps=3), job(pipe, steps=1)
    for one in (short, long, waiting):
        batcher.add(one)
    assert [news.job for news in batcher.step()] == [short]
    assert (batcher.num_rows, batcher.num_waiting) == (1, 1)
    assert [news.job for news in batcher.step()] == [waiting]
    assert [news.job for news in batcher.step()] == [long]
    assert not len(batcher)


@pytest.mark.parametrize("client", ["a", "b"])
def test_a_small_request_is_not_kept_waiting_by_a_large_one(pipe, client):
    batcher = Batcher(pipe, max_batch=16, sizes=(1, 2, 4, 8, 16))
    for number in range(16):
        batcher.add(job(pipe, seed=number, steps=64), Requester("a", 1))
    for _ in range(3):
        batcher.step()
    small = job(pipe, "cat", seed=7, steps=4)
    batcher.add(small, Requester(client, 2))
    rows, made = 0, None
    while made is None:
        made = next((news for news in batcher.step() if news.job is small), None)
        rows += len(batcher.stepped)
    # Rows are what a step takes its time for on a CPU.
    assert rows <= 5 * 4
    alone = Batcher(pipe, max_batch=16, sizes=(1, 2, 4, 8, 16))
    again = job(pipe, "cat", seed=7, steps=4)
    alone.add(again)
    wanted = finish(alone)[0][again]
    assert torch.equal(made.tokens, wanted.tokens)
    assert torch.equal(made.pixels, wanted.pixels)


def test_many_images_that_end_together_are_not_decoded_in_one_go(pipe):
    batcher = Batcher(pipe, max_batch=16, decode_size=1)
    for number in range(9):
        batcher.add(job(pipe, seed=number, steps=1), Requester("a"))
    assert [len(batcher.step()) for _ in range(3)] == [4, 4, 1]
    assert not len(batcher)


def test_steps_are_told_where_asked(pipe):
    batcher = Batcher(pipe, max_batch=2)
    loud, quiet = job(pipe, steps=3, told=True), job(pipe, steps=3)
    batcher.add(loud)
    batcher.add(quiet)
    _, every = finish(batcher)
    assert [(news.step, news.last) for news in every if news.job is loud] == [
        (0, False),
        (1, False),
        (2, True),
    ]
    assert [news.step for news in every if news.job is quiet] == [2]


def test_jobs_of_tokens_alone_are_not_decoded(pipe, monkeypatch):
    batcher = Batcher(pipe, max_batch=2)
    wanted, tokens_alone = job(pipe, steps=2), replace(job(pipe, steps=2), pixels=False)
    decoded = []
    decode = pipe.decode_tokens
    monkeypatch.setattr(pipe, "decode_tokens", lambda tokens: decoded.append(len(tokens)) or decode(tokens))
    for one in (wanted, tokens_alone):
        batcher.add(one)
    results, _ = finish(batcher)
    assert torch.equal(results[tokens_alone].tokens, results[wanted].tokens)
    assert results[tokens_alone].pixels is None
    assert decoded == [1]


def test_a_dropped_job_is_gone(pipe):
    batcher = Batcher(pipe, max_batch=1)
    first, second, third = (job(pipe, steps=2, seed=i) for i in range(3))
    for one in (first, second, third):
        batcher.add(one)
    batcher.step()
    batcher.drop(first)
    batcher.drop(second)
    assert set(finish(batcher)[0]) == {third}


def test_memory_running_out_halves_the_batch_and_loses_nothing(pipe, monkeypatch):
    wanted = {i: pipe.generate("frog", seed=i, steps=3).tokens[0] for i in range(5)}
    predict = pipe.predict_logits
    sizes = []

    def small(sequence):
        # Guided: twice as many sequences as rows.
        sizes.append(len(sequence) // 2)
        if len(sequence) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return predict(sequence)

    monkeypatch.setattr(pipe, "predict_logits", small)
    batcher = Batcher(pipe, max_batch=8)
    jobs = [job(pipe, steps=3, seed=i) for i in range(5)]
    for one in jobs:
        batcher.add(one)
    results, _ = finish(batcher)
    assert all(torch.equal(results[jobs[i]].tokens, wanted[i]) for i in range(5))
    assert sizes[:3] == [8, 4, 2]
    assert set(sizes[3:]) == {2}
    assert batcher.halvings == 2


def test_memory_running_out_in_the_decoder_loses_nothing(pipe, monkeypatch):
    decode = pipe.decode_tokens

    def small(tokens):
        if len(tokens) > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return decode(tokens)

    monkeypatch.setattr(pipe, "decode_tokens", small)
    batcher = Batcher(pipe, max_batch=4, decode_size=4)
    jobs = [job(pipe, steps=1, seed=i) for i in range(3)]
    for one in jobs:
        batcher.add(one)
    results, _ = finish(batcher)
    assert [results[one].error for one in jobs] == [None] * 3
    assert batcher.decode_size == 1


@pytest.mark.parametrize("error", [ValueError("bad"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_row_that_fails_alone_fails_alone(pipe, monkeypatch, error):
    predict = pipe.predict_logits
    bad = pipe.vocabulary.num_codes + pipe.label("cat")

    def picky(sequence):
        if (sequence[:, 0] == bad).any():
            raise error
        return predict(sequence)

    wanted = [pipe.generate(label, seed=1, steps=2).tokens[0] for label in ("frog", "dog", "ship")]
    monkeypatch.setattr(pipe, "predict_logits", picky)
    batcher = Batcher(pipe, max_batch=4)
    jobs = {label: job(pipe, label, seed=1, steps=2) for label in ("frog", "cat", "dog", "ship")}
    for one in jobs.values():
        batcher.add(one)
    results, _ = finish(batcher)
    assert results[jobs.pop("cat")].error is error
    for one, tokens in zip(jobs.values(), wanted, strict=True):
        assert torch.equal(results[one].tokens, tokens)


def test_equal_sizes_are_those_whose_bits_agree(pipe, monkeypatch):
    predict = pipe.predict_logits

    def uneven(sequence):
        # As if another kernel served fewer than six sequences.
        logits = predict(sequence)
        return logits if len(sequence) >= 6 else torch.nextafter(logits, torch.tensor(torch.inf))

    monkeypatch.setattr(pipe, "predict_logits", uneven)
    assert equal_sizes(pipe, 12) == (8, 12)


@pytest.mark.parametrize(
    "numbers", [{"seed": -1}, {"seed": 2**64}, {"index": -1}, {"start_step": 4}, {"start_step": -1}]
)
def test_wrong_numbers_are_refused(pipe, numbers):
    with pytest.raises(ConfigError, match=next(iter(numbers))):
        job(pipe, steps=4, **numbers)


def test_wrong_sizes_are_refused(pipe):
    with pytest.raises(ConfigError, match="max_batch"):
        Batcher(pipe, max_batch=0)
    with pytest.raises(ConfigError, match="sizes"):
        Batcher(pipe, max_batch=4, sizes=(8,))
