"""Everything that a model can be asked for, with every kind of model: it works, or is refused in words."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit import MaskGIT, hub
from maskgit.apps.serving.service import Limits
from maskgit.convert import load_official
from maskgit.diffusers import MaskGITPipeline
from maskgit.editing.edit import edit, inpaint
from maskgit.editing.likelihood import generate_best, guess_class, log_likelihood
from maskgit.editing.outpaint import outpaint, panorama
from maskgit.editing.variations import interpolate_classes, interpolate_images, vary
from maskgit.engine.batching import Batcher, Job
from maskgit.engine.layers import ways
from maskgit.errors import ConfigError
from maskgit.evaluation.runs.evaluate import EvaluationConfig
from maskgit.evaluation.scores.references import Reference
from maskgit.explain import explain
from maskgit.sampler.policies import POLICIES
from peer_models import PEERS, peer_model
from servers import in_thread
from small_evaluation import evaluation, real_images

GOLDEN = Path(__file__).parent / "golden"
PHOTO = (np.random.default_rng(0).random((16, 16, 3)) * 255).astype("uint8")
KINDS = ["official", *PEERS]


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> MaskGIT:
    if request.param != "official":
        return peer_model(request.param)
    return load_official(GOLDEN / "tiny_tokenizer.msgpack", GOLDEN / "tiny_transformer.msgpack")


@pytest.fixture(scope="module")
def side(model) -> int:
    return model.config.image_size


@pytest.fixture(scope="module")
def photo(side) -> Image.Image:
    return Image.fromarray(PHOTO).resize((side, side), Image.Resampling.NEAREST)


def guided(model) -> dict:
    return {"guidance_scale": 2.0} if model.config.label_dropout else {}


def box(side: int) -> tuple[int, int, int, int]:
    return side // 4, side // 4, side // 2, side // 2


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(model, policy):
    made = model.generate([1, 2], seed=3, steps=3, policy=policy, **guided(model))
    single = model.generate([2], seed=3, first_index=1, steps=3, policy=policy, **guided(model))
    assert torch.equal(made.tokens[1:], single.tokens)
    assert made.tokens.min() >= 0
    assert made.tokens.max() < model.config.tokenizer.codebook_size


def test_box_and_mask_edits_keep_what_is_outside(model, side, photo):
    boxed = edit(model, photo, box(side), 1, seed=1, steps=3, feather=0)
    painted = np.zeros((side, side), bool)
    painted[side // 2 :] = True
    masked = inpaint(model, photo, painted, 1, seed=1, steps=3, feather=0)
    for made, rows in (
        (boxed, slice(0, side // 4 - model.config.tokenizer.patch_size)),
        (masked, slice(0, 1)),
    ):
        kept = np.asarray(made.to_pil()[0])[rows]
        assert np.array_equal(kept, np.asarray(photo)[rows])


def test_a_masked_position_is_masked_with_all_its_groups(model):
    vocabulary = model.vocabulary
    tokens = torch.zeros(1, vocabulary.grid_size, vocabulary.grid_size, dtype=torch.int64)
    mask = torch.zeros(vocabulary.grid_size, vocabulary.grid_size, dtype=torch.bool)
    mask[1, 2] = True
    sequence = vocabulary.sequence(torch.tensor([1]), tokens, mask)[0, 1:]
    masked = (sequence == vocabulary.mask).view(vocabulary.grid_size, vocabulary.grid_size, vocabulary.groups)
    assert torch.equal(masked, mask[..., None].expand_as(masked))


def test_outpainting_and_panoramas(model, side, photo):
    wide = outpaint(model, photo, right=side // 2, label=1, seed=1, steps=2)
    assert wide.images.shape[-2:] == (side, side * 3 // 2)
    made = panorama(model, [1, 2], 2 * side, seed=1, steps=2)
    assert made.images.shape[-1] == 2 * side


def test_variations(model, photo):
    for made in (
        vary(model, photo, 0.5, 1, seed=1, steps=3),
        interpolate_classes(model, 1, 2, seed=1, steps=3),
        interpolate_images(model, photo, photo.transpose(Image.Transpose.ROTATE_90), 1, seed=1, steps=3),
    ):
        assert made.tokens.max() < model.config.tokenizer.codebook_size


def test_likelihoods_and_classes(model):
    tokens = model.generate([1, 2], seed=3, steps=3).tokens
    found = log_likelihood(model, tokens, [1, 2])
    assert found.isfinite().all()
    assert (found < 0).all()
    scores = guess_class(model, tokens[:1])
    assert scores.numel() == model.config.transformer.num_classes
    best = generate_best(model, [1], candidates=2, seed=3, steps=2)
    assert len(best.tokens) == 1


def test_traces_are_explained(model):
    made = model.generate([1], seed=3, steps=3, return_steps=True)
    assert made.trace.tokens.shape[1] == 3
    assert explain(made).mode == "RGB"


@pytest.mark.parametrize("mode", ["exact", "fast", "int8"])
def test_engines(model, mode):
    if mode == "int8" and "int8" not in ways(torch.float32):
        with pytest.raises(ConfigError, match="no int8 products"):
            model.optimize(mode)
        return
    fast = model.optimize(mode)
    made = fast.generate([1, 2], seed=3, steps=3, **guided(model))
    if mode == "exact":
        assert torch.equal(made.tokens, model.generate([1, 2], seed=3, steps=3, **guided(model)).tokens)
    assert made.images.isfinite().all()


def test_folders(model, tmp_path):
    hub.save_model(model, tmp_path / "model")
    again = MaskGIT.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again.generate([1], seed=2).tokens, model.generate([1], seed=2).tokens)


def test_continuous_batching(model):
    sequence = model.vocabulary.sequence(torch.tensor([1]))[0]
    settings = {"steps": 3, **guided(model)}
    jobs = [
        Job(sequence, model.sampler_config(policy=policy, **settings), 7, index, 0, False)
        for index, policy in enumerate(("confidence", "halton", "redraw", "remdm"))
    ]
    batcher = Batcher(model, max_batch=4, sizes=(4,))
    for job in jobs:
        batcher.add(job)
    last = {}
    while len(batcher):
        last |= {news.job: news for news in batcher.step() if news.last}
    for index, job in enumerate(jobs):
        wanted = model.generate([1], seed=7, first_index=index, policy=job.config.policy, **settings)
        assert torch.equal(last[job].tokens, wanted.tokens[0])


def test_the_server(model, photo):
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    with in_thread(Limits(max_batch=2), model=model) as (client, _):
        made = client.post("/v1/generate", json={"class": 1, "seed": 3, "steps": 3})
        assert made.status_code == 200, made.text
        body = {"image": picture, "boxes": [box(photo.width)], "class": 1, "steps": 3}
        edited = client.post("/v1/edit", json=body)
        assert edited.status_code == 200, edited.text


def test_the_diffusers_pipeline(model):
    pipe = MaskGITPipeline(model)
    generator = torch.Generator().manual_seed(1)
    made = pipe(class_labels=[1], num_inference_steps=2, generator=generator, output_type="pt")
    assert made.images.shape[-1] == model.config.image_size


def test_evaluation(model, side, tmp_path):
    small = EvaluationConfig(splits=2, num_training=30, curve_images=4, num_examples=1)
    pictures = real_images(side=side)
    made = evaluation(
        model,
        num_images=10,
        config=small,
        reference=Reference("real images", None, pictures, pictures.fingerprint),
        training=real_images(seed=1, side=side),
    )
    assert made.run(tmp_path) is not None
