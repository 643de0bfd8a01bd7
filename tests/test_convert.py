"""Official checkpoints ↔ ours, and the networks against the official code's records."""

import json
import logging
from dataclasses import replace

import msgpack
import numpy as np
import pytest
import torch

from golden_weights import arrays as golden_arrays
from maskgit import MaskGIT, convert
from maskgit.checkpoints import flax_msgpack as flaxio
from maskgit.checkpoints import official_table
from maskgit.errors import CheckpointError, ConfigError, MaskGITError
from maskgit.networks.config import TokenizerConfig, TransformerConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer
from maskgit.sampler.config import SamplerConfig


def bchw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).movedim(-1, 1)


def masked(sequence: np.ndarray, mask: int) -> torch.Tensor:
    sequence = torch.from_numpy(sequence).long()
    return torch.where(sequence < 0, mask, sequence)


def loaded(kind, config, state):
    with torch.device("meta"):
        network = kind(config)
    network.load_state_dict(state, assign=True)
    return network.eval()


def assert_close(ours: torch.Tensor, official: np.ndarray, absolute: float, share_of_std: float) -> None:
    error = np.abs(ours.numpy() - official).max()
    assert error <= max(absolute, share_of_std * official.std())


@torch.no_grad()
def test_the_tiny_model_equals_the_official_one(tiny, golden):
    record = np.load(golden / "tiny_forward.npz")
    images = bchw(record["image_BHWC"])
    features = tiny.tokenizer.encoder(images)
    assert_close(features.movedim(1, -1), record["encoder_features_BHWC"], 1e-5, 1e-4)
    tokens = tiny.tokenizer.encode(images)
    assert tokens.dtype == torch.int64
    np.testing.assert_array_equal(tokens, record["tokens_BHW"])
    quantized = tiny.tokenizer.quantizer.embed(tokens)
    assert_close(quantized.movedim(1, -1), record["quantized_BHWC"], 1e-5, 1e-4)
    assert_close(tiny.tokenizer.decode(tokens).movedim(1, -1), record["reconstruction_BHWC"], 1e-5, 1e-4)
    sequence = masked(record["sequence_BN"], tiny.vocabulary.mask)
    logits = tiny.transformer(sequence)
    assert_close(logits, record["logits_BNV"], 1e-5, 1e-4)

    positions = torch.tensor([[3, 0, 64], [1, 1, 2]])
    part = tiny.transformer(sequence, positions=positions, codes=64)
    torch.testing.assert_close(part, logits.gather(1, positions[..., None].expand(-1, -1, 75))[..., :64])


