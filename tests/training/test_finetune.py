"""Fine-tuning: runs that train adapters, and the command from a folder of photos to a sheet."""

import dataclasses
import errno
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from maskgit import MaskGIT, hub
from maskgit.apps.cli import main
from maskgit.checkpoints import weights
from maskgit.config import ModelConfig, SamplerConfig
from maskgit.errors import ConfigError
from maskgit.networks.config import TokenizerConfig, TransformerConfig
from maskgit.networks.lora import LoraConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer
from maskgit.training.finetune import Finetuning, finetune
from maskgit.training.saving import save_model
from maskgit.training.train_transformer import train_transformer
from maskgit.training.transformer_config import TransformerTrainingConfig
from runs import checkpointed

SIZE, CLASSES = 16, ("day", "night")


def model_of(**shape):
    torch.manual_seed(0)
    tokenizer = TokenizerConfig(
        filters=32, num_res_blocks=1, channel_multipliers=(1, 1, 1), embedding_dim=4, codebook_size=16
    )
    transformer = TransformerConfig(
        num_codes=16,
        num_classes=3,
        grid_size=4,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=32,
        **shape,
    )
    config = ModelConfig(tokenizer, transformer, SIZE, ("a", "b", "c"), sampler=SamplerConfig(steps=2))
    made = MaskGIT(config, Tokenizer(tokenizer).eval(), Transformer(transformer).eval())
    with torch.no_grad():
        # Where a modern model begins, its layers do nothing.
        for parameter in made.transformer.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return model_of().save_pretrained(tmp_path_factory.mktemp("models") / "base")


def write_photos(folder: Path, per_class: int, classes=CLASSES) -> Path:
    generator = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = generator.integers(0, 128, (24, 20, 3)) + 120 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "all", 24)


def flags(photos, model, out, *more):
    return ["finetune", str(photos), "--from", str(model), "--out", str(out), "--device", "cpu", *more]


