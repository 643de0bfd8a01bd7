"""How far a work is: what decodes says beforehand how many steps it will make."""

import numpy as np
import pytest

from maskgit.apps.cli.output import Progress
from maskgit.results import Output


class Counted:
    """Counts what is announced and what comes."""

    def __init__(self) -> None:
        self.expected = self.called = 0

    def expect(self, num_calls: int) -> None:
        assert self.called == 0, "all is known before the first step"
        self.expected += num_calls

    def __call__(self, *_: object) -> None:
        self.called += 1


PICTURE = np.full((32, 32, 3), 90, np.uint8)
WIDE = np.full((40, 90, 3), 90, np.uint8)
BOX = (4, 4, 12, 12)


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        (lambda model, **o: model.generate([1, 2], num_images=3, batch_size=4, steps=5, **o), 2 * 5),
        # Each step keeps a token, and there are 64.
        (lambda model, **o: model.generate(1, steps=70, **o), 64),
        (lambda model, **o: model.edit(PICTURE, BOX, 1, steps=12, **o), 10),
        (lambda model, **o: model.edit(PICTURE, BOX, 1, steps=6, start_step=4, num_images=3, batch_size=2, **o), 4),
        (lambda model, **o: model.inpaint(PICTURE, np.eye(32), 1, steps=6, start_step=2, **o), 4),
        (lambda model, **o: model.vary(PICTURE, 1.0, 1, steps=6, **o), 6),
        (lambda model, **o: model.interpolate_classes(1, 2, steps=6, num_images=2, batch_size=1, **o), 12),
        (lambda model, **o: model.interpolate_images(PICTURE, PICTURE, 1, refine=1, steps=6, **o), 5),
        # Windows of 32 pixels that move by 16: from 72 pixels on there are two beyond the photo.
        (lambda model, **o: model.outpaint(WIDE, right=32, label=1, steps=3, **o), None),
        (lambda model, **o: model.panorama(1, 64, num_images=3, batch_size=2, steps=3, **o), 3 * 3 * 2),
        (lambda model, **o: model.generate_best([1, 2], candidates=5, batch_size=2, steps=3, **o), 2 * 3 * 3),
    ],
)  # fmt: skip
def test_all_steps_are_announced(tiny, make, calls):
    counted = Counted()
    assert isinstance(make(tiny, callback=counted), Output)
    assert counted.expected == counted.called > 0
    assert calls is None or counted.called == calls


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9])
def test_variations_begin_in_the_middle(tiny, strength):
    counted = Counted()
    tiny.vary(PICTURE, strength, 1, steps=12, callback=counted)
    assert counted.expected == counted.called < 12


def test_policies_that_adapt_stop_early(tiny):
    counted = Counted()
    tiny.generate(1, steps=12, policy="entropy_bounded", policy_options={"gamma": 1000.0}, callback=counted)
    assert counted.called < counted.expected == 12


def test_the_bar_fills_up(tiny):
    with Progress() as progress:
        tiny.panorama(1, 64, steps=3, callback=progress)
        assert progress.bar.total == 9
