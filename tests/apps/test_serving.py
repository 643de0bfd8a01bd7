"""The service without HTTP: requests of all kinds in shared batches, and how they end."""

import itertools
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit import MaskGIT, images
from maskgit.apps.serving import worker
from maskgit.apps.serving.errors import (
    ClientGoneError,
    DeadlineError,
    FailedError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from maskgit.apps.serving.handlers import MAKERS, count_steps
from maskgit.apps.serving.service import Limits, Service
from maskgit.apps.serving.worker import Ticket
from maskgit.errors import ConfigError
from servers import wait_for

PHOTO = Image.fromarray((np.random.default_rng(0).random((40, 50, 3)) * 255).astype("uint8"))
PAINTED = np.arange(40 * 50).reshape(40, 50) % 50 < 20


@pytest.fixture(scope="module")
def pipe():
    return MaskGIT.from_pretrained()


@pytest.fixture(scope="module")
def service():
    made = Service(MaskGIT.from_pretrained(), "cifar10", Limits(queue_size=8, max_batch=4))
    made.start()
    made.wait_ready()
    yield made
    made.close()


KINDS = {
    "generate": lambda m: m.generate("frog", num_images=3, seed=1, first_index=5, steps=4),
    "edit": lambda m: m.edit(PHOTO, [(3, 3, 10, 10)], "cat", seed=2, steps=6),
    "inpaint": lambda m: m.inpaint(PHOTO, PAINTED, seed=2, steps=4),
    "outpaint": lambda m: m.outpaint(PHOTO, left=10, label=3, steps=3),
    "vary": lambda m: m.vary(PHOTO, 0.5, "dog", steps=3),
    "panorama": lambda m: m.panorama(["ship", "bird"], 64, steps=2),
    "interpolate_classes": lambda m: m.interpolate_classes("frog", "ship", num_images=2, seed=3, steps=4),
    "switched at once": lambda m: m.interpolate_classes("frog", "ship", switch=0.0, steps=3),
    "switched after steps of their own": lambda m: m.interpolate_classes(
        "frog", "cat", num_images=2, steps=6, policy="entropy_bounded"
    ),
    "interpolate_images": lambda m: m.interpolate_images(PHOTO, PHOTO.rotate(90), "cat", refine=1, steps=3),
    "generate_best": lambda m: m.generate_best(["frog"], candidates=3, steps=2),
}
SAME_KINDS = KINDS | {"reconstruct": lambda m: m.reconstruct(PHOTO)}
TRACED = {
    "generate": lambda m: m.generate(["frog", "cat"], steps=4, return_steps=True),
    "steps of their own": lambda m: m.generate(
        ["frog", "dog"], steps=6, policy="entropy_bounded", return_steps=True
    ),
    "edit": lambda m: m.edit(PHOTO, [(3, 3, 10, 10)], "cat", steps=6, return_steps=True),
    "vary": lambda m: m.vary(PHOTO, 0.5, "dog", steps=4, num_images=2, return_steps=True),
    "interpolate_classes": lambda m: m.interpolate_classes("frog", "ship", steps=3, return_steps=True),
}


def test_every_method_gives_what_the_pipeline_gives(pipe, service):
    kinds = list(SAME_KINDS.items())
    for some in (kinds[:6], kinds[6:]):
        accepted = [service.submit(work) for _, work in some]
        for (kind, work), one in zip(some, accepted, strict=True):
            _compare(kind, one.future.result(), work(pipe))
    wait_for(lambda: service.num_accepted == 0)


def _compare(kind, made, wanted):
    assert torch.equal(made.tokens, wanted.tokens), kind
    torch.testing.assert_close(made.images, wanted.images, rtol=0, atol=1 / 510)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_makes_its_images_in_the_shared_batches(service, kind, monkeypatch):
    predict, seen = service.model.predict_logits, []

    def predict_logits(sequence):
        seen.append(len(sequence))
        return predict(sequence)

    monkeypatch.setattr(service.model, "predict_logits", predict_logits)
    monkeypatch.setattr(service.model, "fill_batches", None)
    images, steps, calls = service.stats.images, service.stats.steps, len(seen)
    made = service.submit(KINDS[kind]).future.result()
    assert service.stats.images - images >= len(made.images)
    assert service.stats.steps > steps
    # A batch's rows, and as many without their classes.
    assert len(seen) > calls
    assert max(seen) <= 2 * service.limits.max_batch


@pytest.mark.parametrize("kind", TRACED)
def test_steps_are_traced_as_in_the_pipeline(pipe, service, kind):
    made, wanted = service.submit(TRACED[kind]).future.result(), TRACED[kind](pipe)
    assert torch.equal(made.trace.tokens, wanted.trace.tokens)
    assert torch.equal(made.trace.unknown, wanted.trace.unknown)
    torch.testing.assert_close(made.trace.final_confidence, wanted.trace.final_confidence)


MANY = {
    "edit": lambda m: m.edit(PHOTO, [(3, 3, 10, 10)], "cat", num_images=4, steps=3),
    "inpaint": lambda m: m.inpaint(PHOTO, PAINTED, num_images=4, steps=2),
    "vary": lambda m: m.vary(PHOTO, 0.5, "dog", num_images=3, steps=3),
    "outpaint": lambda m: m.outpaint(PHOTO, left=10, label=3, num_images=4, steps=2),
    "interpolate_classes": lambda m: m.interpolate_classes("frog", "ship", num_images=4, steps=2),
}


@pytest.mark.parametrize("kind", MANY)
def test_where_memory_runs_out_edits_go_on_in_smaller_batches(pipe, kind, monkeypatch):
    service = Service(MaskGIT.from_pretrained(), "cifar10", Limits(max_batch=4))
    service.start()
    service.wait_ready()
    predict = service.model.predict_logits

    def narrow(sequence):
        if len(sequence) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return predict(sequence)

    monkeypatch.setattr(service.model, "predict_logits", narrow)
    made = service.submit(MANY[kind], images=4).future.result()
    assert torch.equal(made.tokens, MANY[kind](pipe).tokens)
    assert service.stats.halvings >= 1
    assert service.stats.failures == 0
    service.close()


WORK = {
    "generate": {"num_images": 2, "steps": 3},
    "generate, more steps than tokens": {"steps": 70},
    "edit": {"image": PHOTO, "boxes": [[3, 3, 10, 10]], "steps": 7},
    "edit from the beginning": {"image": PHOTO, "boxes": [[3, 3, 10, 10]], "steps": 4, "start_step": 0},
    "inpaint": {"image": PHOTO, "mask": PAINTED, "num_images": 2, "steps": 4, "start_step": 1},
    "inpaint, guessed": {"image": PHOTO, "mask": PAINTED, "class": "guess", "steps": 2},
    "outpaint": {"image": PHOTO, "left": 40, "top": 30, "num_images": 2, "steps": 2},
    "outpaint into a canvas": {"image": PHOTO, "canvas": [90, 50], "steps": 2},
}


@pytest.mark.parametrize("kind", WORK)
def test_the_steps_of_a_request_are_known_before_it_is_made(service, kind):
    command = re.split(r"\W", kind)[0]
    maker = MAKERS[command]
    files = {
        name: images.encode(Image.fromarray(v) if name == "mask" else v)
        for name, v in WORK[kind].items()
        if name in ("image", "mask")
    }
    body = maker.schema.model_validate({"class": "cat", **WORK[kind], **files})
    expected = count_steps(service.model, body)
    accepted = service.submit(lambda model: maker.make(model, body, None), steps=expected)
    accepted.future.result()
    assert accepted.ticket.made == expected


def test_the_next_client_is_told_when_there_will_be_a_place(service, monkeypatch):
    # By the service's clock, a step of an image takes 2 s, for generation and edits alike.
    ticks = itertools.count()
    worker_ = service._worker
    monkeypatch.setattr(worker, "_FADING", 1.0)
    monkeypatch.setattr(worker_, "_busy", 0.0)
    monkeypatch.setattr(worker_, "_made", 0.0)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: 2.0 * next(ticks))
    service.submit(lambda m: m.vary(PHOTO, 1.0, "dog", steps=8)).future.result()
    wait_for(lambda: service.num_accepted == 0)
    turns, made = worker_._busy / 2, worker_._made
    # A turn for each step, and for encoding and decoding.
    assert made == 8
    assert service.stats.seconds_per_step == pytest.approx(2.0 * turns / 8, rel=0.2)

    monkeypatch.setattr(service.stats, "seconds_per_step", 2.0)
    stop = threading.Event()
    held = [
        service.submit(lambda m: stop.wait(120), images=n, steps=k, client=str(n))
        for n, k in ((2, 20), (3, 6), (3, 40))
    ]
    for images_, seconds in (
        (3, 6 + 6 + 6),  # The one with 6 steps ends first, when all have made 6.
        (4, 6 + 20 + 20),
        (8, 6 + 20 + 40),
    ):
        with pytest.raises(OverloadedError) as caught:
            service.submit(lambda m: None, images=images_)
        assert caught.value.retry_after == 2 * seconds
    held[0].ticket.made = 20
    with pytest.raises(OverloadedError) as caught:
        service.submit(lambda m: None, images=2)
    assert caught.value.retry_after == 2 * 3
    stop.set()
    for accepted in held:
        accepted.future.result()
    wait_for(lambda: service.num_accepted == 0)


