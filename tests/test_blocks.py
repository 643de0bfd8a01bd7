"""Transformers that are not official: modern blocks, groups, and tokenizers with a stem, through the whole package."""

import cmath
import copy
import json
import math

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from maskgit import MaskGIT, hub
from maskgit.apps.cli import main
from maskgit.apps.serving.handlers import detokenize
from maskgit.apps.serving.schemas import Detokenize
from maskgit.config import ModelConfig, SamplerConfig, TokenizerConfig, TransformerConfig
from maskgit.convert import save_official
from maskgit.diffusers import MaskGITPipeline
from maskgit.engine import prepare_convolutions
from maskgit.engine.layers import can_pack, ways
from maskgit.errors import ConfigError, RegionError
from maskgit.export import PARTS
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import _TURNS, Transformer, _turned, _turns
from maskgit.networks.vocabulary import Vocabulary
from maskgit.results import Draw
from maskgit.sampler.policies import POLICIES
from maskgit.training.objectives.losses import sequence_losses
from maskgit.training.objectives.masking import draw_masks
from maskgit.training.train_transformer import attention, flops_per_image

SMALL = {
    "num_classes": 3,
    "grid_size": 4,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
    "dropout": 0.0,
}
KINDS = {
    "adaln": {"num_codes": 16, "block": "modern", "conditioning": "adaln"},
    "rotary": {"num_codes": 16, "block": "modern", "positions": "rotary", "registers": 2},
    "rotary adaln": {
        "num_codes": 16,
        "block": "modern",
        "positions": "rotary",
        "conditioning": "adaln",
        "registers": 1,
    },
    "rotary groups": {"num_codes": 16, "block": "modern", "positions": "rotary", "groups": 2},
    "width": {"num_codes": 16, "block": "modern", "query_key_norm": "width"},
    "groups": {"num_codes": 16, "block": "modern", "groups": 2},
    "adaln groups": {"num_codes": 16, "block": "modern", "groups": 4, "conditioning": "adaln"},
    "official groups": {"num_codes": 16, "groups": 2, "tie_embeddings": False},
    "pre_norm": {"num_codes": 16, "block": "pre_norm", "activation": "gelu"},
}


def model_of(kind: str, **sampler) -> MaskGIT:
    torch.manual_seed(0)
    config = ModelConfig(
        TokenizerConfig(
            filters=32, num_res_blocks=1, channel_multipliers=(1, 1), embedding_dim=4, codebook_size=16
        ),
        TransformerConfig(**SMALL, **KINDS[kind]),
        image_size=8,
        label_dropout=0.1,
        sampler=SamplerConfig(steps=4, **sampler),
    )
    transformer = Transformer(config.transformer)
    for parameter in transformer.parameters():
        # What begins at zero would hide what it multiplies.
        torch.nn.init.normal_(parameter, std=0.3)
    return MaskGIT(config, Tokenizer(config.tokenizer).eval(), transformer.eval())


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_the_mask_and_every_token_are_seen(kind):
    model = model_of(kind)
    vocabulary = model.vocabulary
    tokens = torch.randint(16, (1, 4, 4), generator=torch.Generator().manual_seed(1))
    one = model.predict_logits(vocabulary.sequence(torch.tensor([0]), tokens))
    assert one.shape == (1, vocabulary.num_tokens + 1, vocabulary.num_codes)
    other_class = model.predict_logits(vocabulary.sequence(torch.tensor([1]), tokens))
    no_class = model.predict_logits(vocabulary.sequence(torch.tensor([-1]), tokens))
    changed = tokens.clone()
    changed[0, 3, 3] = (changed[0, 3, 3] + 5) % 16
    other_token = model.predict_logits(vocabulary.sequence(torch.tensor([0]), changed))
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 3, 3] = True
    masked = model.predict_logits(vocabulary.sequence(torch.tensor([0]), tokens, mask))
    found = [other_class, no_class, other_token, masked]
    for i, logits in enumerate(found):
        assert not torch.allclose(logits[:, 1], one[:, 1], atol=1e-4), i
        assert all(not torch.allclose(logits, other) for other in found[:i])


