"""Edits of real images judged: which masks, which pixels, which scores."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from maskgit.errors import ConfigError, DataError
from maskgit.evaluation.metrics import boundary_gradient_ratio, frechet_distance
from maskgit.evaluation.networks.lpips import LPIPS
from maskgit.evaluation.runs.edits import MASKS, Edits, draw_masks
from maskgit.evaluation.runs.evaluate import EvaluationConfig
from maskgit.evaluation.runs.measure import measure
from maskgit.evaluation.runs.sampling import SampleConfig
from maskgit.evaluation.scores.edits import STATES
from maskgit.evaluation.scores.references import Reference
from small_evaluation import evaluation, real_images, toy_net

CLASSES = np.arange(10, dtype=np.int32)


def edits(model, pictures=None, seed=0, **changes):
    """Return the work of editing six of forty images, three at once."""
    settings = {"weights": {}, "sampler": model.sampler_config(steps=2), "num_images": 6, "classes": CLASSES}
    config = SampleConfig(seed=seed, batch_size=3)
    return Edits(model, pictures or real_images(), toy_net(), config, **(settings | changes))


@pytest.mark.parametrize("side", [2, 3, 8, 32])
def test_masks_leave_something_and_are_those_of_their_index(side):
    masks = np.stack([draw_masks(i, side) for i in range(50)])
    shares = masks.mean((2, 3))
    assert (shares > 0).all()
    assert (shares < 1).all()
    assert (shares[:, list(MASKS).index("outpainting")] == side // 2 / side).all()
    assert (masks[7] == draw_masks(7, side)).all()
    assert len(np.unique(masks.reshape(50, -1), axis=0)) > 10


def test_a_part_is_filled_in_as_inpaint_does_it(tiny):
    work = edits(tiny)
    made = work.make(0, 6).arrays
    images, patch = work.data.images, tiny.tokenizer.patch_size
    # The image shown at index i is edited with mask i modulo 3.
    for index in range(6):
        kind, number = index % 3, work.edited[index]
        region = draw_masks(index, tiny.vocabulary.grid_size)[kind].repeat(patch, 0).repeat(patch, 1)
        label = int(work.data.labels[number])
        alone = tiny.inpaint(images[number], region, label, seed=0, first_index=kind * 6 + index, steps=2)
        masked, filled, untouched = made["shown"][index].astype(int)
        assert (untouched == images[number]).all()
        assert (masked[~region] == untouched[~region]).all()
        # Batches of other sizes may round differently.
        expected = alone.images[0].movedim(0, -1).numpy() * 255
        np.testing.assert_allclose(filled, expected, atol=1.001)
        pixels = torch.from_numpy(filled).movedim(-1, 0)[None] / 255
        seam = boundary_gradient_ratio(pixels, torch.from_numpy(region))
        assert made["seam_edits"][index, kind] == pytest.approx(seam.item(), rel=1e-5)


def test_seeds_change_what_is_filled_in_alone(tiny):
    first, again, other = (edits(tiny, seed=seed).make(0, 6).arrays for seed in (0, 0, 1))
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
        same = np.array_equal(array, other[name], equal_nan=True)
        assert same == (not name.endswith("edits") and name != "shown"), name


def test_images_that_cannot_be_read_leave_the_others_as_they_are(tiny):
    whole = edits(tiny)
    torn = real_images()
    torn.bad = {int(whole.edited[1])}
    found = edits(tiny, torn).make(0, 6)
    assert len(found.notes["skipped"]) == 1
    for name in ("number", "label", "region_edits", "seam_real"):
        expected = np.delete(whole.make(0, 6).arrays[name], 1, 0)
        np.testing.assert_allclose(found.arrays[name], expected, atol=1e-6)


def test_unknown_classes_are_guessed_and_few_images_refused(tiny):
    assert (edits(tiny, classes=None).make(0, 2).arrays["label"] == -1).all()
    with pytest.raises(ConfigError, match="at least 4 real images"):
        edits(tiny, real_images(3))


@pytest.fixture(scope="module")
def report(tiny, tmp_path_factory):
    """The folder of an evaluation with edits, and its work."""
    out = tmp_path_factory.mktemp("edits")
    config = EvaluationConfig(splits=2, num_examples=1, edit_images=12)
    lpips = LPIPS("alex").eval().requires_grad_(False)
    for lin in lpips.lins.parameters():
        lin.abs_()
    work = evaluation(tiny, config=config, training=False, lpips=lpips, lpips_name="random")
    work.run(out)
    return out, work


def test_a_report_has_edits_beside_reconstructions_and_untouched_images(report):
    out, evaluated = report
    work = evaluated.works()["edits"]
    arrays = work.make(0, 12).arrays
    found = json.loads((out / "report.json").read_text())["edits"]
    assert [edited["mask"] for edited in found] == list(MASKS)
    for kind, edited in enumerate(found):
        assert edited["num_images"] == 12
        values = edited["metrics"]
        names = ("region_fd_toy", "feature_distance_toy", "lpips", "seam_ratio", "class_agreement_toy")
        assert tuple(values) == names
        for state in STATES:
            sets = [arrays[f"region_{name}"][:, kind].astype(float) for name in (state, "others")]
            moments = [part for x in sets for part in (x.mean(0), np.cov(x, rowvar=False))]
            assert values["region_fd_toy"][state] == pytest.approx(frechet_distance(*moments), rel=1e-3)
            seams = arrays[f"seam_{state}"][:, kind]
            assert values["seam_ratio"][state] == pytest.approx(np.median(seams[np.isfinite(seams)]))
            a, b = (torch.from_numpy(arrays[f"region_{name}"][:, kind]).double() for name in ("real", state))
            cosine = torch.nn.functional.cosine_similarity(a, b)
            assert values["feature_distance_toy"][state] == pytest.approx(1 - cosine.mean().item(), abs=1e-9)
        assert values["lpips"]["real"] == 0 < values["lpips"]["edits"]
        assert 0 <= values["class_agreement_toy"]["real"] <= 1


def test_the_page_shows_edits_unless_real_images_are_to_be_left_out(report):
    out, work = report
    page = (out / "report.html").read_text("utf-8")
    assert 'id="edits"' in page
    assert page.count('class="triple"') == 12
    replace(work, config=replace(work.config, show_training=False)).run(out)
    page = (out / "report.html").read_text("utf-8")
    assert 'id="edits"' in page
    assert 'class="triple"' not in page


def test_edits_of_statistics_alone_are_refused(report, tmp_path):
    work = report[1]
    statistics = measure(real_images(), toy_net()).statistics
    alone = replace(work, reference=Reference("real.npz", statistics, None, "0" * 64))
    with pytest.raises(DataError, match=r"real\.npz holds statistics alone"):
        alone.works()
