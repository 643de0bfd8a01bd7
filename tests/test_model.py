"""Every way to make an image goes through the model that it was asked of."""

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit import MaskGIT

PHOTO = Image.fromarray((np.random.default_rng(0).random((40, 50, 3)) * 255).astype("uint8"))
PAINTED = np.arange(40 * 50).reshape(40, 50) % 50 < 20

METHODS = {
    "generate": lambda m: m.generate("frog", steps=2),
    "generate_batches": lambda m: next(m.generate_batches("frog", steps=2)),
    "generate_best": lambda m: m.generate_best("frog", candidates=2, steps=2),
    "fill": lambda m: m.fill(m.vocabulary.sequence(torch.tensor([3])), m.sampler_config(steps=2)),
    "edit": lambda m: m.edit(PHOTO, (3, 3, 10, 10), "cat", steps=2),
    "inpaint": lambda m: m.inpaint(PHOTO, PAINTED, "cat", steps=2),
    "vary": lambda m: m.vary(PHOTO, 0.5, "dog", steps=2),
    "interpolate_classes": lambda m: m.interpolate_classes("frog", "ship", steps=2),
    "interpolate_images": lambda m: m.interpolate_images(PHOTO, PHOTO, "cat", refine=1, steps=2),
    "outpaint": lambda m: m.outpaint(PHOTO, left=10, label=3, steps=2),
    "panorama": lambda m: m.panorama("ship", 40, steps=2),
}


class Counting(MaskGIT):
    """Overrides the one method that every image is decoded by."""

    filled = 0

    def fill_batches(self, *args, **options):
        self.filled += 1
        yield from super().fill_batches(*args, **options)


@pytest.mark.parametrize("method", METHODS)
def test_one_method_decodes_whatever_is_made(method):
    plain = MaskGIT.from_pretrained()
    model = Counting(plain.config, plain.tokenizer, plain.transformer)
    made = METHODS[method](model)
    assert model.filled > 0
    assert torch.equal(made.tokens, METHODS[method](plain).tokens)
