"""The work of editing real images: parts of them are masked and filled in again by the model.

Shapes: n images of a unit, K kinds of masks, g × g tokens, D feature dimensions, S × S pixels, m of the unit's
images that are shown. A mask is True where an image is made new.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskgit.data.picture_sets import Pictures, as_floats
from maskgit.editing.edit import GUESS, resolve
from maskgit.editing.photos import Window, soft_weights
from maskgit.editing.regions import blend
from maskgit.errors import ConfigError
from maskgit.evaluation.metrics import boundary_gradient_ratio
from maskgit.evaluation.networks.features import FeatureNet
from maskgit.evaluation.networks.lpips import LPIPS, masked_lpips
from maskgit.evaluation.runs.sampling import SampleConfig, engine_numbers, joined
from maskgit.foundation.devices import upload, whole_float32
from maskgit.foundation.units import Arrays, Made
from maskgit.images import to_uint8
from maskgit.pipeline import MaskGIT
from maskgit.results import Draw
from maskgit.sampler.config import SamplerConfig

# Images whose edits are shown, the kinds of masks in turn.
NUM_SHOWN = 12
# Share of the tokens that a free-form mask covers.
_FREE_SHARE = 0.3

Mask = NDArray[np.bool_]


def _box(rng: np.random.Generator, side: int) -> Mask:
    """Return a box whose sides are three to five eighths of the grid's."""
    height, width = rng.integers(max(1, side * 3 // 8), max(1, side * 5 // 8) + 1, 2)
    top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    mask = np.zeros((side, side), np.bool_)
    mask[top : top + height, left : left + width] = True
    return mask


def _outpainting(rng: np.random.Generator, side: int) -> Mask:
    """Return half of the grid, at any of its four sides."""
    mask = np.zeros((side, side), np.bool_)
    mask[side - side // 2 :] = True
    return np.rot90(mask, int(rng.integers(4))).copy()


def _free_form(rng: np.random.Generator, side: int) -> Mask:
    """Return what a random walk over the grid covers."""
    mask, place = np.zeros((side, side), np.bool_), rng.integers(0, side, 2)
    while mask.mean() < _FREE_SHARE:
        mask[tuple(place)] = True
        place = (place + rng.integers(-1, 2, 2)).clip(0, side - 1)
    return mask


# A mask of a grid with so many tokens a side, of which it leaves some.
MASKS: dict[str, Callable[[np.random.Generator, int], Mask]] = {
    "boxes": _box,
    "outpainting": _outpainting,
    "free-form": _free_form,
}


def draw_masks(index: int, side: int) -> Mask:
    """Return the masks of an image by its index, bool (K, g, g), the same for every model of a grid."""
    rng = np.random.default_rng([0, index])
    return np.stack([draw(rng, side) for draw in MASKS.values()])


class Edits:
    """The work of filling in masked parts of real images, as `MaskGIT.inpaint` does with the images' own classes."""

    def __init__(
        self,
        model: MaskGIT,
        pictures: Pictures,
        net: FeatureNet,
        config: SampleConfig,
        *,
        weights: dict[str, str],
        sampler: SamplerConfig,
        num_images: int,
        classes: NDArray[np.int32] | None = None,
        lpips: LPIPS | None = None,
        lpips_name: str | None = None,
    ) -> None:
        """Describe the work; nothing is made yet.

        Args:
            model: the model.
            pictures: real images of its size that it was not trained on.
            net: what features are computed with.
            config: its seed decides what is filled in; its batch and unit sizes count.
            weights: SHA-256 of the model's networks by name.
            sampler: how they are decoded.
            num_images: images that are edited, 2 to half of them; as many others are what these are compared with.
            classes: int32 (classes of the images,), the model's class of each; None has the model guess them.
            lpips: computes LPIPS, if it is wanted, and `lpips_name` says which it is.

        Raises:
            ConfigError: there are too few images, or the model has a single token.
        """
        self.model, self.data, self.net, self.sampler = model, pictures, net, sampler
        self.seed, self.batch_size, self.unit_size = config.seed, config.batch_size, config.unit_size
        self.classes, self.lpips = classes, lpips
        self.count = min(num_images, len(pictures) // 2)
        if self.count < 2 or model.vocabulary.grid_size < 2:
            raise ConfigError(
                f"Edits need at least 4 real images and a model of 2 × 2 tokens, but {pictures.name} has "
                f"{len(pictures)} and the model {model.vocabulary.grid_size} a side: leave out --edits."
            )
        # Which images these are does not depend on the seed, so that the spread over seeds is the model's.
        order = np.random.default_rng(0).permutation(len(pictures))
        self.edited, self.others = order[: self.count], order[self.count : 2 * self.count]
        self.plan: dict[str, Any] = {
            "work": "edits",
            "weights": weights,
            "engine": engine_numbers(model),
            "sampler": sampler.to_dict(),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "masks": list(MASKS),
            "classes": None if classes is None else classes.tolist(),
            "data": pictures.fingerprint,
            "images_of_data": len(pictures),
            "features": net.identity,
            "lpips": lpips_name,
        }

    def make(self, first: int, stop: int) -> Made:
        """Return the unit of the images first ≤ i < stop; see `maskgit.foundation.units.Work`.

        Its arrays are of the images that could be read: `number` and `label` (n,), the model's class or −1;
        `whole_STATE` and `region_STATE` float32 (n, K, D), features of images and of their regions alone, the rest
        being grey; `seam_STATE` and `lpips_STATE` float64 (n, K); with the states real, reconstructions and edits,
        and `region_others` of other real images under the same masks. `shown` uint8 (m, 3, S, S, 3) is an image
        masked, filled in and untouched.
        """
        kept: list[Arrays] = []
        shown: list[NDArray[np.uint8]] = []
        skipped: list[str] = []
        for start in range(first, stop, self.batch_size):
            indices = np.arange(start, min(start + self.batch_size, stop))
            made, pictures = self._batch(indices, skipped)
            kept += [made]
            shown += pictures
        arrays = joined(kept)
        if shown:
            arrays["shown"] = np.stack(shown)
        return Made(arrays, {"skipped": skipped}, {})

    def _batch(
        self, indices: NDArray[np.int64], skipped: list[str]
    ) -> tuple[Arrays, list[NDArray[np.uint8]]]:
        images, labels, readable = self._read(self.edited[indices], skipped)
        others, _, also = self._read(self.others[indices], skipped)
        good = readable & also
        tokens = self.model.encode_pixels(images)
        rebuilt = self._rebuilt(tokens)
        masks = np.stack([draw_masks(int(i), self.model.vocabulary.grid_size) for i in indices])
        kinds: list[Arrays] = []
        shown: dict[int, NDArray[np.uint8]] = {}
        for kind in range(len(MASKS)):
            token_masks = torch.from_numpy(masks[:, kind])
            filled = self._fill(tokens, labels, token_masks, kind * self.count + int(indices[0]))
            region = self._enlarged(token_masks)
            sets = {
                "real": images,
                "reconstructions": self._blended(images, rebuilt, masks[:, kind]),
                "edits": self._blended(images, filled, masks[:, kind]),
            }
            kinds.append(self._measured(sets, others, region))
            for row, index in enumerate(indices):
                if index < NUM_SHOWN and index % len(MASKS) == kind and good[row]:
                    grey = torch.where(region[row], 0.5, images[row])
                    shown[row] = to_uint8(torch.stack([grey, sets["edits"][row], images[row]]))
        arrays: Arrays = {name: np.stack([one[name] for one in kinds], 1)[good] for name in kinds[0]}
        arrays |= {"number": self.edited[indices][good], "label": labels[good]}
        return arrays, [shown[row] for row in sorted(shown)]

    def _read(
        self, numbers: NDArray[np.int64], skipped: list[str]
    ) -> tuple[Tensor, NDArray[np.int32], NDArray[np.bool_]]:
        """Return images in the order of their numbers, the model's class of each or −1, and which could be read."""
        batch = self.data.read(np.sort(numbers).tolist())
        skipped += batch.skipped
        side = self.model.config.image_size
        pixels = np.zeros((len(numbers), side, side, 3), np.uint8)
        labels = np.full(len(numbers), -1, np.int32)
        found = {int(number): row for row, number in enumerate(batch.numbers)}
        good = np.array([int(number) in found for number in numbers])
        rows = [found[int(number)] for number in numbers[good]]
        pixels[good] = batch.images[rows]
        if self.classes is not None:
            theirs = batch.labels[rows]
            labels[good] = np.where(theirs < 0, -1, self.classes[theirs])
        return as_floats(pixels), labels, good

    def _rebuilt(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            decoded = self.model.tokenizer.decode(upload(tokens, self.model.device))
        return decoded.float().cpu()

    def _fill(self, tokens: Tensor, labels: NDArray[np.int32], masks: Tensor, first_index: int) -> Tensor:
        """Return what the model fills in, float (n, 3, S, S)."""
        numbers = [
            int(label) if label >= 0 else resolve(self.model, GUESS, tokens[row : row + 1], masks[row])[0]
            for row, label in enumerate(labels)
        ]
        sequences = self.model.vocabulary.sequence(torch.tensor(numbers), tokens, masks)
        draw = Draw(self.seed, first_index, self.batch_size)
        made = list(self.model.fill_batches(sequences, self.sampler, draw))
        return torch.cat([part.images for part in made]).float().cpu()

    def _enlarged(self, masks: Tensor) -> Tensor:
        """Return token masks as pixels: bool (n, g, g) → (n, S, S)."""
        patch = self.model.tokenizer.patch_size
        return masks.repeat_interleave(patch, -2).repeat_interleave(patch, -1)

    def _blended(self, images: Tensor, new: Tensor, masks: Mask) -> Tensor:
        """Return images with new pixels in their masks, joined as `MaskGIT.inpaint` joins them, of 8 bits."""
        side = self.model.config.image_size
        window, radius = Window(0, 0, side), max(0, side // 16 - 1)
        weights = [
            soft_weights(one, self._enlarged(one).numpy(), window, (side, side), side, radius)
            for one in torch.from_numpy(masks)
        ]
        return as_floats(to_uint8(blend(images, new, torch.from_numpy(np.stack(weights))[:, None])))

    @torch.no_grad()
    def _measured(self, sets: dict[str, Tensor], others: Tensor, region: Tensor) -> Arrays:
        """Return what is measured of images of each state with one kind of mask, bool (n, S, S)."""

        def alone(images: Tensor) -> NDArray[np.float32]:
            features: NDArray[np.float32] = self.net(torch.where(region[:, None], images, 0.5)).cpu().numpy()
            return features

        arrays: Arrays = {"region_others": alone(others)}
        for state, images in sets.items():
            arrays[f"region_{state}"] = alone(images)
            arrays[f"whole_{state}"] = self.net(images).cpu().numpy()
            arrays[f"seam_{state}"] = boundary_gradient_ratio(images, region).numpy()
            if self.lpips is not None:
                device = next(self.lpips.parameters()).device
                real, other, mask = (upload(part, device) for part in (sets["real"], images, region))
                with whole_float32(device):
                    arrays[f"lpips_{state}"] = masked_lpips(self.lpips, real, other, mask).cpu().numpy()
        return arrays
