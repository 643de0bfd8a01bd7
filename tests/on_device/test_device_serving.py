"""The batcher and the server's worker on a device: the pipeline's tokens, for jobs of all kinds together."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from fake_device import FROM, READ, TO, counting
from maskgit import MaskGIT
from maskgit.apps.serving.service import Limits, Service
from maskgit.engine.batching import Batcher, Job

PHOTO = Image.fromarray((np.random.default_rng(0).random((40, 50, 3)) * 255).astype("uint8"))
JOBS = [
    (1, {"steps": 4}),
    (2, {"steps": 3, "guidance_scale": 2.0}),
    (1, {"steps": 4, "policy": "halton"}),
    (2, {"steps": 4, "policy": "entropy_bounded"}),
    (0, {"steps": 4, "policy": "stable"}),
    (1, {"steps": 4, "policy": "remdm"}),
    (2, {"steps": 2, "policy": "self_critic"}),
]


@pytest.fixture(scope="module")
def both(tiny, on_device):
    """The model here and there, as if it had been trained with label dropout."""
    config = dataclasses.replace(tiny.config, label_dropout=0.1)
    return [MaskGIT(config, model.tokenizer, model.transformer) for model in (tiny, on_device)]


def job(model, label, seed, **settings):
    sequence = model.vocabulary.sequence(torch.tensor([label]))[0]
    return Job(sequence, model.sampler_config(**settings), seed)


def finish(batcher):
    news = []
    while len(batcher):
        news += batcher.step()
    for one in news:
        if one.error is not None:
            raise one.error
    return {one.job: one for one in news if one.last}


def test_mixed_jobs_give_the_pipelines_tokens(both):
    here, there = both
    batcher = Batcher(there, max_batch=4)
    jobs = [job(there, label, 2**63 + i, **settings) for i, (label, settings) in enumerate(JOBS)]
    for one in jobs:
        batcher.add(one)
    made = finish(batcher)
    for i, (label, settings) in enumerate(JOBS):
        wanted = here.generate(label, seed=2**63 + i, **settings)
        assert torch.equal(made[jobs[i]].tokens, wanted.tokens[0]), settings
        torch.testing.assert_close(made[jobs[i]].pixels, wanted.images[0], rtol=0, atol=1 / 510)


def test_a_step_in_the_middle_reads_nothing(both):
    batcher = Batcher(both[1], max_batch=2)
    for seed in range(2):
        batcher.add(job(both[1], 1, seed, steps=5))
    batcher.step()
    batcher.step()
    with counting() as counts:
        assert batcher.step() == []
    assert counts[READ] == counts[FROM] == 0, counts
    # The rows' numbers, and their seeds and indices.
    assert counts[TO] <= 3, counts


def test_the_server_gives_the_pipelines_images(both):
    here, there = both
    service = Service(there, "tiny", Limits(queue_size=8, max_batch=4))
    service.start()
    try:
        service.wait_ready()
        for work in (
            lambda m: m.generate([1, 2], num_images=2, seed=1, steps=3),
            lambda m: m.edit(PHOTO, [(3, 3, 10, 10)], 1, seed=2, steps=4),
            lambda m: m.vary(PHOTO, 0.5, 2, steps=3),
            lambda m: m.reconstruct(PHOTO),
        ):
            made, wanted = service.submit(work).future.result(), work(here)
            assert torch.equal(made.tokens, wanted.tokens)
            torch.testing.assert_close(made.images, wanted.images, rtol=0, atol=1 / 510)
    finally:
        service.close()