@pytest.fixture(scope="module")
def tuned(photos, model, tmp_path_factory) -> tuple[Path, str]:
    """A run that trained an adapter by the command, and what was printed."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("runs") / "lora"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(flags(photos, model, out, "--steps", "4", "--batch-size", "8", "--rank", "2")) == 0
    return out, said.getvalue()


def test_one_command_goes_from_photos_to_an_adapter_and_a_sheet(tuned, model, tmp_path):
    out, said = tuned
    for words in ("memory ", "time ", "of them trained", "44 images, 2 classes", f"--adapter {out}"):
        assert words in said
    assert (out / "sheet.png").is_file()
    assert {path.name for path in (out / "adapter").iterdir()} == {
        "README.md", "adapter.safetensors", "adapter_config.json",
    }  # fmt: skip
    pipe = MaskGIT.from_pretrained(model, adapter=out)
    assert pipe.class_names == CLASSES
    # The same command taught it to be guided.
    assert pipe.config.label_dropout == 0.1
    made = ["--model", str(model), "--adapter", str(out), "--class", "night", "--guidance-scale", "2"]
    assert main(["generate", *made, "--out", str(tmp_path / "out")]) == 0


def test_a_finished_command_goes_on_from_its_end(tuned, photos, model, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(tuned[0], out)
    before = load_file(out / "adapter" / "adapter.safetensors")
    said: list[str] = []
    asked = Finetuning(str(photos), str(model), str(out), steps=4, batch_size=8, rank=2, device="cpu")
    finetune(asked, said.append)
    assert any("were packed before" in line for line in said)
    after = load_file(out / "adapter" / "adapter.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def run_config(tuned, model, out, **changes) -> TransformerTrainingConfig:
    shape = hub.load_model(model).config.transformer
    return TransformerTrainingConfig(
        out=str(out),
        data=str(tuned[0] / "data" / "tokens" / "train"),
        test_data=str(tuned[0] / "data" / "tokens" / "test"),
        init_from=str(model),
        model=dataclasses.replace(shape, num_classes=2),
        **{
            "lora": LoraConfig(rank=2),
            "steps": 6,
            "batch_size": 8,
            "warmup_steps": 2,
            "learning_rate": 1e-2,
            "device": "cpu",
            "precision": "float32",
            "num_workers": 0,
            "sample_every": 100,
            "num_samples": 2,
            "checkpoint_every": 3,
            "evaluate_every": 3,
            "tracker": "none",
            "sampler": SamplerConfig(steps=2),
        }
        | changes,
    )


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"block": "modern", "conditioning": "adaln"},
        {"block": "pre_norm", "groups": 2, "predict_mask": True},
    ],
    ids=["official", "modern", "groups"],
)
def test_a_run_trains_the_adapter_alone(tuned, shape, tmp_path):
    base = model_of(**shape).save_pretrained(tmp_path / "base")
    # The tokenizer is drawn from the same seed, so that the tokens are its own.
    config = run_config(tuned, base, tmp_path / "run")
    adapter = train_transformer(config)
    state = load_file(adapter / "adapter.safetensors")
    trained = [value for name, value in state.items() if name.endswith("lora_B")]
    assert trained
    assert all(bool(value.any()) for value in trained)
    kept = [name for name in checkpointed(tmp_path / "run") if name.startswith("ema")]
    assert all("lora" in name or "class" in name for name in kept)
    plain, pipe = MaskGIT.from_pretrained(base), MaskGIT.from_pretrained(base, adapter=adapter)
    changed = {
        name
        for name, value in plain.transformer.state_dict().items()
        if not torch.equal(value, pipe.transformer.state_dict().get(name, value))
    }
    assert changed <= {*(n for n in plain.transformer.state_dict() if ".attention." in n or ".mlp." in n)} | {
        "token_embedding.weight", "class_embedding.weight", "head.bias",
    }  # fmt: skip
    # From the checkpoint the same adapter is made.
    save_model(tmp_path / "run", tmp_path / "saved")
    again = load_file(tmp_path / "saved" / "adapter.safetensors")
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(tuned, model, tmp_path):
    whole = train_transformer(run_config(tuned, model, tmp_path / "whole"))
    part = run_config(tuned, model, tmp_path / "part")
    train_transformer(dataclasses.replace(part, steps=3))
    parted = train_transformer(part)
    expected = load_file(whole / "adapter.safetensors")
    assert all(
        torch.equal(value, expected[name])
        for name, value in load_file(parted / "adapter.safetensors").items()
    )


def test_lora_needs_a_model(tuned, model, tmp_path):
    config = run_config(tuned, model, tmp_path / "run")
    with pytest.raises(ConfigError, match="lora adapts a trained model"):
        dataclasses.replace(config, init_from=None, tokenizer=str(model))


def test_the_whole_transformer_and_the_decoder_alone(photos, model, tmp_path, capsys):
    more = ["--steps", "2", "--batch-size", "8"]
    assert main(flags(photos, model, tmp_path / "full", "--method", "full", *more)) == 0
    assert MaskGIT.from_pretrained(tmp_path / "full").class_names == CLASSES
    assert main(flags(photos, model, tmp_path / "decoder", "--method", "decoder", *more)) == 0
    assert "memory" in capsys.readouterr().out
    before, after = (MaskGIT.from_pretrained(path) for path in (model, tmp_path / "decoder" / "model"))
    pixels = torch.rand(4, 3, SIZE, SIZE)
    tokens = before.encode_pixels(pixels)
    assert torch.equal(after.encode_pixels(pixels), tokens)
    assert not torch.equal(after.decode_tokens(tokens), before.decode_tokens(tokens))
    assert after.config == before.config
    with Image.open(tmp_path / "decoder" / "sheet.png") as sheet:
        assert sheet.width > 3 * 128


def refused(capsys, *arguments) -> str:
    assert main(flags(*arguments, "--steps", "2", "--batch-size", "4")) == 2
    said = capsys.readouterr().err.strip().splitlines()
    return said[-1]


def test_what_cannot_be_done_is_told_in_a_sentence(photos, model, tuned, tmp_path, capsys, monkeypatch):
    one = write_photos(tmp_path / "one", 1, ("only",))
    assert "learned by heart: give at least 8" in refused(capsys, one, model, tmp_path / "r1")
    assert "There is no" in refused(capsys, photos, "no/such-model", tmp_path / "r2")
    assert "nowhere" in refused(capsys, tmp_path / "nowhere", model, tmp_path / "r3")
    (tmp_path / "r4").mkdir()
    (tmp_path / "r4" / "mine.txt").write_text("mine")
    assert "is not empty and holds no run" in refused(capsys, photos, model, tmp_path / "r4")
    # A model of another tokenizer does not know the tokens of this run.
    torch.manual_seed(1)
    other = model_of()
    with torch.no_grad():
        next(other.tokenizer.quantizer.parameters()).add_(1.0)
    path = other.save_pretrained(tmp_path / "other")
    shutil.copytree(tuned[0], tmp_path / "r5")
    assert "tokenizer" in refused(capsys, photos, path, tmp_path / "r5")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "write", full)
    assert "is full" in refused(capsys, photos, model, tmp_path / "r6")


def test_one_class_is_enough(model, tmp_path):
    one = write_photos(tmp_path / "photos", 10, ("only",))
    said: list[str] = []
    asked = Finetuning(str(one), str(model), str(tmp_path / "run"), steps=2, batch_size=4, device="cpu")
    adapter = finetune(asked, said.append)
    assert any("only one class" in line for line in said)
    assert any("too few to keep some back" in line for line in said)
    assert MaskGIT.from_pretrained(model, adapter=adapter).class_names == ("only",)


def commands_of_the_page(model: Path) -> tuple[list[list[str]], str]:
    """Return the commands of docs/finetuning.md and its program, with a small model in place of the bundled one."""
    page = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text("utf-8")
    page = page.replace("cifar10", str(model))
    blocks = re.findall(r"```(sh|python)\n(.*?)```", page, re.DOTALL)
    lines = "".join(text for kind, text in blocks if kind == "sh").replace("\\\n", " ").splitlines()
    (program,) = (text for kind, text in blocks if kind == "python")
    return [shlex.split(line)[1:] for line in lines if line.startswith("maskgit ")], program


def test_the_page_leads_from_photographs_to_sheets(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", 6, ("cat", "dog"))
    commands, program = commands_of_the_page(model)
    assert [command[0] for command in commands].count("finetune") == 4
    for command in commands:
        words = [w for path in command for w in (map(str, tmp_path.glob(path)) if "*" in path else [path])]
        if "--steps" in words:
            at = words.index("--steps")
            del words[at : at + 2]
        smaller = {"finetune": ["--steps", "2", "--batch-size", "2"], "generate": ["--steps", "2"]}
        more = [*smaller.get(words[0], []), *(["--overwrite"] if words[0] == "generate" else [])]
        assert main([*words, *more]) == 0, words
    exec(compile(program, "docs/finetuning.md", "exec"), {})
    for made in (
        "runs/mine/sheet.png",
        "runs/decoder/sheet.png",
        "out/sheet.png",
        "guided/sheet.png",
        "cat.png",
    ):
        assert Path(made).is_file(), made