def test_the_queue_is_bounded_in_steps(service):
    stop = threading.Event()
    held = service.submit(lambda m: stop.wait(120), steps=4000)
    with pytest.raises(
        OverloadedError, match=r"4,000 of 4,096 decoding steps are taken, and this request needs 97"
    ):
        service.submit(lambda m: None, steps=97)
    service.submit(lambda m: None, steps=96).future.result()
    with pytest.raises(InvalidRequestError, match=r"5,000 decoding steps.*fewer images or steps"):
        service.submit(lambda m: None, steps=5000)
    stop.set()
    held.future.result()
    wait_for(lambda: service.num_accepted == 0)


def test_requests_share_the_batch_by_client(service):
    """A small request behind 8 large images ends while they are at their first steps, with the bytes that it has alone."""
    small = lambda m: m.generate("cat", seed=3, steps=4)  # noqa: E731
    alone = service.submit(small).future.result()
    large = service.submit(lambda m: m.generate("frog", num_images=7, steps=256), images=7, client="a")
    wait_for(lambda: large.ticket.made >= 4)
    before = large.ticket.made
    made = service.submit(small, client="b").future.result()
    rows = large.ticket.made - before
    large.ticket.cancel()
    # Of the 4 rows of a step, at least one is the small request's; a few steps pass until it is heard and answered.
    assert rows < 256
    assert torch.equal(made.images, alone.images)
    wait_for(lambda: service.num_accepted == 0)


