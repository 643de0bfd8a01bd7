"""The model as users hold it."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit import MaskGIT
from maskgit.errors import ConfigError, ImageError, RegionError
from maskgit.results import Output
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.guidance import guided as guide


@pytest.fixture(scope="session")
def guided(tiny):
    """The tiny model as if it had been trained with label dropout and class names."""
    names = ("red, crimson", "blue", *(f"colour {i}" for i in range(8)))
    config = dataclasses.replace(tiny.config, label_dropout=0.1, class_names=names)
    return MaskGIT(config, tiny.tokenizer, tiny.transformer)


@pytest.fixture(scope="session")
def photo():
    rows, columns = np.mgrid[0:32, 0:32] / 31
    return np.stack([rows, columns, 1 - rows * columns], axis=-1)


def test_generate_makes_images_of_labels(tiny):
    made = tiny.generate([3, 7], num_images=2, seed=5, steps=4, return_steps=True)
    assert made.images.shape == (4, 3, 32, 32)
    assert made.images.dtype == torch.float32
    assert 0 <= float(made.images.min()) <= float(made.images.max()) <= 1
    assert made.trace.tokens.shape == (4, 4, 8, 8)
    assert torch.equal(made.tokens, made.trace.tokens[:, -1])
    assert torch.equal(made.images, tiny.tokenizer.decode(made.tokens).clamp(0, 1))
    assert [picture.size for picture in made.to_pil()] == [(32, 32)] * 4
    assert len({made.tokens[i].numpy().tobytes() for i in range(4)}) == 4


def test_an_image_is_a_function_of_seed_and_index(tiny):
    whole = tiny.generate(3, num_images=64, seed=9, steps=3, batch_size=64)
    for size in (1, 7, 64):
        again = tiny.generate(3, num_images=64, seed=9, steps=3, batch_size=size)
        assert torch.equal(whole.tokens, again.tokens)
        assert (whole.images - again.images).abs().max() < 1 / 255
    alone = tiny.generate(3, seed=9, first_index=41, steps=3)
    assert torch.equal(alone.tokens[0], whole.tokens[41])
    assert not torch.equal(tiny.generate(3, seed=10, first_index=41, steps=3).tokens, alone.tokens)


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": 3},
        {"choice_temperature": 50.0},
        {"temperature": 0.1},
        {"mask_schedule": "log"},
        {"guidance_scale": 4.0},
        {"seed": 1},
        {"first_index": 9},
    ],
)
def test_every_setting_changes_the_image(guided, setting):
    base = guided.generate("blue", num_images=4, steps=6)
    assert not torch.equal(
        base.tokens, guided.generate("blue", num_images=4, **({"steps": 6} | setting)).tokens
    )


def test_labels_come_in_any_form(tiny):
    expected = tiny.generate([3, 3], steps=2).tokens
    for labels in (torch.tensor([3, 3]), np.array([3, 3]), (np.int64(3), 3), ["3", 3]):
        assert torch.equal(tiny.generate(labels, steps=2).tokens, expected)
    assert torch.equal(tiny.generate(np.int64(3), steps=2).tokens, expected[:1])


def test_the_model_brings_its_own_settings(tiny):
    config = dataclasses.replace(tiny.config, sampler=SamplerConfig(steps=3, temperature=0.5))
    model = MaskGIT(config, tiny.tokenizer, tiny.transformer)
    assert torch.equal(model.generate(1).tokens, tiny.generate(1, steps=3, temperature=0.5).tokens)
    assert model.generate(1, return_steps=True).trace.tokens.shape[1] == 3


def test_the_callback_sees_every_step(tiny):
    seen = []
    made = tiny.generate(
        1,
        num_images=3,
        steps=4,
        batch_size=2,
        return_steps=True,
        callback=lambda step, indices, tokens: seen.append((step, indices.tolist(), tokens)),
    )
    assert [(step, indices) for step, indices, _ in seen] == [(t, i) for i in ([0, 1], [2]) for t in range(4)]
    for step, indices, tokens in seen:
        assert torch.equal(tokens, made.trace.tokens[indices, step])


@torch.no_grad()
def test_guidance_extrapolates_from_the_unconditional_logits(guided):
    sequence = guided.vocabulary.sequence(torch.tensor([1, 2]))
    codes = guided.vocabulary.num_codes
    conditional = guided.transformer(sequence, codes=codes)
    unconditional = guided.transformer(guided.vocabulary.sequence(torch.tensor([-1, -1])), codes=codes)
    torch.testing.assert_close(
        guide(guided.predict_logits, guided.vocabulary.mask, torch.tensor([[3.0]]))(sequence),
        unconditional + 3 * (conditional - unconditional),
        atol=1e-4,
        rtol=1e-4,
    )
    assert torch.equal(guided.predict_logits(sequence), conditional)


def test_a_model_without_label_dropout_says_so(tiny, guided):
    with pytest.raises(ConfigError, match="trained without label dropout"):
        tiny.generate(1, guidance_scale=2.0)
    with pytest.raises(ConfigError, match="name a class"):
        tiny.generate(None)
    assert guided.generate([None, "crimson"], steps=2).images.shape[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": 10}, "classes are 0 to 9"),
        ({"labels": "frog"}, "no class names"),
        ({"labels": []}, "labels"),
        ({"labels": 1, "steps": 0}, "steps must be between"),
        ({"labels": 1, "steps": 2.5}, "steps must be a whole number"),
        ({"labels": 1, "stepz": 2}, "Did you mean 'steps'"),
        ({"labels": 1, "temperature": -1.0}, "temperature must be between"),
        ({"labels": 1, "mask_schedule": "cosin"}, "Unknown mask schedule"),
        ({"labels": 1, "num_images": 0}, "num_images must be between"),
        ({"labels": 1, "num_images": 1.5}, "num_images must be a whole number"),
        ({"labels": 1, "seed": 1.5}, "seed must be a whole number"),
        ({"labels": 1.5}, "no class names"),
        ({"labels": 1, "batch_size": 0}, "batch_size must be between"),
        ({"labels": 1, "first_index": -1}, "first_index must be between"),
        ({"labels": 1, "seed": -1}, "seed"),
    ],
)
def test_wrong_arguments_are_told(tiny, arguments, message):
    with pytest.raises(ConfigError, match=message):
        tiny.generate(**arguments)


def test_an_edit_changes_the_box_and_leaves_the_rest(tiny, photo):
    made = tiny.edit(photo, (8, 4, 8, 12), 2, num_images=3, seed=1, steps=6, return_steps=True)
    before = tiny.prepare(photo)
    known = ~made.token_mask
    tokens = tiny.tokenizer.encode(before)[0]
    assert made.token_mask.sum() == 6
    assert made.token_mask[1:4, 2:4].all()
    assert (made.trace.tokens[:, :, known] == tokens[known]).all()
    assert made.trace.tokens.shape == (3, 5, 8, 8)  # begins at step 1 of 6
    far = torch.zeros(32, 32, dtype=torch.bool)
    far[24:, 24:] = True
    assert torch.equal(made.images[..., far], before[..., far].expand(3, -1, -1))
    assert (made.images[:, :, 8:12, 10:14] - before[:, :, 8:12, 10:14]).abs().max() > 0.02


def test_wrong_edits_are_told(tiny, photo):
    with pytest.raises(RegionError, match="box"):
        tiny.edit(photo, (30, 0, 8, 8), 2)
    with pytest.raises(ConfigError, match="start_step"):
        tiny.edit(photo, (0, 0, 8, 8), 2, start_step=8, steps=8)
    with pytest.raises(ConfigError, match="rule"):
        tiny.edit(photo, (0, 0, 8, 8), 2, rule="offical")


def test_pictures_come_in_any_form(tiny, photo, tmp_path):
    array = (photo * 255).round().astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "photo.png")
    forms = [
        array,
        array / np.float32(255),
        Image.fromarray(array),
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        torch.from_numpy(array / np.float32(255)).movedim(-1, 0),
        torch.from_numpy(array / np.float32(255)).movedim(-1, 0)[None],
        torch.from_numpy(array / np.float32(255)).movedim(-1, 0).double(),
    ]
    expected = tiny.prepare(array)
    assert expected.shape == (1, 3, 32, 32)
    for form in forms:
        torch.testing.assert_close(tiny.prepare(form), expected, atol=1e-6, rtol=0)
    large = Image.fromarray(array).resize((200, 100))
    for form in (large, np.asarray(large)):
        assert tiny.prepare(form).shape == (1, 3, 32, 32)
    for wrong in (
        tmp_path / "none.png",
        np.zeros((3, 32, 32)),
        torch.zeros(2, 3, 32, 32),
        torch.full((3, 32, 32), 2.0),
    ):
        with pytest.raises(ImageError):
            tiny.prepare(wrong)


def test_reconstruct_is_encode_and_decode(tiny, photo):
    made = tiny.reconstruct(photo)
    assert isinstance(made, Output)
    tokens = tiny.tokenizer.encode(tiny.prepare(photo))
    assert torch.equal(made.tokens, tokens)
    assert torch.equal(made.images, tiny.tokenizer.decode(tokens).clamp(0, 1))


def test_networks_of_another_shape_are_refused(tiny):
    other = dataclasses.replace(
        tiny.config, transformer=dataclasses.replace(tiny.config.transformer, num_layers=3)
    )
    with pytest.raises(ConfigError, match="not the ones"):
        MaskGIT(other, tiny.tokenizer, tiny.transformer)


def test_half_precision_stays_close(golden):
    from maskgit.convert import load_official

    model = load_official(golden / "tiny_tokenizer.msgpack", golden / "tiny_transformer.msgpack")
    full = model.reconstruct(np.full((32, 32, 3), 0.4)).images
    half = model.to(dtype=torch.bfloat16).reconstruct(np.full((32, 32, 3), 0.4)).images
    assert half.dtype == torch.float32
    assert (full - half).abs().mean() < 0.1
    assert model.generate(3, steps=3).images.isfinite().all()
