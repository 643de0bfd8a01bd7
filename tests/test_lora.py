"""Low-rank adapters: compared with `peft` on the same weights, merged, stored, and refused where they do not belong."""

import copy
import dataclasses

import peft
import pytest
import torch
from torch import nn

from maskgit.checkpoints.adapters import CONFIG, Adapter, AdapterConfig, load_adapter, save_adapter
from maskgit.checkpoints.weights import weights_fingerprint
from maskgit.errors import CheckpointError, ConfigError, OutputError
from maskgit.networks.config import TransformerConfig
from maskgit.networks.lora import CLASS_ROWS, LoraConfig, LoraLinear, Trained, adapter_state, add_lora, merged
from maskgit.networks.transformer import Transformer
from maskgit.networks.vocabulary import Vocabulary
from maskgit.pipeline import MaskGIT

LORA = LoraConfig(rank=3, alpha=6.0)
SHAPES = {
    "official": {},
    "pre_norm with groups": {"block": "pre_norm", "groups": 2, "predict_mask": True},
    "modern": {"block": "modern", "positions": "rotary", "registers": 2},
    "modern, adaLN": {"block": "modern", "conditioning": "adaln", "output_bias": "positions"},
}


def transformer_of(**options):
    torch.manual_seed(0)
    config = TransformerConfig(
        num_codes=16,
        num_classes=4,
        grid_size=2,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=24,
        dropout=0.0,
        **options,
    )
    made = Transformer(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def sequences(transformer, count=6):
    vocabulary = Vocabulary.of(transformer.config)
    labels = torch.arange(count) % vocabulary.num_classes
    tokens = torch.randint(0, 16, (count, 2, 2), generator=torch.Generator().manual_seed(1))
    mask = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(2)) < 0.6
    return vocabulary.sequence(labels, tokens, mask)