@pytest.mark.parametrize("kind", KINDS)
def test_some_positions_are_those_of_all(kind):
    model = model_of(kind)
    sequence = model.vocabulary.sequence(torch.tensor([0, 2]))
    places = torch.tensor([[1, 5, 16], [2, 3, 4]])
    whole = model.transformer(sequence)
    assert torch.allclose(
        model.transformer(sequence, positions=places),
        whole.gather(1, places[..., None].expand(-1, -1, whole.shape[-1])),
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_images_do_not_depend_on_their_batch_and_folders_bring_them_back(kind, tmp_path):
    model = model_of(kind, guidance_scale=2.0)
    whole = model.generate([0, 1, 2, 1], seed=3, batch_size=4)
    single = model.generate([0, 1, 2, 1], seed=3, batch_size=1)
    assert torch.equal(whole.tokens, single.tokens)
    assert whole.tokens.max() < 16
    hub.save_model(model, tmp_path / "model")
    again = MaskGIT.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again.generate([0, 1, 2, 1], seed=3, batch_size=4).tokens, whole.tokens)


@pytest.mark.parametrize("policy", ["confidence", "halton", "random"])
def test_an_edit_keeps_what_is_known_of_a_grouped_model(policy):
    model = model_of("groups", policy=policy)
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    tokens = model.encode_pixels(picture)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:3, 1:3] = True
    sequence = model.vocabulary.sequence(torch.tensor([1]), tokens, mask)
    (output,) = model.fill_batches(sequence, model.sampler_config(), Draw(seed=5))
    assert torch.equal(output.tokens[0][~mask], tokens[0][~mask])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_engine_runs_every_kind(kind, mode):
    model = model_of(kind)
    fast = model.optimize(mode, dtype="float32")
    sequence = model.vocabulary.sequence(torch.tensor([0, 1]))
    sequence[:, 1:9] = 3
    masked = sequence == model.vocabulary.mask
    expected = model.predict_logits(sequence)
    found = fast.predictor(known=False)(sequence)
    assert torch.allclose(found[masked], expected[masked], atol=1e-3)


@pytest.mark.parametrize("block", ["official", "taming"])
def test_the_engines_tokenizer_changes_width_as_the_block_does(block):
    """A block of another width reads its input in the shortcut, or what it made: so does its packed form."""
    torch.manual_seed(0)
    config = TokenizerConfig(
        filters=32, num_res_blocks=1, channel_multipliers=(1, 2), embedding_dim=4, codebook_size=16, block=block,
        attention=block == "taming", latent_channels=32 * (block == "taming"), conv_downsample=True, downsample_kernel=3,
    )  # fmt: skip
    plain = Tokenizer(config).eval()
    fast = copy.deepcopy(plain)
    prepare_convolutions(fast, pack=can_pack(torch.float32))
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(fast.encoder(image), plain.encoder(image), atol=1e-4)
    tokens = plain.encode(image)
    assert torch.allclose(fast.decode(tokens), plain.decode(tokens), atol=1e-4)


def test_groups_are_digits_of_the_code_the_lowest_first():
    vocabulary = Vocabulary(num_codes=4, num_classes=3, grid_size=2, groups=2)
    tokens = torch.tensor([[[0, 5], [14, 3]]])
    sequence = vocabulary.sequence(torch.tensor([1]), tokens)
    assert sequence.tolist() == [[5, 0, 0, 1, 1, 2, 3, 3, 0]]
    assert torch.equal(vocabulary.grid(sequence), tokens)
    half = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    half[0, 1, 0, 1] = True
    assert vocabulary.sequence(torch.tensor([1]), tokens, half).tolist() == [[5, 0, 0, 1, 1, 2, 7, 3, 0]]
    assert vocabulary.grid(torch.tensor([[False] * 6 + [True, False, False]])).tolist() == [
        [[False, False], [True, False]]
    ]


