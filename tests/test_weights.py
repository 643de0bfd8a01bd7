"""Weights that travel: broken ones are refused by name, and wrapped networks go by their own names."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from maskgit import MaskGIT, convert, hub
from maskgit.checkpoints import weights
from maskgit.engine import host
from maskgit.errors import CheckpointError, ConfigError

PARTS = ("tokenizer", "transformer")
NAMES = {"tokenizer": "decoder.conv_in.weight", "transformer": "layers.1.mlp.up.bias"}


@pytest.fixture
def model(tiny, tmp_path):
    return MaskGIT.from_pretrained(tiny.save_pretrained(tmp_path / "model"))


def states(model):
    return [dict(getattr(model, part).state_dict()) for part in PARTS]


def assert_equal(first, second):
    for ours, theirs in zip(states(first), states(second), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("value", "told"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")]
)
def test_a_broken_weight_is_refused_by_name(part, value, told, model, tmp_path):
    file = tmp_path / "model" / part / "model.safetensors"
    state = load_file(file)
    state[NAMES[part]].view(-1)[3] = value
    save_file(state, file)
    with pytest.raises(CheckpointError, match=f"{part}.*: {NAMES[part]} holds {told}"):
        hub.load_model(tmp_path / "model")
    getattr(model, part).state_dict()[NAMES[part]].view(-1)[3] = value
    with pytest.raises(CheckpointError, match=f"{part} is not saved: {NAMES[part]} holds {told}"):
        model.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=f"{NAMES[part]} holds {told}"):
        convert.save_official(model, tmp_path / "flax")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_tokenizer_alone_is_looked_at_too(model, tmp_path):
    folder = hub.save_tokenizer(model.tokenizer, tmp_path / "tokenizer")
    state = load_file(folder / "model.safetensors")
    state["quantizer.codebook"][5, 1] = math.nan
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"quantizer\.codebook holds NaN"):
        hub.load_tokenizer(folder)
    model.tokenizer.load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"quantizer\.codebook holds NaN"):
        hub.save_tokenizer(model.tokenizer, folder)


def test_what_is_too_large_for_a_type_is_refused_in_it_alone(model, tmp_path):
    model.transformer.state_dict()["head.bias"][0] = 1e30
    with pytest.raises(CheckpointError, match=r"head\.bias holds infinity.*too large"):
        model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    folder = model.save_pretrained(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"head\.bias holds infinity.*float16"):
        hub.load_model(folder, dtype=torch.float16)
    assert_equal(model, hub.load_model(folder))


def test_numbers_whose_sum_overflows_are_no_reason():
    large = torch.full((1000,), 3e38)
    weights.check_finite({"a": large, "b": -large, "c": torch.arange(3)}, "here", "")
    with pytest.raises(CheckpointError, match="here: d holds NaN"):
        weights.check_finite({"a": large, "d": torch.tensor([0.0, math.nan])}, "here", "")


class Doubled(nn.Module):
    """Another wrapper, of which nothing is known here."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config


def compiled(model):
    model.tokenizer, model.transformer = map(torch.compile, (model.tokenizer, model.transformer))


def compiled_parts(model):
    model.tokenizer.decoder = torch.compile(model.tokenizer.decoder)
    model.transformer.layers[1] = torch.compile(model.transformer.layers[1])


def data_parallel(model):
    model.tokenizer = nn.DataParallel(model.tokenizer)
    model.transformer = nn.DataParallel(torch.compile(model.transformer))


def data_parallel_parts(model):
    model.tokenizer.encoder = nn.DataParallel(model.tokenizer.encoder)
    model.transformer.layers[0] = nn.DataParallel(model.transformer.layers[0])


WRAPS = [compiled, compiled_parts, data_parallel, data_parallel_parts]


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_wrapped_network_is_saved_and_converted_as_itself(wrap, model, tiny, tmp_path):
    wrap(model)
    assert_equal(tiny, hub.load_model(model.save_pretrained(tmp_path / "saved")))
    hub.save_tokenizer(nn.DataParallel(model.tokenizer), tmp_path / "tokenizer")
    again = hub.load_tokenizer(tmp_path / "tokenizer").state_dict()
    assert all(torch.equal(again[name], value) for name, value in tiny.tokenizer.state_dict().items())
    convert.save_official(model, tmp_path / "flax")
    assert_equal(tiny, convert.load_official(*convert.find_official(tmp_path / "flax")))


