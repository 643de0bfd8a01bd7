"""The pipeline for users of diffusers, against our own and against what diffusers' users expect."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ImagePipelineOutput
from diffusers.callbacks import PipelineCallback
from PIL import Image, ImageDraw

from maskgit import MaskGIT
from maskgit.diffusers import MaskGITPipeline, draw_seeds
from maskgit.errors import ConfigError, MaskGITError, RegionError

QUICK = {"num_inference_steps": 4, "output_type": "latent", "return_dict": False}


@pytest.fixture(scope="module")
def pipe():
    made = MaskGITPipeline.from_pretrained()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def photo():
    rows, columns = np.mgrid[0:40, 0:56] / 56
    return Image.fromarray((255 * np.stack([rows, columns, 1 - rows * columns], axis=-1)).astype(np.uint8))


@pytest.fixture(scope="module")
def mask(photo):
    painted = Image.new("L", photo.size)
    ImageDraw.Draw(painted).ellipse((10, 8, 30, 26), fill=255)
    return painted


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_images_are_those_of_our_own_pipeline(pipe):
    found = pipe(["frog", 8], num_images_per_prompt=2, num_inference_steps=4, generator=seeded(5))
    assert isinstance(found, ImagePipelineOutput)
    seeds = draw_seeds(seeded(5), 4)
    (tokens,) = pipe(["frog", 8], num_images_per_prompt=2, generator=seeded(5), **QUICK)
    for i, label in enumerate(("frog", "frog", "ship", "ship")):
        alone = pipe.model.generate(label, seed=seeds[i], steps=4)
        assert torch.equal(tokens[i], alone.tokens[0])
        # Convolutions round differently in batches of other sizes.
        pixels = np.asarray(found.images[i], np.int16)
        assert np.abs(pixels - np.asarray(alone.to_pil()[0])).max() <= 1
    (one,) = pipe("frog", num_inference_steps=4, generator=seeded(5)).images
    assert one == pipe.model.generate("frog", seed=seeds[0], steps=4).to_pil()[0]


def test_the_models_own_settings_hold_where_none_are_given(pipe):
    (tokens,) = pipe("cat", generator=seeded(1), output_type="latent", return_dict=False)
    (seed,) = draw_seeds(seeded(1), 1)
    assert torch.equal(tokens, pipe.model.generate("cat", seed=seed).tokens)
    assert pipe.num_timesteps == pipe.model.config.sampler.steps
    assert pipe.guidance_scale == pipe.model.config.sampler.guidance_scale


@pytest.mark.parametrize("scale", [1, 0.0, 7.5])
def test_guidance_of_1_or_less_is_none(pipe, scale):
    (tokens,) = pipe("cat", guidance_scale=scale, generator=seeded(1), **QUICK)
    (seed,) = draw_seeds(seeded(1), 1)
    ours = pipe.model.generate("cat", seed=seed, steps=4, guidance_scale=max(1, scale))
    assert torch.equal(tokens, ours.tokens)


def test_other_settings_are_the_samplers(pipe):
    (tokens,) = pipe("cat", policy="halton", temperature=0.8, generator=seeded(1), **QUICK)
    (seed,) = draw_seeds(seeded(1), 1)
    ours = pipe.model.generate("cat", seed=seed, steps=4, policy="halton", temperature=0.8)
    assert torch.equal(tokens, ours.tokens)


def test_a_policy_may_end_early(pipe):
    options = {"policy": "stable", "policy_options": {"confidence": 0.0, "kl": 1e9, "history": 1}}
    (tokens,) = pipe("cat", generator=seeded(1), **(QUICK | {"num_inference_steps": 12}), **options)
    (seed,) = draw_seeds(seeded(1), 1)
    ours = pipe.model.generate("cat", seed=seed, steps=12, return_steps=True, **options)
    assert ours.trace.tokens.shape[1] < 12
    assert torch.equal(tokens, ours.tokens)


@pytest.mark.parametrize("label", ["truck", "guess", None])
def test_inpainting_is_that_of_our_own_pipeline(pipe, photo, mask, label):
    options = {"image": photo, "mask_image": mask, "generator": seeded(3), "num_inference_steps": 4}
    found = pipe([label], num_images_per_prompt=2, **options).images
    for seed, picture in zip(draw_seeds(seeded(3), 2), found, strict=True):
        ours = pipe.model.inpaint(photo, mask, label, seed=seed, steps=4).to_pil()[0]
        assert picture.size == photo.size
        assert np.abs(np.asarray(picture, np.int16) - np.asarray(ours)).max() <= 1
    untouched = np.asarray(found[0])[:, 40:], np.asarray(photo)[:, 40:]
    assert np.array_equal(*untouched)


def test_an_edit_of_a_transparent_photo_keeps_its_transparency(pipe, photo, mask):
    cut = photo.copy()
    cut.putalpha(200)
    options = {"image": cut, "mask_image": mask, "num_inference_steps": 2}
    assert pipe("cat", **options).images[0].mode == "RGBA"
    assert pipe("cat", output_type="pt", **options).images.shape == (1, 4, 40, 56)


def test_a_generators_image_does_not_depend_on_its_batch(pipe):
    (together,) = pipe(["cat", "dog", "cat"], generator=[seeded(7), seeded(8), seeded(9)], **QUICK)
    (alone,) = pipe("cat", generator=seeded(9), **QUICK)
    assert torch.equal(together[2], alone[0])
    (of_one,) = pipe("cat", generator=[seeded(9)], **QUICK)
    assert torch.equal(of_one, alone)
    # One generator for all draws in order, so that its first image is the same in any batch too.
    (in_order,) = pipe(["cat", "dog"], generator=seeded(9), **QUICK)
    assert torch.equal(in_order[0], alone[0])


def test_a_generator_moves_on(pipe):
    generator = seeded(4)
    first, second = (pipe("cat", generator=generator, **QUICK)[0] for _ in range(2))
    assert not torch.equal(first, second)
    (both,) = pipe("cat", num_images_per_prompt=2, generator=seeded(4), **QUICK)
    assert torch.equal(both, torch.cat([first, second]))


def test_without_a_generator_torchs_own_decides(pipe):
    torch.manual_seed(12)
    (first,) = pipe("cat", **QUICK)
    (second,) = pipe("cat", **QUICK)
    torch.manual_seed(12)
    (again,) = pipe("cat", **QUICK)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_seeds_are_draws_of_their_generators():
    expected = torch.randint(2**63 - 1, (3,), generator=seeded(0)).tolist()
    assert draw_seeds(seeded(0), 3) == expected
    assert len(set(expected)) == 3
    assert draw_seeds((seeded(0), seeded(0)), 2) == [expected[0]] * 2


def test_output_types(pipe):
    made = {
        kind: pipe(["cat", "dog"], generator=seeded(2), output_type=kind, num_inference_steps=2).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert made["np"].shape == (2, 32, 32, 3)
    assert made["np"].dtype == np.float32
    assert 0 <= made["np"].min() <= made["np"].max() <= 1
    assert np.array_equal(made["np"].transpose(0, 3, 1, 2), made["pt"].numpy())
    assert np.abs(made["np"][1] * 255 - np.asarray(made["pil"][1])).max() <= 0.5001
    assert torch.equal(pipe.model.decode_tokens(made["latent"]), made["pt"])


def test_the_output_types_of_a_photo_agree(pipe, photo, mask):
    options = {"image": photo, "mask_image": mask, "num_inference_steps": 2}
    made = {
        kind: pipe("cat", generator=seeded(2), output_type=kind, **options).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert made["np"].shape == (1, 40, 56, 3)
    assert np.array_equal(np.rint(made["np"][0] * 255), np.asarray(made["pil"][0]))
    assert np.array_equal(made["np"].transpose(0, 3, 1, 2), made["pt"].numpy())
    assert made["latent"].shape == (1, 8, 8)


def test_a_callback_sees_every_step(pipe):
    seen = []

    def callback(given, step, timestep, tensors):
        seen.append((given is pipe, step, int(timestep), tensors["latents"], tensors["tokens"]))
        return tensors

    options = QUICK | {"callback_on_step_end": callback}
    names = ["latents", "tokens"]
    (tokens,) = pipe(["cat", "dog"], generator=seeded(6), callback_on_step_end_tensor_inputs=names, **options)
    assert [entry[:3] for entry in seen] == [(True, 0, 3), (True, 1, 2), (True, 2, 1), (True, 3, 0)]
    vocabulary = pipe.model.vocabulary
    masked = [int((latents == vocabulary.mask).sum()) for *_, latents, _ in seen]
    assert masked == sorted(masked, reverse=True)
    assert masked[-1] == 0
    for *_, latents, sampled in seen:
        assert torch.equal(torch.where(latents == vocabulary.mask, sampled, latents), sampled)
    assert torch.equal(seen[-1][-1], tokens)
    (plain,) = pipe(["cat", "dog"], generator=seeded(6), **QUICK)
    assert torch.equal(tokens, plain)


def test_a_callback_can_stop(pipe):
    sampled = []

    def stop(given, step, _timestep, tensors):
        sampled.append(tensors["tokens"])
        given._interrupt = step == 1
        return tensors

    options = QUICK | {"num_inference_steps": 12, "callback_on_step_end": stop}
    (tokens,) = pipe("cat", generator=seeded(6), callback_on_step_end_tensor_inputs=["tokens"], **options)
    assert len(sampled) == 2
    assert torch.equal(tokens, sampled[1])
    assert pipe.interrupt
    pipe("cat", **QUICK)
    assert not pipe.interrupt


def test_a_callback_can_change_the_guidance(pipe):
    def switch_off(given, step, _timestep, tensors):
        if step == 1:
            given._guidance_scale = 0.0
        return tensors

    (tokens,) = pipe("cat", guidance_scale=6, generator=seeded(6), callback_on_step_end=switch_off, **QUICK)
    (seed,) = draw_seeds(seeded(6), 1)
    table = {"guidance_scale": [6, 6, 1, 1]}
    assert torch.equal(tokens, pipe.model.generate("cat", seed=seed, steps=4, tables=table).tokens)
    assert pipe.guidance_scale == 0


def test_a_callback_can_change_the_guidance_that_a_table_plans(pipe):
    seen = []

    def raise_it(given, step, _timestep, tensors):
        seen.append(given.guidance_scale)
        if step == 1:
            given._guidance_scale = np.float32(2.5)
        return tensors

    table = {"guidance_scale": [6, 5, 4, 3]}
    (tokens,) = pipe("cat", tables=table, generator=seeded(6), callback_on_step_end=raise_it, **QUICK)
    (seed,) = draw_seeds(seeded(6), 1)
    wanted = pipe.model.generate("cat", seed=seed, steps=4, tables={"guidance_scale": [6, 5, 2.5, 2.5]})
    assert torch.equal(tokens, wanted.tokens)
    # The next step's, as the property says; after the last there is none.
    assert seen == [5, 4, 2.5, 2.5]
    (tokens,) = pipe("cat", tables=table, generator=seeded(6), **QUICK)
    assert torch.equal(tokens, pipe.model.generate("cat", seed=seed, steps=4, tables=table).tokens)


def test_a_callback_can_change_the_guidance_of_an_edit_with_a_table(pipe, photo, mask):
    def lower(given, step, _timestep, tensors):
        if step == 0:
            given._guidance_scale = 0.0
        return tensors

    options = {"image": photo, "mask_image": mask, "tables": {"guidance_scale": [6, 5, 4, 3]}}
    (edited,) = pipe("cat", generator=seeded(6), callback_on_step_end=lower, **options, **QUICK)
    (seed,) = draw_seeds(seeded(6), 1)
    ours = pipe.model.inpaint(photo, mask, "cat", seed=seed, steps=4, tables={"guidance_scale": [6, 1, 1, 1]})
    assert torch.equal(edited, ours.tokens)


def test_a_callback_can_change_the_latents(pipe, photo, mask):
    vocabulary = pipe.model.vocabulary

    def fix(_pipe, step, _timestep, tensors):
        latents = tensors["latents"]
        if step == 1:
            latents[:, 0, 0] = 99
        return {"latents": latents}

    (tokens,) = pipe("cat", generator=seeded(6), callback_on_step_end=fix, **QUICK)
    assert int(tokens[0, 0, 0]) == 99

    def erase(_pipe, _step, timestep, tensors):
        if timestep:
            tensors["latents"].fill_(vocabulary.mask)
        return tensors

    options = {"image": photo, "mask_image": mask, "generator": seeded(6)}
    (edited,) = pipe("cat", callback_on_step_end=erase, **options, **QUICK)
    (seed,) = draw_seeds(seeded(6), 1)
    ours = pipe.model.inpaint(photo, mask, "cat", seed=seed, steps=4)
    assert torch.equal(edited[:, ~ours.token_mask], ours.tokens[:, ~ours.token_mask])


def test_a_diffusers_callback_names_its_own_tensors(pipe):
    class Count(PipelineCallback):
        tensor_inputs = ["tokens"]  # noqa: RUF012
        steps = 0

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert list(callback_kwargs) == ["tokens"]
            self.steps += 1
            return callback_kwargs

    count = Count(cutoff_step_ratio=1.0)
    pipe("cat", callback_on_step_end=count, **QUICK)
    assert count.steps == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": "cta"}, "Did you mean 3: cat"),
        ({"class_labels": []}, "B ≥ 1"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"num_inference_steps": 0}, "steps"),
        ({"guidance_scale": "much"}, "guidance_scale"),
        ({"steps": 4}, "num_inference_steps"),
        ({"prompt": "a cat"}, "prompt"),
        ({"generator": [seeded(1), seeded(2)]}, "2 generators for 1 images"),
        ({"generator": 5}, "torch.Generator"),
        ({"image": Image.new("RGB", (32, 32))}, "belong together"),
        ({"mask_image": Image.new("L", (32, 32))}, "belong together"),
        (
            {"class_labels": ["cat", "dog"], "image": Image.new("RGB", (9, 9)), "mask_image": Image.new("L", (9, 9))},
            "one class label",
        ),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "latents, tokens"),
        ({"callback_on_step_end": lambda *_: None}, "must return"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(2)}}, "1 × 8 × 8"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.full((1, 8, 8), 513)}}, "codes below 512, or 522"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.full((1, 8, 8), -1)}}, "codes below 512"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(pipe, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        pipe(**({"class_labels": "cat"} | QUICK | options))


def test_the_last_step_leaves_no_mask(pipe):
    def erase(_pipe, _step, _timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], pipe.model.vocabulary.mask)}

    with pytest.raises(ConfigError, match="after the last step"):
        pipe("cat", callback_on_step_end=erase, **QUICK)


def test_a_mask_of_another_size_is_refused(pipe, photo):
    with pytest.raises(RegionError, match="paint the mask"):
        pipe("cat", image=photo, mask_image=Image.new("L", (8, 8)), **QUICK)


def test_guidance_needs_a_model_that_can_be_guided(tiny):
    pipe = MaskGITPipeline(tiny)
    with pytest.raises(ConfigError, match="without label dropout"):
        pipe(3, guidance_scale=3, **QUICK)
    pipe(3, guidance_scale=0, **QUICK)


def test_it_is_moved_and_saved_as_diffusers_pipelines_are(tmp_path):
    pipe = MaskGITPipeline.from_pretrained(torch_dtype=torch.float64)
    assert pipe.dtype == torch.float64
    assert pipe.to(torch.float32) is pipe
    assert pipe.to("cpu", torch.bfloat16).dtype == torch.bfloat16
    assert pipe.to(device="cpu", dtype=torch.float32).dtype == torch.float32
    assert pipe.device == torch.device("cpu")
    with pytest.raises(ConfigError, match="Networks compute in"):
        pipe.to(torch.int8)
    with pytest.raises(ConfigError, match="not available"):
        pipe.to("cuda:77")
    pipe.save_pretrained(tmp_path / "model")
    assert MaskGIT.from_pretrained(tmp_path / "model").config == pipe.model.config
    assert pipe.get_label_ids(["frog", "ship"]) == [6, 8]


def test_the_progress_bar_is_configured(capfd):
    pipe = MaskGITPipeline.from_pretrained()
    pipe.set_progress_bar_config(desc="decoding")
    pipe("cat", **QUICK)
    assert "decoding: 100%" in capfd.readouterr().err


def test_diffusers_is_only_needed_for_its_output(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    pipe("cat", **QUICK)
    with pytest.raises(MaskGITError, match=r"pip install -c constraints.txt '\.\[diffusers\]'"):
        pipe("cat", **(QUICK | {"return_dict": True}))


def test_the_documents_examples_run(tmp_path, monkeypatch, photo, mask):
    text = (Path(__file__).parents[1] / "docs" / "diffusers.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    photo.save("photo.png")
    mask.save("mask.png")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/diffusers.md", "exec"), names)
    assert sorted(os.listdir()) == ["cat.png", "filled.png", "mask.png", "photo.png"]


def test_a_models_place_is_named_as_diffusers_names_it(monkeypatch, tmp_path):
    from maskgit.checkpoints import hugging_face

    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return MaskGIT.from_pretrained().save_pretrained(tmp_path / "model")

    monkeypatch.setattr(hugging_face, "download", download)
    options = {"revision": "v1", "token": "hf_x", "cache_dir": str(tmp_path), "local_files_only": True}
    MaskGITPipeline.from_pretrained("someone/model", **options)
    assert asked == options | {"repo_id": "someone/model"}