def test_sampling_in_one_step_follows_the_product_of_the_groups():
    model = model_of("groups", temperature=1.0)
    logits = model.predict_logits(model.vocabulary.sequence(torch.tensor([0])))[0, 1:3].softmax(-1)
    expected = (logits[1][:, None] * logits[0]).flatten()  # Group 1 is the high digit.
    count = 4000
    output = model.generate([0] * count, seed=7, batch_size=500, steps=1)
    seen = torch.bincount(output.tokens[:, 0, 0], minlength=16)
    chi_square = float(((seen - count * expected) ** 2 / (count * expected)).sum())
    assert chi_square < 37.7  # 0.1 % of 15 degrees of freedom


def test_rotary_positions_turn_by_row_and_column():
    cosines, sines = _turns(3, 5, 8, 1, 2, torch.device("cpu"))
    assert cosines.shape == (1 + 15 + 2, 4)
    x = torch.randn(1, 1, 18, 8, generator=torch.Generator().manual_seed(0))
    found = _turned(x, cosines, sines)
    assert torch.equal(found[:, :, [0, 16, 17]], x[:, :, [0, 16, 17]])
    row, column = 2, 3
    place = 1 + row * 5 + column
    for i, angle in enumerate([row, row / 10, column, column / 10]):
        number = complex(x[0, 0, place, i], x[0, 0, place, i + 4]) * cmath.exp(1j * angle)
        assert found[0, 0, place, i] == pytest.approx(number.real, abs=1e-5)
        assert found[0, 0, place, i + 4] == pytest.approx(number.imag, abs=1e-5)


def test_modern_layers_compute_in_bfloat16_without_a_warning(recwarn):
    model = model_of("rotary")
    sequence = model.vocabulary.sequence(torch.tensor([0]))
    expected = model.predict_logits(sequence)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model.transformer(sequence, codes=16)
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert not [warning for warning in recwarn if "fused" in str(warning.message)]


def test_a_new_modern_model_predicts_nothing_yet():
    torch.manual_seed(1)
    network = Transformer(TransformerConfig(**SMALL, **KINDS["adaln"])).eval()
    one, other = (network(torch.full((1, 17), 19).index_fill(1, torch.tensor([0]), c)) for c in (16, 17))
    assert torch.equal(one[:, 1:], other[:, 1:])


@pytest.mark.parametrize("stem", [1, 2, 4])
def test_a_stem_folds_pixels_into_channels(stem):
    config = TokenizerConfig(
        filters=32,
        num_res_blocks=1,
        channel_multipliers=(1, 2),
        embedding_dim=6,
        codebook_size=64,
        quantizer="lfq",
        stem=stem,
    )
    assert config.patch_size == 2 * stem
    network = Tokenizer(config).eval()
    images = torch.rand(2, 3, 32, 32)
    tokens = network.encode(images)
    assert tokens.shape == (2, 16 // stem, 16 // stem)
    assert network.decode(tokens).shape == images.shape


def test_bits_are_signs_and_distances_agree_with_them():
    config = TokenizerConfig(
        filters=32, channel_multipliers=(1, 1), embedding_dim=5, codebook_size=32, quantizer="lfq"
    )
    quantizer = Tokenizer(config).quantizer
    features = torch.randn(2, 5, 3, 3, requires_grad=True)
    made = quantizer(features)
    assert torch.equal(made.tokens, made.distances[0].argmin(-1))
    assert torch.equal(made.features, features.sign())
    assert made.tokens[0, 0, 0] == sum(2**i for i in range(5) if features[0, i, 0, 0] > 0)
    made.features.sum().backward()
    assert torch.equal(features.grad, torch.ones_like(features))


def test_official_configs_are_written_as_before():
    official = TransformerConfig()
    assert list(official.to_dict()) == [
        "num_codes", "num_classes", "grid_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "dropout",
    ]  # fmt: skip
    modern = TransformerConfig(**SMALL, **KINDS["rotary"])
    assert TransformerConfig.from_dict(json.loads(json.dumps(modern.to_dict()))) == modern


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"positions": "rotary"}, 'needs block = "modern"'),
        ({"groups": 3}, "to the power of groups"),
        ({"block": "modern", "positions": "rotary", "num_heads": 16, "hidden_size": 32}, "a multiple of 4"),
        ({"block": "newest"}, "Unknown block"),
        ({"block": "modern", "grid_columns": 6}, 'grid_columns needs positions = "rotary"'),
    ],
)
def test_shapes_that_do_not_fit_are_sentences(choices, said):
    with pytest.raises(ConfigError, match=said):
        TransformerConfig(**(SMALL | {"num_codes": 16} | choices))