@pytest.fixture
def unmeasured(monkeypatch):
    """Spare the measuring of this CPU."""
    monkeypatch.setattr(host, "measured", lambda **_: dict.fromkeys(host.names(), 1.0))


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("wrap", [data_parallel, data_parallel_parts])
def test_a_wrapped_network_generates_the_same(wrap, model, tiny):
    wrap(model)
    expected = tiny.generate([3, 4], seed=5, steps=3)
    assert torch.equal(model.generate([3, 4], seed=5, steps=3).images, expected.images)
    assert torch.equal(model.optimize("exact").generate([3, 4], seed=5, steps=3).tokens, expected.tokens)
    MaskGIT(model.config, nn.DataParallel(model.tokenizer), nn.DataParallel(model.transformer)).generate(
        1, steps=1
    )


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("wrap", [compiled, compiled_parts])
def test_what_is_compiled_generates_the_same(wrap, model, tiny, monkeypatch):
    # Without the compiler, which takes long and is not everywhere.
    monkeypatch.setattr(
        torch, "compile", lambda module: torch._dynamo.OptimizedModule(module, lambda call: call)
    )
    wrap(model)
    assert any("_orig_mod" in name for name, _ in model.tokenizer.named_modules())
    expected = tiny.generate([3, 4], seed=5, steps=3)
    assert torch.equal(model.generate([3, 4], seed=5, steps=3).images, expected.images)
    assert torch.equal(model.optimize("exact").generate([3, 4], seed=5, steps=3).tokens, expected.tokens)


def test_a_network_under_ddp_is_saved_as_itself(model, tiny, tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model.transformer)
        model.transformer = wrapped
        assert_equal(tiny, hub.load_model(model.save_pretrained(tmp_path / "saved")))
        model.tokenizer.decoder = nn.parallel.DistributedDataParallel(model.tokenizer.decoder)
        assert_equal(tiny, hub.load_model(model.save_pretrained(tmp_path / "saved")))
    finally:
        torch.distributed.destroy_process_group()


def test_a_network_that_could_not_be_read_back_is_not_saved(model, tmp_path):
    model.transformer.layers[0].extra = nn.Linear(2, 2)
    with pytest.raises(
        ConfigError, match=r"transformer no longer matches.*layers\.0\.extra\.bias is unknown"
    ):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"layers\.0\.extra\.bias is unknown"):
        convert.save_official(model, tmp_path / "flax")
    model.transformer.layers[0].__delattr__("extra")
    model.transformer = Doubled(model.transformer)
    with pytest.raises(ConfigError, match="is missing"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 218000000\n"


def test_a_pointer_is_named_for_what_it_is(model, tmp_path, golden):
    from maskgit.evaluation.networks.weights import read_state_dict

    file = tmp_path / "model" / "tokenizer" / "model.safetensors"
    file.write_bytes(POINTER)
    for read in (hub.load_model, hub.load_tokenizer):
        with pytest.raises(
            CheckpointError, match=r"Git LFS pointer, not the weights themselves.*git lfs pull"
        ):
            read(tmp_path / "model")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        convert.load_official(file, golden / "tiny_transformer.msgpack")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        read_state_dict(file)


def shard(folder, name, parts=3):
    """Cut weights as others' libraries do, and return the index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    index = {"metadata": {"total_size": 1}, "weight_map": {}}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        save_file({key: state[key] for key in names[i::parts]}, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(names[i::parts], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_weights_in_shards_are_read(model, tiny, tmp_path):
    for part in PARTS:
        index = shard(tmp_path / "model" / part, part)
    assert_equal(tiny, hub.load_model(tmp_path / "model"))
    assert_equal(tiny, hub.load_model(hub.load_model(tmp_path / "model").save_pretrained(tmp_path / "model")))

    index = shard(tmp_path / "model" / "transformer", "transformer")
    file = tmp_path / "model" / "transformer" / "model.safetensors.index.json"
    for bad in ("../tokenizer/model.safetensors", "/etc/passwd", "model.bin", 3, [1]):
        file.write_text(json.dumps(index | {"weight_map": {"head.bias": bad}}))
        with pytest.raises(CheckpointError, match="weight_map"):
            hub.load_model(tmp_path / "model")
    for bad in ({}, {"weight_map": {}}, {"weight_map": [1]}):
        file.write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match="weight_map"):
            hub.load_model(tmp_path / "model")
    file.write_text(json.dumps(index))
    (tmp_path / "model" / "transformer" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors cannot be read"):
        hub.load_model(tmp_path / "model")
    index["weight_map"] = {key: v for key, v in index["weight_map"].items() if "00002" not in v}
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"does not match its config: .* is missing"):
        hub.load_model(tmp_path / "model")