def drawn(transformer):
    """Give every pair values, so that it adds something."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith("lora_B") or "class" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    return transformer


def adapted_copy(transformer, config=LORA):
    made = copy.deepcopy(transformer)
    add_lora(made, config)
    return drawn(made)


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_peft(shape):
    plain = transformer_of(**SHAPES[shape])
    ours = adapted_copy(plain)
    linears = [name for name, m in ours.named_modules() if hasattr(m, "lora_A")]
    assert len(linears) == 2 * 4
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=0.0, target_modules=linears),
        copy.deepcopy(plain),
    )
    with torch.no_grad():
        for name in linears:
            layer, pair = theirs.get_submodule(name), ours.get_submodule(name)
            layer.lora_A["default"].weight.copy_(pair.lora_A)
            layer.lora_B["default"].weight.copy_(pair.lora_B)
        # Of the rows of classes peft knows nothing.
        if plain.config.owns_classes:
            theirs.class_embedding.weight.copy_(ours.class_embedding.weight)
        else:
            theirs.token_embedding.weight[16:20] = ours.token_embedding.class_rows
    sequence, codes = sequences(plain), plain.config.num_logits
    logits = ours(sequence, codes=codes)
    expected = theirs(sequence, codes=codes)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for made in (logits, expected):
        made.square().mean().backward()
    for name in linears:
        layer, pair = theirs.get_submodule(name), ours.get_submodule(name)
        torch.testing.assert_close(
            pair.lora_A.grad, layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            pair.lora_B.grad, layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-6
        )
        assert pair.weight.grad is None


@pytest.mark.parametrize("shape", SHAPES)
def test_merging_changes_no_logit(shape):
    # In float64, where only what differs in meaning would show; in float32 sums are rounded in another order.
    plain = transformer_of(**SHAPES[shape]).double()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    ours = adapted_copy(plain)
    whole = merged(plain, LORA, adapter_state(dict(Trained(ours).named_parameters())))
    sequence, codes = sequences(plain), plain.config.num_logits
    with torch.no_grad():
        made, expected, first = (network(sequence, codes=codes) for network in (whole, ours, plain))
        assert float((made - expected).abs().max()) < 1e-9
        assert float((made - first).abs().max()) > 0.1
        rounded = whole.float()(sequence, codes=codes)
    assert float((rounded - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())


def test_a_fresh_adapter_changes_nothing_and_trains_little():
    plain = transformer_of()
    ours = copy.deepcopy(plain)
    add_lora(ours, LORA, seed=5)
    assert torch.equal(ours(sequences(plain)), plain(sequences(plain)))
    names = set(dict(Trained(ours).named_parameters()))
    assert {name.rpartition("/")[2] for name in names} == {"lora_A", "lora_B", "class_rows"}
    other = copy.deepcopy(plain)
    add_lora(other, LORA, seed=5)
    assert torch.equal(other.layers[0].mlp.up.lora_A, ours.layers[0].mlp.up.lora_A)


def test_targets_are_patterns_and_those_that_match_nothing_are_told():
    ours = transformer_of()
    add_lora(ours, dataclasses.replace(LORA, targets=("layers.1.*.up",)))
    assert [n for n, m in ours.named_modules() if hasattr(m, "lora_A")] == ["layers.1.mlp.up"]
    with pytest.raises(ConfigError, match=r"No linear layer matches .*layers\.\*\.attention\.qkv"):
        add_lora(transformer_of(), dataclasses.replace(LORA, targets=("q_proj",)))


def adapter_of(model, *, num_classes=None, names=None, scale=0.05):
    """An adapter of a model with drawn values, perhaps for other classes."""
    config, generator = model.config.transformer, torch.Generator().manual_seed(7)
    ours = copy.deepcopy(model.transformer)
    add_lora(ours, LORA)
    state = adapter_state(dict(Trained(ours).named_parameters()))
    state = {
        name: value + scale * torch.randn(value.shape, generator=generator) for name, value in state.items()
    }
    num_classes = num_classes or config.num_classes
    state[CLASS_ROWS] = torch.randn(
        num_classes + config.owns_classes, config.hidden_size, generator=generator
    )
    fingerprint = weights_fingerprint(model.transformer)
    about = AdapterConfig("tiny", fingerprint, LORA, num_classes, names, 0.1, model.config.sampler)
    return Adapter(about, state)


def test_an_adapter_is_read_as_it_was_written_and_gives_a_model_of_its_classes(tiny, tiny_folder, tmp_path):
    adapter = adapter_of(tiny, num_classes=2, names=("cat", "dog"))
    folder = save_adapter(adapter, tmp_path / "adapter")
    read = load_adapter(folder)
    assert read.config == adapter.config
    assert all(torch.equal(read.state[name], value) for name, value in adapter.state.items())
    model = MaskGIT.from_pretrained(tiny_folder, adapter=folder)
    assert model.class_names == ("cat", "dog")
    assert model.config.label_dropout == 0.1
    made = model.generate("dog", steps=3, guidance_scale=2.0)
    # Merged, it is a model like any other.
    again = MaskGIT.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert torch.equal(again.generate("dog", steps=3, guidance_scale=2.0).tokens, made.tokens)
    assert (
        MaskGIT.from_pretrained(tiny_folder, adapter=folder, dtype="bfloat16").transformer.head.bias.dtype
        == torch.bfloat16
    )


def test_at_scale_0_the_model_makes_the_same_tokens(tiny, tiny_folder, tmp_path):
    folder = save_adapter(adapter_of(tiny, scale=0.5), tmp_path / "adapter")
    options = {"num_images": 4, "steps": 4, "seed": 3}
    expected = tiny.generate(1, **options).tokens
    off = MaskGIT.from_pretrained(tiny_folder, adapter=folder, adapter_scale=0)
    assert torch.equal(off.generate(1, **options).tokens, expected)
    on = MaskGIT.from_pretrained(tiny_folder, adapter=folder)
    assert not torch.equal(on.generate(1, **options).tokens, expected)


def test_an_adapter_of_another_model_or_none_is_refused_in_a_sentence(tiny, tiny_folder, tmp_path):
    folder = save_adapter(adapter_of(tiny), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="trained on another model, which was called tiny"):
        MaskGIT.from_pretrained("cifar10", adapter=folder)
    with pytest.raises(CheckpointError, match="is a model, not an adapter"):
        MaskGIT.from_pretrained(tiny_folder, adapter=tiny_folder)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        MaskGIT.from_pretrained(tiny_folder, adapter=tmp_path / "nowhere" / "at all")
    with pytest.raises(ConfigError, match="adapter_scale must be between 0 and 100"):
        MaskGIT.from_pretrained(tiny_folder, adapter=folder, adapter_scale=-1)
    text = (folder / CONFIG).read_text().replace('"rank": 3', '"rank": 4')
    (folder / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match="does not match its config"):
        MaskGIT.from_pretrained(tiny_folder, adapter=folder)


def test_a_folder_of_something_else_is_not_replaced_by_an_adapter(tiny, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"holds photo\.jpg"):
        save_adapter(adapter_of(tiny), tmp_path)
    broken = adapter_of(tiny)
    broken.state[CLASS_ROWS][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="class_rows holds NaN"):
        save_adapter(broken, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_dropout_is_of_the_pairs_inputs():
    pair = LoraLinear(nn.Linear(4, 4), LoraConfig(rank=2, dropout=0.5))
    with torch.no_grad():
        pair.lora_B.fill_(1.0)
    x = torch.ones(64, 4)
    assert torch.equal(pair.eval()(x), pair(x))
    pair.train()
    assert len(pair(x).unique(dim=0)) > 4