@pytest.mark.parametrize("size", [256, 512])
@torch.no_grad()
def test_the_full_size_models_equal_the_official_ones(size, golden, request):
    folder = golden if size == 256 else request.getfixturevalue("shared_golden")
    record = np.load(folder / f"imagenet{size}_seed1.npz")
    shapes = json.loads((golden / f"imagenet{size}_shapes.json").read_text())

    arrays = golden_arrays(shapes["tokenizer"], 1)
    config = convert.infer_tokenizer_config(arrays)
    assert config == TokenizerConfig()
    tokenizer = loaded(
        Tokenizer, config, convert.to_state_dict(arrays, official_table.tokenizer_table(config))
    )
    assert sum(p.numel() for p in tokenizer.parameters()) == pytest.approx(54.5e6, rel=2e-3)
    tokens = tokenizer.encode(bchw(record["image_BHWC"]))
    assert (tokens.numpy() == record["tokens_BHW"]).mean() >= 0.995
    pixels = tokenizer.decode(torch.from_numpy(record["decode_tokens_BHW"]).long())
    assert_close(pixels[:, :, ::8, ::8].movedim(1, -1), record["decoded_every_8th_pixel"], 0, 1e-3)
    np.testing.assert_allclose(pixels.mean((2, 3)), record["decoded_mean"], atol=1e-3)
    np.testing.assert_allclose(pixels.std((2, 3)), record["decoded_std"], atol=1e-3)

    arrays = golden_arrays(shapes["transformer"], 1)
    config = convert.infer_transformer_config(arrays)
    assert config == TransformerConfig(grid_size=size // 16)
    transformer = loaded(
        Transformer, config, convert.to_state_dict(arrays, official_table.transformer_table(config))
    )
    rows = torch.from_numpy(record["logits_rows"])[None]
    logits = transformer(masked(record["sequence_BN"], 2024), positions=rows)
    error = np.abs(logits.numpy() - record["logits_at_rows"]).max()
    assert error <= 1e-3 * float(record["logits_std"])


@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_the_tables_cover_the_released_checkpoints_both_ways(size, stage, golden):
    shapes = json.loads((golden / f"imagenet{size}_shapes.json").read_text())[stage]
    official = {path: tuple(shape) for path, shape in flaxio.leaves(shapes)}
    if stage == "tokenizer":
        config, network = TokenizerConfig(), Tokenizer
        table = official_table.tokenizer_table(config)
    else:
        config, network = TransformerConfig(grid_size=size // 16), Transformer
        table = official_table.transformer_table(config)
    assert {row.path: row.shape for row in table} == official
    assert len(table) == len(official)
    with torch.device("meta"):
        assert {row.name for row in table} == set(network(config).state_dict())


def test_a_state_dict_survives_the_way_to_flax_and_back(tiny, tmp_path, golden):
    tokenizer, transformer = convert.save_official(tiny, tmp_path / "flax")
    # The records were written by Flax itself, so this is its format to the byte.
    assert tokenizer.read_bytes() == (golden / "tiny_tokenizer.msgpack").read_bytes()
    assert transformer.read_bytes() == (golden / "tiny_transformer.msgpack").read_bytes()
    again = convert.load_official(*convert.find_official(tmp_path / "flax"))
    for stage in ("tokenizer", "transformer"):
        ours, theirs = getattr(tiny, stage).state_dict(), getattr(again, stage).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("norm", ["GN", "LN", "BN"])
@pytest.mark.parametrize("conv_downsample", [False, True])
def test_every_form_of_the_tokenizer_goes_both_ways(norm, conv_downsample):
    config = TokenizerConfig(
        filters=32,
        num_res_blocks=2,
        channel_multipliers=(1, 2, 2, 1),
        embedding_dim=8,
        codebook_size=16,
        conv_downsample=conv_downsample,
        activation="relu",
        norm=norm,
        quantizer="gumbel",
    )
    torch.manual_seed(0)
    network = Tokenizer(config).eval()
    table = official_table.tokenizer_table(config)
    arrays = convert.from_state_dict(network.state_dict(), table)
    assert {path: array.shape for path, array in arrays.items()} == {row.path: row.shape for row in table}
    assert convert.infer_tokenizer_config(arrays, activation="relu", quantizer="gumbel") == config
    state = convert.to_state_dict(arrays, table)
    for name, tensor in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, state[name])
    images = torch.rand(2, 3, 32, 24)
    tokens = network.encode(images)
    assert tokens.shape == (2, 4, 3)
    assert network.decode(tokens).shape == images.shape


def test_parameters_that_do_not_fit_are_named(golden):
    arrays = convert.read_checkpoint(golden / "tiny_tokenizer.msgpack")
    table = official_table.tokenizer_table(convert.infer_tokenizer_config(arrays))
    lost = dict(arrays)
    del lost["params/decoder/Conv_0/bias"]
    with pytest.raises(CheckpointError, match="params/decoder/Conv_0/bias is missing"):
        convert.to_state_dict(lost, table)
    with pytest.raises(CheckpointError, match="params/extra/kernel is unknown"):
        convert.to_state_dict(arrays | {"params/extra/kernel": np.zeros(1, np.float32)}, table)
    wrong = arrays | {"params/encoder/Conv_1/bias": np.zeros(3, np.float32)}
    with pytest.raises(CheckpointError, match=r"Conv_1/bias has the shape \(3,\) instead of \(32,\)"):
        convert.to_state_dict(wrong, table)
    wrong = arrays | {"params/encoder/Conv_1/bias": np.full(32, np.nan, np.float32)}
    huge = arrays | {"params/encoder/Conv_1/bias": np.full(32, 1e300)}
    with pytest.raises(CheckpointError, match="too large for float32"):
        convert.to_state_dict(huge, table)
    with pytest.raises(CheckpointError, match="Conv_1/bias holds NaN"):
        convert.to_state_dict(wrong, table)


def test_checkpoints_of_the_wrong_kind_are_refused(golden, tmp_path):
    tokenizer, transformer = golden / "tiny_tokenizer.msgpack", golden / "tiny_transformer.msgpack"
    with pytest.raises(CheckpointError, match="transformer checkpoint, but a tokenizer checkpoint is needed"):
        convert.load_official(transformer, tokenizer)
    with pytest.raises(CheckpointError, match="tokenizer checkpoint, but a transformer checkpoint is needed"):
        convert.load_official(tokenizer, tokenizer)
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert.load_official(tmp_path / "none", transformer)
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="0 bytes"):
        convert.load_official(tmp_path / "empty", transformer)
    with pytest.raises(ConfigError, match="quantizer"):
        convert.load_official(tokenizer, transformer, quantizer="lfq")
    with pytest.raises(CheckpointError, match="one file named"):
        convert.find_official(tmp_path)