def test_calls_of_one_client_do_not_hold_up_anothers(service):
    """Twenty calls of a client are waiting; another's is answered after one of them."""
    order, first, go_on = [], threading.Event(), threading.Event()

    def call(name):
        ticket = Ticket(30, client=name[0])
        service._worker.call(lambda: order.append(name), ticket)

    def block():
        first.set()
        go_on.wait(30)

    with ThreadPoolExecutor(24) as pool:
        pool.submit(service._worker.call, block, Ticket(30, client="a"))
        assert first.wait(30)
        many = [pool.submit(call, f"a{number}") for number in range(20)]
        wait_for(lambda: len(service._worker._calls) == 20)
        one = pool.submit(call, "b")
        wait_for(lambda: len(service._worker._calls) == 21)
        go_on.set()
        for future in (*many, one):
            future.result()
    assert order.index("b") <= 1


def test_a_callback_is_told_of_every_step_in_the_requests_own_thread(service):
    told = []

    def work(model):
        def callback(step, indices, tokens):
            # Another thing asked of the model meanwhile must not wait for itself.
            told.append((step, indices.tolist(), model.decode_tokens(tokens).shape, threading.get_ident()))

        model.generate("frog", steps=3, first_index=9, callback=callback)
        return threading.get_ident()

    thread = service.submit(work).future.result()
    assert [(step, indices) for step, indices, *_ in told] == [(step, [9]) for step in range(3)]
    assert all(shape == (1, 3, 32, 32) and where == thread for _, _, shape, where in told)


def test_a_wrong_request_fails_alone(pipe, service):
    good = service.submit(lambda m: m.generate("frog", seed=1, steps=3))
    bad = service.submit(lambda m: m.generate("frg", steps=3))
    other = service.submit(lambda m: m.generate("cat", seed=2, steps=3))
    with pytest.raises(ConfigError, match="Did you mean 6: frog"):
        bad.future.result()
    for accepted, label, seed in ((good, "frog", 1), (other, "cat", 2)):
        assert torch.equal(accepted.future.result().tokens, pipe.generate(label, seed=seed, steps=3).tokens)


def test_a_failing_row_fails_its_request_alone(pipe, service, monkeypatch, caplog):
    predict = service.model.predict_logits
    bad = pipe.vocabulary.num_codes + pipe.label("cat")

    def picky(sequence):
        assert not (sequence[:, 0] == bad).any(), "not a cat"
        return predict(sequence)

    monkeypatch.setattr(service.model, "predict_logits", picky)
    accepted = [
        service.submit(lambda m, label=label: m.generate(label, seed=1, steps=3))
        for label in ("frog", "cat", "dog")
    ]
    with pytest.raises(FailedError, match="log says why"):
        accepted[1].future.result()
    assert "not a cat" in caplog.text
    for i, label in ((0, "frog"), (2, "dog")):
        wanted = pipe.generate(label, seed=1, steps=3)
        assert torch.equal(accepted[i].future.result().tokens, wanted.tokens)


