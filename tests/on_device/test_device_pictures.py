"""What users call, on a device: the CPU's tokens and pixels, and how often a batch makes the host wait."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import fake_device
from fake_device import FROM, FROM_FREE, READ, TO, TO_FREE, counting
from maskgit import MaskGIT, hub
from maskgit.foundation.devices import Landing, upload
from maskgit.sampler.policies import POLICIES

PHOTO = Image.fromarray((np.random.default_rng(0).random((40, 50, 3)) * 255).astype("uint8"))
PAINTED = np.arange(40 * 50).reshape(40, 50) % 50 < 20
HALF = torch.arange(64).view(8, 8) % 2 == 0


def free(model):
    """Return the model as if it had been trained with label dropout."""
    config = dataclasses.replace(model.config, label_dropout=0.1)
    return MaskGIT(config, model.tokenizer, model.transformer)


@pytest.fixture(scope="module")
def both(tiny, on_device):
    return free(tiny), free(on_device)


CALLS = {
    "generate": lambda m: m.generate([1, 2, None], num_images=2, seed=3, batch_size=4, steps=3),
    "guided": lambda m: m.generate([1, 2], seed=3, steps=3, guidance_scale=2.0),
    "traced": lambda m: m.generate([1, 2], seed=3, steps=3, return_steps=True),
    "edit": lambda m: m.edit(PHOTO, [(3, 3, 10, 10)], 2, num_images=2, seed=2, steps=6),
    "inpaint": lambda m: m.inpaint(PHOTO, PAINTED, seed=2, steps=3),
    "outpaint": lambda m: m.outpaint(PHOTO, left=10, label=3, steps=2),
    "panorama": lambda m: m.panorama([1, 2], 48, steps=2),
    "vary": lambda m: m.vary(PHOTO, 0.5, steps=3, num_images=2),
    "between classes": lambda m: m.interpolate_classes(1, 2, steps=4, num_images=2),
    "between images": lambda m: m.interpolate_images(PHOTO, PHOTO.rotate(90), 1, refine=1, steps=3),
    "reconstruct": lambda m: m.reconstruct(PHOTO),
    "best": lambda m: m.generate_best([1, 2], candidates=3, num_images=2, batch_size=2, steps=2),
    "best of a scorer": lambda m: m.generate_best(
        1, candidates=3, batch_size=2, steps=2, scorer=lambda images, labels: images.mean((1, 2, 3))
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_gives_what_it_gives_on_the_cpu(both, name):
    here, there = (CALLS[name](model) for model in both)
    assert torch.equal(here.tokens, there.tokens)
    for field in dataclasses.fields(here):
        one, other = getattr(here, field.name), getattr(there, field.name)
        if isinstance(one, torch.Tensor):
            assert other.device.type == "cpu", field.name
            torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1 / 510)
    if here.trace is not None:
        assert there.trace.tokens.device.type == there.trace.confidence.device.type == "cpu"
        assert torch.equal(here.trace.tokens, there.trace.tokens)


def test_likelihoods_and_guesses_are_the_cpus(both):
    tokens = both[0].generate([1, 2], seed=3, steps=2).tokens
    for call in (
        lambda model: model.log_likelihood(tokens, [1, 2], token_mask=HALF, batch_size=1),
        lambda model: model.guess_class(tokens[:1]),
        lambda model: model.guess_class(tokens[:1], shortlist=2, folds=3),
    ):
        here, there = (call(model) for model in both)
        assert there.device.type == "cpu"
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_waits_for_its_pixels_alone(on_device, policy):
    def counted(num_images):
        with counting() as counts:
            on_device.generate(1, num_images=num_images, batch_size=2, steps=4, policy=policy)
        return counts

    counted(2)  # Tables are copied once.
    one, three = counted(2), counted(6)
    for counts, batches in ((one, 1), (three, 3)):
        assert counts.waits == 0, counts
        # Sequences go there; pixels and tokens come back, which is waited for by an event.
        assert counts[TO_FREE] == batches
        asked = counts[FROM_FREE] - 2 * batches
        assert 0 <= asked <= 4 * batches if POLICIES[policy].adapts else asked == 0


def test_a_likelihood_waits_once_for_each_batch(on_device):
    tokens = on_device.generate([1, 2, 3], steps=2).tokens
    with counting() as counts:
        on_device.log_likelihood(tokens, 1, batch_size=2)
    assert counts.events == {TO_FREE: 2 * 2, FROM: 2}, counts


def test_a_callback_sees_the_tokens_on_the_device(on_device):
    seen = []
    on_device.generate(1, steps=3, callback=lambda step, indices, tokens: seen.append((step, tokens.device)))
    assert seen == [(step, torch.device("gpu:0")) for step in range(3)]


def test_files_are_loaded_onto_the_device(tiny, tmp_path):
    hub.save_model(tiny, tmp_path / "model")
    model = hub.from_pretrained(tmp_path / "model", device="gpu", dtype=torch.float16)
    assert {p.device for p in model.transformer.parameters()} == {torch.device("gpu:0")}
    assert {p.dtype for p in model.tokenizer.parameters()} == {torch.float16}
    hub.save_model(hub.load_model(tmp_path / "model", device="gpu"), tmp_path / "again")
    for name in ("tokenizer", "transformer"):
        first, again = (tmp_path / place / name / "model.safetensors" for place in ("model", "again"))
        assert first.read_bytes() == again.read_bytes()


def test_what_lands_is_there_only_after_waiting():
    landing = Landing(torch.arange(4, device="gpu"))
    assert not landing.landed
    assert landing._parts[0].tolist() == [77] * 4
    assert landing.wait()[0].tolist() == [0, 1, 2, 3]
    here = Landing(torch.arange(4))
    assert here.landed
    assert here.wait()[0].tolist() == [0, 1, 2, 3]


def test_what_lands_is_awaited_on_the_stream_of_its_own_device(kind, monkeypatch):
    device = torch.device("gpu:1" if kind == "cuda" else "gpu:0")
    asked = []
    monkeypatch.setattr(torch.gpu, "current_stream", lambda device=None: asked.append(device))
    assert Landing(torch.arange(2, device=device)).wait()[0].tolist() == [0, 1]
    assert asked == [device]


def test_uploads_wait_for_nothing():
    with counting() as counts:
        assert upload(torch.ones(3), torch.device("gpu")).device == torch.device("gpu:0")
        there = torch.ones(3, device="gpu")
        assert upload(there, there.device) is there
    assert counts.events == {TO_FREE: 1}
    here = torch.ones(3)
    assert upload(here, torch.device("cpu")) is here


def test_the_device_keeps_the_rules_of_devices(kind):
    there = torch.arange(3, device="gpu")
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.arange(3)
    with pytest.raises(RuntimeError, match="same device"):
        torch.stack([there[0], torch.tensor(1)])
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(there)
    if kind == "mps":
        with pytest.raises(TypeError, match="float64"):
            there.double()
    assert torch.equal((there + torch.tensor(1)).cpu(), torch.arange(1, 4))
    assert there.new_tensor([7]).device == torch.tensor([7], device="gpu").device == torch.device("gpu:0")


@pytest.mark.parametrize(
    ("work", "event"),
    [
        (lambda x: x[0].item(), READ),
        (lambda x: x.tolist(), READ),
        (lambda x: bool(x.any()), READ),
        (lambda x: x[x > 1], READ),
        (lambda x: torch.bincount(x), READ),
        (lambda x: x.cpu(), FROM),
        (lambda x: torch.where(x > 1, torch.tensor(0), x), TO),
        (lambda x: x[torch.tensor([0, 2])], TO),
        (lambda x: torch.tensor([1, 2], device=x.device), TO),
        (lambda x: torch.ones(2).to(x.device, non_blocking=True), TO),
        (lambda x: torch.where(x > 1, 0, x) + x[:2].sum() + torch.tensor(1), None),
    ],
)
def test_what_makes_the_host_wait_is_counted(work, event):
    there = torch.arange(3, device="gpu")
    with counting() as counts:
        work(there)
    assert counts.events == ({} if event is None else {event: 1})


def test_waits_are_counted_by_the_line_of_the_package(on_device):
    with counting() as counts:
        on_device.encode_pixels(torch.zeros(1, 3, 32, 32))
    assert all(line.split(", ")[-1].startswith("model.py:") for line in counts.lines), counts
    assert fake_device.NAME in str(on_device.device)