def test_googles_format_has_no_place_for_them(tmp_path):
    with pytest.raises(ConfigError, match="has no place for this transformer's block = 'modern'"):
        save_official(model_of("adaln"), tmp_path)


@pytest.mark.parametrize("kind", ["adaln", "rotary", "groups", "official groups"])
def test_the_work_of_a_step_is_what_torch_counts(kind):
    network = Transformer(TransformerConfig(**SMALL, **KINDS[kind]))
    sequence = Vocabulary.of(network.config).sequence(torch.tensor([1]))
    with attention(torch.device("cpu")), FlopCounterMode(display=False) as counter:
        network(sequence, codes=network.config.unit_codes)
    assert flops_per_image(network.config) == pytest.approx(3 * counter.get_total_flops())


@pytest.mark.parametrize("kind", ["rotary adaln", "groups"])
def test_they_learn(kind):
    torch.manual_seed(0)
    network = Transformer(TransformerConfig(**SMALL, **KINDS[kind]))
    vocabulary = Vocabulary.of(network.config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    labels = torch.arange(60) % 3
    tokens = (labels * 5)[:, None, None].expand(-1, 4, 4)  # One code for each class.
    losses = []
    for step in range(40):
        masks = draw_masks(0, torch.arange(60) + 60 * step, (4, 4), groups=vocabulary.groups)
        logits = network(vocabulary.sequence(labels, tokens, masks.mask), codes=vocabulary.num_codes)
        loss = sequence_losses(
            logits[:, 1:], vocabulary.split(tokens).flatten(1), masks.mask.flatten(1)
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(vocabulary.num_codes), abs=0.7)
    assert losses[-1] < 0.05


@pytest.mark.parametrize("kind", ["rotary", "rotary adaln", "rotary groups"])
def test_rotary_models_make_images_of_other_sizes(kind, tmp_path):
    model = model_of(kind, guidance_scale=2.0)
    assert model.resized(8, 8) is model
    wide = model.resized(10, 6)
    whole = wide.generate([0, 1, 2], seed=3)
    assert whole.tokens.shape == (3, 3, 5)
    assert whole.images.shape == (3, 3, 6, 10)
    assert torch.equal(wide.generate([0, 1, 2], seed=3, batch_size=1).tokens, whole.tokens)
    assert wide.resized(8, 8).config == model.config
    assert torch.equal(wide.resized(8, 8).generate([1], seed=3).tokens, model.generate([1], seed=3).tokens)
    assert wide.log_likelihood(whole.tokens, [0, 1, 2]).shape == (3,)
    hub.save_model(model, tmp_path / "model")
    command = ["generate", "--class", "1", "--model", str(tmp_path / "model"), "--seed", "3"]
    assert main([*command, "--size", "10", "6", "--out", str(tmp_path / "out")]) == 0
    (picture,) = (path for path in (tmp_path / "out").glob("*.png") if path.name != "sheet.png")
    with Image.open(picture) as image:
        assert image.size == (10, 6)


def test_photographs_are_edited_as_squares():
    with pytest.raises(ConfigError, match="take the model before `resized`"):
        model_of("rotary").resized(10, 6).outpaint(torch.rand(1, 3, 8, 8), left=4, label=1)


def test_a_resized_grid_turns_by_its_own_rows_and_columns():
    model = model_of("rotary").resized(10, 6)
    cosines, _ = model.transformer.context(model.vocabulary.sequence(torch.tensor([1])))[1]
    expected, _ = _turns(3, 5, 8, 1, 2, torch.device("cpu"))
    assert torch.equal(cosines, expected)


@pytest.mark.parametrize(
    ("kind", "size", "said"),
    [
        ("adaln", (10, 6), "images of 8 × 8 pixels alone"),
        ("rotary", (9, 6), "width must be a multiple of the 2 pixels of a token, but is 9"),
        ("rotary", (10, 0), "height"),
        ("rotary", (2 * 257, 8), "width"),
    ],
)
def test_sizes_that_do_not_fit_are_sentences(kind, size, said):
    with pytest.raises(ConfigError, match=said):
        model_of(kind).resized(*size)


def test_all_codes_of_a_grouped_model_are_scored_and_decoded():
    model = model_of("groups")
    tokens = torch.arange(16).view(1, 4, 4)
    found = model.log_likelihood(tokens, [1], folds=16 * 2)
    # Each group by itself, from all others, is a fold of its own: the pseudo-likelihood as it is written.
    sequence = model.vocabulary.sequence(torch.tensor([1]), tokens)
    expected = 0.0
    for place in range(1, 33):
        read = sequence.clone()
        read[0, place] = model.vocabulary.mask
        expected += float(model.predict_logits(read)[0, place].log_softmax(-1)[sequence[0, place]])
    assert float(found) == pytest.approx(expected, abs=1e-3)
    with pytest.raises(RegionError, match="image codes from 0 to 15"):
        model.log_likelihood(tokens + 1, [1])
    made = detokenize(model, Detokenize(tokens=tokens[0].tolist()), None)
    assert torch.equal(made.images, model.decode_tokens(tokens))


@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_policy_decodes_groups(policy):
    model = model_of("groups", policy=policy)
    tokens = model.generate([0, 1], seed=1).tokens
    assert tokens.shape == (2, 4, 4)
    assert torch.equal(model.generate([0, 1], seed=1, batch_size=1).tokens, tokens)


@pytest.mark.parametrize("kind", ["rotary adaln", "groups"])
def test_modern_layers_are_traced_whole(kind):
    model = model_of(kind)
    sequence = model.vocabulary.sequence(torch.tensor([0, 1]))
    expected = model.predict_logits(sequence)
    traced = torch.compile(model.transformer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(traced(sequence, codes=model.vocabulary.num_codes), expected, atol=1e-5)
    for part in (PARTS["transformer"](model), PARTS["decoder"](model), PARTS["encoder"](model)):
        example = part.example(2)
        _TURNS.clear()
        program = torch.export.export(part, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        other = part.example(3)
        assert part.difference(other, program.module()(other)).error < 1e-4
    # Tracing leaves nothing behind in what is kept, and neither does inference.
    assert torch.equal(model.predict_logits(sequence), expected)
    _TURNS.clear()
    with torch.inference_mode():
        model.transformer(sequence)
    model.transformer(sequence).sum().backward()


@pytest.mark.parametrize("kind", ["rotary adaln", "groups"])
def test_int8_layers_serve_modern_blocks(kind):
    if "int8" not in ways(torch.float32):
        pytest.skip("this build of torch has no int8 products")
    model = model_of(kind)
    sequence = model.vocabulary.sequence(torch.tensor([0, 1]))
    expected = model.predict_logits(sequence)[:, 1:]
    found = model.optimize("int8").predict_logits(sequence)[:, 1:]
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_a_callback_of_diffusers_is_refused_where_codes_are_drawn_in_parts():
    pipe = MaskGITPipeline(model_of("groups"))
    assert len(pipe(class_labels=[1], num_inference_steps=2, output_type="pt").images) == 1
    with pytest.raises(ConfigError, match="draws parts of them"):
        pipe(class_labels=[1], num_inference_steps=2, callback_on_step_end=lambda *given: given[-1])