def test_a_mistake_in_the_loop_is_survived(pipe, service, monkeypatch):
    def broken():
        raise RuntimeError("a mistake of ours")

    with monkeypatch.context() as patched:
        patched.setattr(service._worker.batcher, "step", broken)
        accepted = service.submit(lambda m: m.generate("frog", steps=2))
        with pytest.raises(FailedError):
            accepted.future.result()
    made = service.submit(lambda m: m.generate("frog", seed=1, steps=2)).future.result()
    assert torch.equal(made.tokens, pipe.generate("frog", seed=1, steps=2).tokens)


def test_the_queue_is_bounded_in_images(service):
    stop = threading.Event()
    held = [service.submit(lambda m: stop.wait(120), images=4) for _ in range(2)]
    with pytest.raises(OverloadedError, match=r"8 of 8 images are taken, and this request needs 1") as caught:
        service.submit(lambda m: None)
    assert 1 <= caught.value.retry_after <= 300
    stop.set()
    for accepted in held:
        accepted.future.result()
    wait_for(lambda: service.num_accepted == 0)
    service.submit(lambda m: None).future.result()
    with pytest.raises(InvalidRequestError, match="9 images"):
        service.submit(lambda m: None, images=9)


def test_pixels_are_bounded_but_one_request_is_always_taken():
    service = Service(MaskGIT.from_pretrained(), "cifar10", Limits(max_pixels=1000))
    service.start()
    service.wait_ready()
    stop = threading.Event()
    held = service.submit(lambda m: stop.wait(120), pixels=5000)
    # The queue has places; what is full is said.
    with pytest.raises(OverloadedError, match=r"images of 5,000 pixels.*4,000"):
        service.submit(lambda m: None, pixels=1)
    stop.set()
    held.future.result()
    wait_for(lambda: service.num_accepted == 0)
    service.submit(lambda m: None, pixels=1).future.result()
    service.close()


def test_what_is_late_is_dropped(service):
    made = service.stats.images
    accepted = service.submit(lambda m: m.generate("frog", steps=256, num_images=4), images=4, timeout=0.2)
    with pytest.raises(DeadlineError, match=r"within 0\.2 seconds"):
        accepted.future.result()
    wait_for(lambda: service.stats.rows == 0)
    assert service.stats.images == made


def test_what_is_cancelled_is_dropped_and_its_place_is_free(service):
    made = service.stats.images
    accepted = service.submit(lambda m: m.generate("frog", steps=256, num_images=8), images=8)
    wait_for(lambda: service.stats.rows == 4)
    accepted.ticket.cancel()
    with pytest.raises(ClientGoneError):
        accepted.future.result()
    wait_for(lambda: service.stats.rows == 0 and service.num_accepted == 0)
    assert service.stats.images == made


def test_closing_finishes_what_was_accepted():
    service = Service(MaskGIT.from_pretrained(), "cifar10", Limits(queue_size=4, max_batch=2))
    with pytest.raises(UnavailableError, match="not ready"):
        service.submit(lambda m: None)
    service.start()
    service.wait_ready()
    accepted = [service.submit(lambda m: m.generate("frog", steps=3)) for _ in range(4)]
    service.close()
    assert all(one.future.result().images.shape == (1, 3, 32, 32) for one in accepted)
    with pytest.raises(UnavailableError, match="shutting down"):
        service.submit(lambda m: None)


def test_closing_at_once_cancels():
    service = Service(MaskGIT.from_pretrained(), "cifar10", Limits(max_batch=2))
    service.start()
    service.wait_ready()
    accepted = service.submit(lambda m: m.generate("frog", steps=10_000))
    service.close(finish=False)
    with pytest.raises(UnavailableError):
        accepted.future.result()


def test_a_broken_model_does_not_become_ready():
    model = MaskGIT.from_pretrained()
    with torch.no_grad():
        model.tokenizer.decoder.conv_out.bias.fill_(torch.nan)
    service = Service(model, "cifar10")
    service.start()
    with pytest.raises(FailedError, match="NaN"):
        service.wait_ready()
    assert not service.ready
    service.close()


def test_too_large_a_batch_for_the_memory_is_told(monkeypatch):
    model = MaskGIT.from_pretrained()

    def full(sequence):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model, "predict_logits", full)
    service = Service(model, "cifar10")
    service.start()
    with pytest.raises(FailedError, match="smaller --max-batch"):
        service.wait_ready()
    service.close()


def test_a_ticket_ends_at_its_deadline():
    ticket = Ticket(0.05)
    ticket.check()
    time.sleep(0.06)
    with pytest.raises(DeadlineError):
        ticket.check()


@pytest.mark.parametrize(
    "limits", [{"queue_size": 0}, {"max_batch": 0}, {"timeout": 0.0}, {"max_images": 10_000}]
)
def test_wrong_limits_are_refused(limits):
    with pytest.raises(ConfigError, match=next(iter(limits))):
        Limits(**limits)
