"""Every number, type and seed at the public border, in every form that people pass."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit import MaskGIT, explain, images
from maskgit.apps.client import calls as client_calls
from maskgit.apps.client.client import Client
from maskgit.apps.serving.service import Limits
from maskgit.data.batches import Shuffler, sample_numbers
from maskgit.diffusers import MaskGITPipeline
from maskgit.editing import outpaint as outpainting
from maskgit.editing import regions
from maskgit.engine import choose
from maskgit.engine.batching import Batcher, Job
from maskgit.errors import ConfigError, RegionError
from maskgit.evaluation.metrics.distributions import inception_score, kernel_distance
from maskgit.evaluation.metrics.intervals import bootstrap_interval
from maskgit.evaluation.metrics.manifolds import authenticity, density_coverage, precision_recall
from maskgit.evaluation.metrics.vectors import nearest_neighbours
from maskgit.evaluation.runs.evaluate import EvaluationConfig
from maskgit.evaluation.runs.sampling import SampleConfig
from maskgit.foundation.checks import check_flag, plain
from maskgit.foundation.devices import choose_device, choose_dtype
from maskgit.networks.config import TokenizerConfig
from maskgit.sampler import loop as sampler
from maskgit.sampler import noise
from maskgit.sampler.config import SamplerConfig, StepTables
from maskgit.training.stream_config import StreamConfig
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.transformer_config import TransformerTrainingConfig

WHOLE = {
    "int64": np.int64(2),
    "uint8": np.uint8(2),
    "array": np.array(2, np.int32),
    "tensor": torch.tensor(2),
    "uint8 tensor": torch.tensor(2, dtype=torch.uint8),
}
NOT_WHOLE = [
    True,
    np.True_,
    torch.tensor(True),
    2.0,
    np.float32(2),
    torch.tensor(2.0),
    "2",
    np.array([2]),
    b"2",
    2j,
]
REAL = {
    "float16": np.float16(0.5),
    "float32": np.float32(0.5),
    "float64": np.float64(0.5),
    "array": np.array(0.5, np.float32),
    "tensor": torch.tensor(0.5),
    "bfloat16 tensor": torch.tensor(0.5, dtype=torch.bfloat16),
}
NOT_REAL = [
    True,
    np.True_,
    torch.tensor(True),
    "0.5",
    np.array([0.5]),
    torch.tensor([[0.5]]),
    float("nan"),
    0.5j,
]

PHOTO = Image.fromarray((np.random.default_rng(0).random((40, 50, 3)) * 255).astype("uint8"))
PAINTED = np.arange(40 * 50).reshape(40, 50) % 50 < 20
TOKENS = torch.arange(64).reshape(1, 8, 8)
LOGITS = np.random.default_rng(0).random((8, 4))
STEPS = {"steps": 2}


def decoded(**options):
    sequence = torch.full((1, 5), 9)
    zeros = lambda batch: torch.zeros(*batch.shape, 8)  # noqa: E731
    config = options.pop("config", SamplerConfig(steps=4))
    drawn = noise.ImageNoise(options.pop("seed", 0), torch.arange(1), 5, 8)
    return sampler.decode(zeros, sequence, config, mask_token=9, noise=drawn, **options)[:, -1]


def sent(call):
    """Return what a client sends."""
    request = call.request(10.0)
    return json.loads(request["content"]) if "content" in request else request["data"]


def frames(model, **options):
    made = model.generate(1, steps=1, return_steps=True)
    return [np.asarray(frame) for frame in explain.animation(model, made, **options)]


def sheet(**options):
    return np.asarray(images.contact_sheet(torch.zeros(3, 3, 4, 4), **options))


# Where whole numbers go, each of which may be 2: (model, number) → what it comes to.
WHOLE_ENTRIES = {
    "generate, steps": lambda m, n: m.generate(1, steps=n),
    "generate, num_images": lambda m, n: m.generate(1, num_images=n, **STEPS),
    "generate, seed": lambda m, n: m.generate(1, seed=n, **STEPS),
    "generate, first_index": lambda m, n: m.generate(1, first_index=n, **STEPS),
    "generate, batch_size": lambda m, n: m.generate([1, 2, 3], batch_size=n, **STEPS),
    "generate, policy_options": lambda m, n: m.generate(
        1, policy="self_critic", policy_options={"folds": n}, **STEPS
    ),
    "edit, boxes": lambda m, n: m.edit(PHOTO, [(n, n, 9, 9)], 1, **STEPS),
    "edit, start_step": lambda m, n: m.edit(PHOTO, (1, 1, 9, 9), 1, start_step=n, steps=4),
    "edit, num_images": lambda m, n: m.edit(PHOTO, (1, 1, 9, 9), 1, num_images=n, **STEPS),
    "edit, seed": lambda m, n: m.edit(PHOTO, (1, 1, 9, 9), 1, seed=n, **STEPS),
    "inpaint, dilate": lambda m, n: m.inpaint(PHOTO, PAINTED, 1, dilate=n, **STEPS),
    "inpaint, start_step": lambda m, n: m.inpaint(PHOTO, PAINTED, 1, start_step=n, steps=4),
    "inpaint, first_index": lambda m, n: m.inpaint(PHOTO, PAINTED, 1, first_index=n, **STEPS),
    "vary, num_images": lambda m, n: m.vary(PHOTO, 0.5, 1, num_images=n, **STEPS),
    "vary, seed": lambda m, n: m.vary(PHOTO, 0.5, 1, seed=n, **STEPS),
    "vary, first_index": lambda m, n: m.vary(PHOTO, 0.5, 1, first_index=n, **STEPS),
    "interpolate_classes, num_images": lambda m, n: m.interpolate_classes(1, 2, num_images=n, **STEPS),
    "interpolate_classes, seed": lambda m, n: m.interpolate_classes(1, 2, seed=n, **STEPS),
    "interpolate_images, smoothness": lambda m, n: m.interpolate_images(PHOTO, PHOTO, smoothness=n, **STEPS),
    "interpolate_images, refine": lambda m, n: m.interpolate_images(PHOTO, PHOTO, 1, refine=n, **STEPS),
    "interpolate_images, start_step": lambda m, n: m.interpolate_images(
        PHOTO, PHOTO, 1, refine=1, start_step=n, steps=4
    ),
    "outpaint, left": lambda m, n: m.outpaint(PHOTO, left=n, label=1, **STEPS),
    "outpaint, position": lambda m, n: m.outpaint(PHOTO, canvas=(60, 60), position=(n, 1), label=1, **STEPS),
    "outpaint, num_images": lambda m, n: m.outpaint(PHOTO, left=4, label=1, num_images=n, **STEPS),
    "outpaint, first_index": lambda m, n: m.outpaint(PHOTO, left=4, label=1, first_index=n, **STEPS),
    "panorama, width": lambda m, n: m.panorama(1, n, **STEPS),
    "panorama, height": lambda m, n: m.panorama(1, 40, height=n, **STEPS),
    "panorama, seed": lambda m, n: m.panorama(1, 40, seed=n, **STEPS),
    "log_likelihood, folds": lambda m, n: m.log_likelihood(TOKENS, 1, folds=n),
    "log_likelihood, seed": lambda m, n: m.log_likelihood(TOKENS, 1, seed=n),
    "guess_class, shortlist": lambda m, n: m.guess_class(TOKENS, shortlist=n),
    "guess_class, batch_size": lambda m, n: m.guess_class(TOKENS, batch_size=n),
    "generate_best, candidates": lambda m, n: m.generate_best(1, candidates=n, **STEPS),
    "generate_best, first_index": lambda m, n: m.generate_best(1, candidates=1, first_index=n, **STEPS),
    "generate_best, seed": lambda m, n: m.generate_best(1, candidates=1, seed=n, **STEPS),
    "fill, start_step": lambda m, n: m.fill(
        m.vocabulary.sequence(torch.tensor([1])), m.sampler_config(steps=4), start_step=n
    ),
    "diffusers, num_images_per_prompt": lambda m, n: MaskGITPipeline(m)(
        1, num_images_per_prompt=n, num_inference_steps=1, generator=torch.Generator(), return_dict=False
    )[0],
    "diffusers, num_inference_steps": lambda m, n: MaskGITPipeline(m)(
        1, num_inference_steps=n, generator=torch.Generator(), output_type="latent", return_dict=False
    )[0],
    "decode, start_step": lambda _, n: decoded(start_step=n),
    "noise, seed": lambda _, n: decoded(seed=n),
    "Job, seed": lambda m, n: Job(torch.zeros(5), SamplerConfig(), seed=n).seed,
    "Job, index": lambda m, n: Job(torch.zeros(5), SamplerConfig(), index=n).index,
    "Job, start_step": lambda m, n: Job(torch.zeros(5), SamplerConfig(), start_step=n).start_step,
    "Batcher, max_batch": lambda m, n: Batcher(m, max_batch=n).max_batch,
    "Batcher, sizes": lambda m, n: Batcher(m, sizes=[n]).sizes,
    "Limits": lambda _, n: Limits(queue_size=n, max_body=n).queue_size,
    "Client, retries": lambda _, n: Client("http://127.0.0.1:9", retries=n).retries,
    "client, boxes": lambda _, n: sent(client_calls.detokenize([[n, 1]])),
    "client, seed": lambda _, n: sent(client_calls.generate(1, seed=n, policy_options={"folds": n})),
    "client, class": lambda _, n: sent(client_calls.generate(n)),
    "box_to_token_mask, box": lambda _, n: regions.box_to_token_mask((n, 1, 9, 9), 32, 4),
    "box_to_token_mask, image_size": lambda _, n: regions.box_to_token_mask((0, 0, 1, 1), n, 1),
    "box_to_token_mask, patch": lambda _, n: regions.box_to_token_mask((0, 0, 1, 1), 8, n),
    "pixels_to_token_mask, dilate": lambda _, n: regions.pixels_to_token_mask(
        torch.eye(32, dtype=torch.bool), 4, dilate=n
    ),
    "animation, scale": lambda m, n: frames(m, scale=n),
    "animation, columns": lambda m, n: frames(m, columns=n),
    "animation, batch_size": lambda m, n: frames(m, batch_size=n),
    "contact_sheet, columns": lambda _, n: sheet(columns=n),
    "contact_sheet, padding": lambda _, n: sheet(padding=n),
    "contact_sheet, scale": lambda _, n: sheet(scale=n),
    "fit, size": lambda _, n: np.asarray(images.fit(PHOTO, n)),
    "SamplerConfig": lambda _, n: SamplerConfig(steps=n).to_dict(),
    "TokenizerConfig": lambda _, n: TokenizerConfig(num_res_blocks=n, channel_multipliers=(1, n)).to_dict(),
    "SampleConfig": lambda _, n: SampleConfig(num_images=n, seed=n).to_dict(),
    "EvaluationConfig": lambda _, n: EvaluationConfig(splits=n).to_dict(),
    "TransformerTrainingConfig": lambda _, n: TransformerTrainingConfig(
        out="run", data="data", tokenizer="t", batch_size=n, seed=n
    ).to_dict(),
    "TokenizerTrainingConfig": lambda _, n: TokenizerTrainingConfig(
        out="run", data="data", batch_size=n, seed=n
    ).to_dict(),
    "StreamConfig": lambda _, n: StreamConfig(source="here", lanes=n, decoded_size=n).to_dict(),
    "Shuffler": lambda _, n: [Shuffler(n, n).length, Shuffler(n, n).seed],
    "sample_numbers": lambda _, n: sample_numbers(0, n),
    "bootstrap_interval, resamples": lambda _, n: bootstrap_interval(LOGITS[:, 0], resamples=n),
    "bootstrap_interval, seed": lambda _, n: bootstrap_interval(LOGITS[:, 0], resamples=9, seed=n),
    "kernel_distance, subsets": lambda _, n: kernel_distance(LOGITS, LOGITS[:5], subsets=n, subset_size=3),
    "kernel_distance, subset_size": lambda _, n: kernel_distance(LOGITS, LOGITS[:5], subset_size=n),
    "precision_recall, k": lambda _, n: precision_recall(LOGITS, LOGITS[::-1], k=n),
    "density_coverage, k": lambda _, n: density_coverage(LOGITS, LOGITS[::-1], k=n),
    "authenticity, chunk": lambda _, n: authenticity(LOGITS, LOGITS[::-1], chunk=n),
    "nearest_neighbours, k": lambda _, n: nearest_neighbours(LOGITS, LOGITS, k=n),
    "inception_score, splits": lambda _, n: inception_score(LOGITS, splits=n),
    "inception_score, seed": lambda _, n: inception_score(LOGITS, splits=2, seed=n),
}
# What a client sends is checked by the server.
CHECKED = [name for name in WHOLE_ENTRIES if not name.startswith("client,")]

# Where real numbers go, each of which may be one half.
REAL_ENTRIES = {
    "generate, temperature": lambda m, x: m.generate(1, temperature=x, **STEPS),
    "generate, choice_temperature": lambda m, x: m.generate(1, choice_temperature=x, **STEPS),
    "generate, guidance_scale": lambda m, x: m.generate(1, guidance_scale=x, force_guidance=True, **STEPS),
    "generate, tables": lambda m, x: m.generate(1, tables={"temperature": [x, 0.5]}, **STEPS),
    "generate, policy_options": lambda m, x: m.generate(
        1, policy="moment", policy_options={"beta": x}, **STEPS
    ),
    "edit, feather": lambda m, x: m.edit(PHOTO, (1, 1, 9, 9), 1, feather=x, **STEPS),
    "inpaint, share": lambda m, x: m.inpaint(PHOTO, PAINTED, 1, share=x, **STEPS),
    "inpaint, feather": lambda m, x: m.inpaint(PHOTO, PAINTED, 1, feather=x, **STEPS),
    "vary, strength": lambda m, x: m.vary(PHOTO, x, 1, **STEPS),
    "interpolate_classes, switch": lambda m, x: m.interpolate_classes(1, 2, switch=x, **STEPS),
    "interpolate_images, share": lambda m, x: m.interpolate_images(PHOTO, PHOTO, share=x, **STEPS),
    "outpaint, feather": lambda m, x: m.outpaint(PHOTO, left=4, label=1, feather=x, **STEPS),
    "diffusers, guidance_scale": lambda m, x: MaskGITPipeline(m)(
        1, guidance_scale=x, num_inference_steps=1, generator=torch.Generator(), return_dict=False
    )[0],
    "composite, feather": lambda _, x: regions.composite(
        torch.zeros(3, 8, 8), torch.ones(3, 8, 8), torch.eye(2, dtype=torch.bool), 4, x
    ),
    "pixels_to_token_mask, share": lambda _, x: regions.pixels_to_token_mask(
        torch.eye(32, dtype=torch.bool), 4, share=x
    ),
    "SamplerConfig": lambda _, x: SamplerConfig(
        temperature=x, tables=StepTables(temperature=(x,) * 8)
    ).to_dict(),
    "ModelConfig": lambda m, x: dataclasses.replace(m.config, label_dropout=x).to_dict(),
    "TransformerTrainingConfig": lambda _, x: TransformerTrainingConfig(
        out="run", data="data", tokenizer="t", learning_rate=x, betas=(x, 0.5)
    ).to_dict(),
    "TokenizerTrainingConfig": lambda _, x: TokenizerTrainingConfig(
        out="run", data="data", learning_rate=x
    ).to_dict(),
    "StreamConfig": lambda _, x: StreamConfig(source="here", max_bad_share=x).to_dict(),
    "bootstrap_interval, level": lambda _, x: bootstrap_interval(LOGITS[:, 0], level=x, resamples=9),
    "Limits": lambda _, x: Limits(timeout=x).timeout,
    "Client, timeout": lambda _, x: Client("http://127.0.0.1:9", timeout=x).timeout,
    "client, temperature": lambda _, x: sent(client_calls.generate(1, temperature=x)),
}


def comparable(made):
    """Return what can be compared: the tokens and images of an `Output`, tensors as lists, pictures as arrays."""
    if hasattr(made, "tokens"):
        return [made.tokens.tolist(), made.images.tolist()]
    if isinstance(made, list) and made and isinstance(made[0], Image.Image):
        made = [np.asarray(picture) for picture in made]
    return plain([made])


@pytest.mark.parametrize("entry", WHOLE_ENTRIES)
def test_whole_numbers_of_any_type(tiny, entry):
    made = comparable(WHOLE_ENTRIES[entry](tiny, 2))
    # Everywhere the same conversion, so that the slow entries need not see every type.
    for kind in WHOLE if entry.startswith(("generate", "Sampler")) else ("int64", "tensor"):
        assert comparable(WHOLE_ENTRIES[entry](tiny, WHOLE[kind])) == made, kind


@pytest.mark.parametrize("entry", CHECKED)
def test_what_is_no_whole_number_is_refused(tiny, entry):
    for value in NOT_WHOLE:
        with pytest.raises((ConfigError, RegionError), match=r"whole number|multiples of"):
            WHOLE_ENTRIES[entry](tiny, value)


@pytest.mark.parametrize("entry", REAL_ENTRIES)
def test_real_numbers_of_any_type(tiny, entry):
    made = comparable(REAL_ENTRIES[entry](tiny, 0.5))
    for kind in REAL if entry.startswith(("generate", "Sampler")) else ("float32", "bfloat16 tensor"):
        assert comparable(REAL_ENTRIES[entry](tiny, REAL[kind])) == made, kind


@pytest.mark.parametrize("entry", [name for name in REAL_ENTRIES if not name.startswith("client,")])
def test_what_is_no_real_number_is_refused(tiny, entry):
    for value in NOT_REAL:
        with pytest.raises(ConfigError, match=r"must be a number|must be between|must be a list"):
            REAL_ENTRIES[entry](tiny, value)


SEED_WORDS = torch.tensor([[1, 0], [2, 0]])
SEEDED = [name for name in CHECKED if name.endswith(", seed")]


@pytest.mark.parametrize("entry", SEEDED)
def test_a_tensor_is_never_taken_for_words_of_seeds(tiny, entry):
    with pytest.raises(ConfigError, match="seed must be a whole number"):
        WHOLE_ENTRIES[entry](tiny, SEED_WORDS)
    with pytest.raises(ConfigError, match="seed must be between 0"):
        WHOLE_ENTRIES[entry](tiny, torch.tensor(-1))
    with pytest.raises(ConfigError, match="seed must be between 0"):
        WHOLE_ENTRIES[entry](tiny, 2**64)


def test_seeds_that_only_numpy_can_hold(tiny):
    seed = 2**64 - 1
    assert torch.equal(
        tiny.generate(1, seed=np.uint64(seed), **STEPS).tokens, tiny.generate(1, seed=seed, **STEPS).tokens
    )


def test_saved_settings_are_plain_numbers(tiny):
    config = tiny.sampler_config(steps=np.int64(4), temperature=np.float32(0.9), force_guidance=np.True_)
    assert json.loads(json.dumps(config.to_dict()))["temperature"] == float(np.float32(0.9))
    tables = StepTables(
        temperature=np.linspace(1, 0, 3, dtype=np.float32), mask_ratio=torch.tensor([0.5, 0.25, 0.0])
    )
    assert json.dumps(tables.to_dict()["temperature"]) == "[1.0, 0.5, 0.0]"
    # What was whole stays so, as older records have it.
    assert json.dumps(SamplerConfig(temperature=1).to_dict()["temperature"]) == "1"
    for flag in (np.True_, torch.tensor(True), True):
        assert check_flag("flag", flag) is True
    with pytest.raises(ConfigError, match="true or false"):
        SamplerConfig(force_guidance=1)


@pytest.mark.parametrize("label", [np.int64(3), torch.tensor(3), np.array(3), np.str_("3"), "3", 3])
def test_classes_of_any_type(tiny, label):
    wanted = tiny.generate(3, **STEPS).tokens
    assert torch.equal(tiny.generate(label, **STEPS).tokens, wanted)
    assert torch.equal(tiny.generate([label], **STEPS).tokens, wanted)
    assert torch.equal(tiny.panorama(label, 32, **STEPS).tokens, tiny.panorama(3, 32, **STEPS).tokens)
    edited = tiny.edit(PHOTO, (1, 1, 9, 9), label, **STEPS)
    assert torch.equal(edited.tokens, tiny.edit(PHOTO, (1, 1, 9, 9), 3, **STEPS).tokens)


@pytest.mark.parametrize("label", [True, np.True_, torch.tensor(True), 3.0, torch.tensor(3.0)])
def test_what_is_no_class_is_refused(tiny, label):
    with pytest.raises(ConfigError, match="class"):
        tiny.generate(label, **STEPS)


@pytest.mark.parametrize(
    "boxes", [np.array([2, 2, 9, 9]), torch.tensor([[2, 2, 9, 9]]), [torch.tensor([2, 2, 9, 9])]]
)
def test_boxes_of_any_type(tiny, boxes):
    wanted = tiny.edit(PHOTO, (2, 2, 9, 9), 1, **STEPS)
    assert torch.equal(tiny.edit(PHOTO, boxes, 1, **STEPS).tokens, wanted.tokens)


def test_canvases_of_any_type(tiny):
    wanted = outpainting.outpaint(tiny, PHOTO, canvas=(60, 50), label=1, **STEPS)
    for canvas in (np.array([60, 50]), torch.tensor([60, 50]), [np.int64(60), 50]):
        assert torch.equal(
            outpainting.outpaint(tiny, PHOTO, canvas=canvas, label=1, **STEPS).tokens, wanted.tokens
        )


DTYPES = [torch.float16, "half", "fp16", "float16", "torch.float16", np.float16, np.dtype("float16")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_in_any_form(dtype, tmp_path):
    def kind(model):
        kinds = {p.dtype for net in (model.tokenizer, model.transformer) for p in net.parameters()}
        assert len(kinds) == 1
        return kinds.pop()

    model = MaskGIT.from_pretrained(dtype=dtype)
    assert kind(model) == torch.float16
    assert kind(MaskGIT.from_pretrained(torch_dtype=dtype)) == torch.float16
    assert kind(MaskGIT.from_pretrained().to(dtype=dtype)) == torch.float16
    assert kind(MaskGIT.from_pretrained().to(dtype, "cpu")) == torch.float16
    assert MaskGITPipeline.from_pretrained(torch_dtype=dtype).dtype == torch.float16
    assert MaskGITPipeline.from_pretrained(dtype=dtype).to(dtype=dtype).dtype == torch.float16
    assert MaskGIT.from_pretrained().optimize("exact", dtype=dtype).engine.dtype == "float16"
    MaskGIT.from_pretrained().save_pretrained(tmp_path / "half", dtype=dtype)
    # As it is stored, in float32 and in float32.
    assert kind(MaskGIT.from_pretrained(tmp_path / "half", dtype="auto")) == torch.float16
    assert kind(MaskGIT.from_pretrained(tmp_path / "half", dtype=None)) == torch.float32
    assert kind(MaskGIT.from_pretrained(tmp_path / "half")) == torch.float32


def test_no_choice_of_type_changes_nothing(tmp_path):
    half = MaskGIT.from_pretrained(dtype="float16")
    for dtype in (None, "auto"):
        assert next(half.to(dtype=dtype).transformer.parameters()).dtype == torch.float16
        folder = half.save_pretrained(tmp_path / str(dtype), dtype=dtype)
        kept = MaskGIT.from_pretrained(folder, dtype="auto")
        assert next(kept.transformer.parameters()).dtype == torch.float16
        assert choose("int8", device="cpu", quantize="", compile=True, dtype=dtype).dtype == "float32"
        assert choose_dtype(dtype) is None


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("float17", "Unknown dtype 'float17'. Did you mean 'float1"),
        ("int64", "Networks compute in"),
        (torch.int8, "Networks compute in"),
        (np.int32, "Networks compute in"),
        (torch.float8_e4m3fn, "Networks compute in"),
        (16, "Unknown dtype '16'"),
        (True, "Unknown dtype 'True'"),
    ],
    ids=str,
)
def test_what_is_no_type_is_refused(dtype, message):
    model = MaskGIT.from_pretrained()
    for attempt in (
        lambda: MaskGIT.from_pretrained(dtype=dtype),
        lambda: MaskGITPipeline.from_pretrained(dtype=dtype),
        lambda: model.to(dtype=dtype),
        lambda: model.optimize("exact", dtype=dtype),
    ):
        with pytest.raises(ConfigError, match=message):
            attempt()


@pytest.mark.parametrize("device", ["cuda:77", "nonsense", torch.device("cuda:77"), 77])
def test_devices_that_are_not_there(device):
    for attempt in (
        lambda: MaskGIT.from_pretrained(device=device),
        lambda: MaskGIT.from_pretrained().to(device),
        lambda: MaskGIT.from_pretrained().to(device=device),
        lambda: MaskGITPipeline.from_pretrained().to(device),
        lambda: MaskGIT.from_pretrained().optimize(device=device),
        lambda: choose_device(device),
    ):
        with pytest.raises(ConfigError, match=r"The device .* is not available here; try --device cpu"):
            attempt()


def test_copies_and_pickles(tiny):
    wanted = tiny.generate(1, **STEPS).tokens
    plain_copy = copy.deepcopy(tiny)
    assert torch.equal(plain_copy.generate(1, **STEPS).tokens, wanted)
    first, second = (next(model.transformer.parameters()) for model in (tiny, plain_copy))
    assert first.data_ptr() != second.data_ptr()
    # Only weights that we trained ourselves, in this process.
    assert torch.equal(pickle.loads(pickle.dumps(tiny)).generate(1, **STEPS).tokens, wanted)


@pytest.mark.parametrize(
    "choices", [{"dtype": "float16"}, {"mode": "int8"}, {"mode": "exact", "compile": True}]
)
def test_copies_and_pickles_of_optimized_models(tiny, choices):
    fast = tiny.optimize(**{"mode": "exact"} | choices)
    for copied in (copy.copy(fast), copy.deepcopy(fast)):
        assert copied is not fast
        assert copied.engine == fast.engine
        if "compile" not in choices:
            assert torch.equal(copied.generate(1, **STEPS).tokens, fast.generate(1, **STEPS).tokens)
    with pytest.raises(ConfigError, match="An optimized model cannot be pickled"):
        pickle.dumps(fast)