def test_a_damaged_checkpoint_never_loads_quietly(golden, tmp_path):
    whole = (golden / "tiny_transformer.msgpack").read_bytes()
    path = tmp_path / "damaged"
    for length in (1, 10, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(MaskGITError):
            convert.load_official(golden / "tiny_tokenizer.msgpack", path)
    # Bits of names and headers; a flip inside a weight's own bytes gives another number, which nobody can see.
    for place in (0, 1, 8, 20, 40):
        damaged = bytearray(whole)
        damaged[place] ^= 0x40
        path.write_bytes(damaged)
        with pytest.raises(MaskGITError):
            convert.load_official(golden / "tiny_tokenizer.msgpack", path)


def test_what_the_format_has_no_place_for_survives_too(tiny, tmp_path):
    config = replace(
        tiny.config,
        class_names=tuple(f"class {i}" for i in range(tiny.config.transformer.num_classes)),
        label_dropout=0.25,
        sampler=SamplerConfig(steps=5, temperature=0.7, guidance_scale=2.0),
        tokenizer=replace(tiny.config.tokenizer, activation="relu", quantizer="gumbel"),
        transformer=replace(tiny.config.transformer, dropout=0.3),
    )
    tokenizer = loaded(Tokenizer, config.tokenizer, tiny.tokenizer.state_dict())
    transformer = loaded(Transformer, config.transformer, tiny.transformer.state_dict())
    model = MaskGIT(config, tokenizer, transformer)
    convert.save_official(model, tmp_path)
    again = convert.load_official(*convert.find_official(tmp_path))
    assert again.config == config
    assert torch.equal(again.generate(3, seed=1).tokens, model.generate(3, seed=1).tokens)
    # What is asked for wins; without the file there is what the released checkpoints have.
    told = convert.load_official(*convert.find_official(tmp_path), activation="swish")
    assert told.config == replace(config, tokenizer=replace(config.tokenizer, activation="swish"))
    (tmp_path / "model.json").unlink()
    bare = convert.load_official(*convert.find_official(tmp_path)).config
    assert (bare.class_names, bare.label_dropout, bare.tokenizer.activation) == (None, 0.0, "swish")


def test_a_file_that_is_of_other_checkpoints_is_refused(tiny, tmp_path):
    convert.save_official(tiny, tmp_path)
    found = convert.find_official(tmp_path)
    file = tmp_path / "model.json"
    values = json.loads(file.read_text())
    other = values["transformer"] | {"num_layers": values["transformer"]["num_layers"] + 1}
    for changed, message in (
        (values | {"transformer": other}, "does not describe"),
        (values | {"format_version": 9}, "was not written by"),
        (values | {"label_dropout": 7}, "label_dropout"),
        ({}, "was not written by"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            convert.load_official(*found)
    file.write_text("no JSON")
    with pytest.raises(CheckpointError, match=r"model\.json is not JSON"):
        convert.load_official(*found)


@pytest.mark.parametrize(
    "more",
    [
        {"step": 1000},
        {"opt_state": {"0": {"mu": {"a": np.zeros(3, np.float32)}, "count": 5, "note": None}}, "step": 3},
        {"ema_params": {"a": msgpack.ExtType(2, msgpack.packb((1.0, 2.0)))}, "rng": [1, 2], "name": "a run"},
        {"other": {"a": msgpack.ExtType(77, b"")}},
    ],
)
def test_what_a_trainer_keeps_beside_the_model_is_left_out(more, golden, tmp_path, caplog):
    for name in ("tokenizer", "transformer"):
        tree = flaxio.decode((golden / f"tiny_{name}.msgpack").read_bytes())
        packed = msgpack.packb(tree | more, default=flaxio._write_extension)
        (tmp_path / f"{name}.msgpack").write_bytes(packed)
    with caplog.at_level(logging.WARNING):
        model = convert.load_official(tmp_path / "tokenizer.msgpack", tmp_path / "transformer.msgpack")
    assert len(caplog.messages) == 2
    assert all(repr(name) in message for name in more for message in caplog.messages)
    expected = convert.load_official(golden / "tiny_tokenizer.msgpack", golden / "tiny_transformer.msgpack")
    for stage in ("tokenizer", "transformer"):
        ours, theirs = getattr(model, stage).state_dict(), getattr(expected, stage).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # Surplus parameters inside the model's own collections stay errors.
    tree = flaxio.decode((golden / "tiny_transformer.msgpack").read_bytes())
    for place in ("params", "batch_stats"):
        tree[place] = tree.get(place, {}) | {"extra": np.zeros(1, np.float32)}
        (tmp_path / "transformer.msgpack").write_bytes(flaxio.encode(tree))
        with pytest.raises(CheckpointError, match=f"{place}/extra is unknown"):
            convert.load_official(tmp_path / "tokenizer.msgpack", tmp_path / "transformer.msgpack")
        del tree[place]["extra"]
