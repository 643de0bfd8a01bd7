"""Networks and decodings of Halton-MaskGIT, LlamaGen, MaskBit and Google's tokenizer in torch form, against their own code.

The records in tests/golden/peers were computed by the authors' code with weights made by the rule below, of which every
fourth position's logits are kept. Full-size networks are compared where ../shared/golden/peers is.
"""

import ast
import dataclasses
import hashlib
import http.server
import io
import json
import math
import os
import threading
import tomllib
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from maskgit import MaskGIT, convert, hub
from maskgit.apps.cli import main
from maskgit.checkpoints import halton, maskbit
from maskgit.checkpoints.published import PUBLISHED
from maskgit.checkpoints.torch_files import read_torch_file
from maskgit.errors import CheckpointError, ConfigError, DownloadError
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer
from maskgit.networks.vocabulary import Vocabulary
from maskgit.sampler import decode
from maskgit.sampler.config import SamplerConfig, StepTables
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.transformer_config import TransformerTrainingConfig
from peer_models import BUFFERS, GOLDEN, SHAPES, weights

SHARED = Path(__file__).parents[2] / "shared" / "golden" / "peers"


@pytest.fixture(scope="module")
def records() -> dict[str, dict[str, torch.Tensor]]:
    read = {}
    for name in ("halton", "maskbit", "maskgit_vqgan"):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            read[name] = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return read


def built(kind, made):
    config, state = made
    network = kind(config)
    network.load_state_dict(state, strict=True)
    return network.eval()


def assert_close(found: torch.Tensor, expected: torch.Tensor, share: float = 1e-4) -> None:
    assert float((found - expected).abs().max()) < share * float(expected.std())


def sequence_of(config, codes: torch.Tensor, labels: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
    """Return our sequence of codes (B, …) in which `unit_codes` stands for the mask."""
    vocabulary = Vocabulary.of(config)
    classes = torch.where(drop, vocabulary.mask, labels + vocabulary.num_codes)
    codes = codes.flatten(1)
    return torch.cat(
        [classes[:, None], torch.where(codes == vocabulary.num_codes, vocabulary.mask, codes)], 1
    )


@pytest.mark.parametrize(("name", "heads"), [("plain", 4), ("registers", 4), ("uneven", 6)])
def test_halton_transformers_compute_their_logits(records, name, heads):
    record = records["halton"]
    state = weights(SHAPES["halton"][f"tiny_{name}"])
    network = built(Transformer, halton.transformer_of_halton(state, num_heads=heads))
    sequence = sequence_of(network.config, record[f"{name}_codes"], record["labels"], record["drop"])
    with torch.no_grad():
        assert_close(network(sequence)[:, 1::4], record[f"{name}_logits"])


@pytest.mark.parametrize("name", ["lfq_bert_2", "lfq_bert_1_prenorm", "bert_1", "bert_2"])
def test_maskbit_generators_compute_their_logits(records, name):
    record = records["maskbit"]
    network = built(
        Transformer, maskbit.transformer_of_maskbit(weights(SHAPES["maskbit"][f"tiny_{name}"]), num_heads=4)
    )
    sequence = sequence_of(network.config, record[f"{name}_in"], record["labels"], record["drop"])
    expected = record[f"{name}_logits"]
    with torch.no_grad():
        found = network(sequence)[:, 1:].unflatten(1, (-1, network.config.groups))[:, ::4]
        places = torch.tensor([[0, 3, 1, 17]]).expand(3, -1)
        some = network(sequence, positions=places)
        assert torch.allclose(
            some[:, 1:],
            network(sequence).gather(1, places[..., None].expand(*places.shape, some.shape[-1]))[:, 1:],
            atol=1e-5,
        )
    assert_close(found, expected)


def test_llamagens_tokenizer(records):
    record = records["halton"]
    network = built(Tokenizer, halton.tokenizer_of_llamagen(weights(SHAPES["halton"]["tiny_vq"])))
    images = (record["vq_image"] + 1) / 2
    with torch.no_grad():
        assert_close(network.encoder(images), record["vq_before"])
    assert torch.equal(network.encode(images), record["vq_tokens"])
    assert_close(2 * network.decode(record["vq_tokens"]) - 1, record["vq_pixels"])


@pytest.mark.parametrize(
    ("project", "shapes", "prefix"),
    [
        ("maskbit", "tiny_lfq", "lfq_"),
        ("maskbit", "tiny_vqgan_plus", "vqgan_plus_"),
        ("maskbit", "tiny_legacy", "legacy_"),
        ("maskgit_vqgan", "tiny", ""),
    ],
)
def test_tokenizers_of_torch_projects(records, project, shapes, prefix):
    record = records[project]
    network = built(Tokenizer, maskbit.tokenizer_of_torch(weights(SHAPES[project][shapes])))
    tokens = record[f"{prefix}tokens"].unflatten(1, (8, 8))
    with torch.no_grad():
        assert_close(network.encoder(record["image"]), record[f"{prefix}before"])
    assert torch.equal(network.encode(record["image"]), tokens)
    assert_close(network.decode(tokens), record[f"{prefix}pixels"])


class RecordedNoise:
    """The noise of the records: drawn in call order, tokens first, then the choice."""

    def __init__(self, batch: int, tokens: int, codes: int, groups: int) -> None:
        self.generator = np.random.Generator(np.random.Philox(key=[11, 0]))
        self.shape, self.codes, self.groups = (batch, tokens // groups), codes, groups

    def _gumbel(self, *shape: int) -> torch.Tensor:
        uniform = np.clip(self.generator.random((*self.shape, *shape)), 1e-7, 1 - 1e-7)
        drawn = torch.from_numpy(-np.log(-np.log(uniform)).astype(np.float32))
        return torch.nn.functional.pad(drawn.flatten(1, 2), (0,) * (2 * (len(shape) - 1)) + (1, 0))

    def tokens(self, step) -> torch.Tensor:
        return self._gumbel(self.groups, self.codes)

    def choice(self, step) -> torch.Tensor:
        return self._gumbel(self.groups)

    def uniform(self, step, stream):
        raise AssertionError("the policy draws nothing else")


DECODINGS = {
    "decode_lfq_2": (
        "lfq_bert_2",
        # The settings that the published model brings, in fewer steps.
        dataclasses.replace(PUBLISHED["maskbit-14"].sampler, steps=8),
    ),
    "decode_bert_1": (
        "bert_1",
        SamplerConfig(
            steps=6,
            mask_schedule="arccos",
            choice_temperature=4.5,
            policy_options={"tempered": True},
            guidance_scale=4.0,
            guidance_schedule="linear@before",
            tables=StepTables(
                temperature=tuple(0.5 + 0.8 * (1 - (i + 1) / 6) for i in range(6)),
            ),
        ),
    ),
    "decode_lfq_2_plain": (
        "lfq_bert_2",
        SamplerConfig(steps=5, mask_schedule="arccos", choice_temperature=2.0),
    ),
}


@pytest.mark.parametrize("name", DECODINGS)
def test_maskbit_decodings_token_for_token(records, name):
    generator, settings = DECODINGS[name]
    network = built(
        Transformer,
        maskbit.transformer_of_maskbit(weights(SHAPES["maskbit"][f"tiny_{generator}"]), num_heads=4),
    )
    config = network.config
    vocabulary = Vocabulary.of(config)
    sequence = vocabulary.sequence(torch.tensor([1, 7, 4]))
    history = decode(
        lambda sequence: network(sequence, codes=config.num_logits),
        sequence,
        settings,
        mask_token=vocabulary.mask,
        noise=RecordedNoise(3, vocabulary.num_tokens, config.unit_codes, config.groups),
    )
    expected = records["maskbit"][f"{name}_sampled"]
    assert torch.equal(history[:, :, 1:].transpose(0, 1), expected.flatten(2))


@pytest.mark.parametrize(
    ("name", "settings", "lowered"),
    [
        (
            "halton_cfg",
            SamplerConfig(
                steps=8,
                policy="halton",
                policy_options={"roll": False},
                mask_schedule="arccos",
                guidance_scale=3.0,
                tables=StepTables(temperature=tuple(1 / (1 + 0.2 * i / 7) for i in range(8))),
            ),
            0,
        ),
        (
            "halton_plain",
            SamplerConfig(steps=6, policy="halton", policy_options={"roll": False}, mask_schedule="arccos"),
            40,
        ),
        (
            "confidence_cfg",
            SamplerConfig(
                steps=8,
                policy="redraw",
                tables=StepTables(
                    mask_ratio=tuple(1 - known / 64 for known in (1, 5, 11, 18, 24, 32, 41, 64)),
                    guidance_scale=tuple(1 + 3 * i / 7 for i in range(8)),
                    choice_temperature=tuple(4.5 * (1 - i / 7) for i in range(8)),
                ),
            ),
            40,
        ),
    ],
)
def test_halton_decodings_token_for_token(records, name, settings, lowered):
    record = records["halton"]
    state = weights(SHAPES["halton"]["tiny_plain"])
    state["head.bias"][128] -= lowered
    network = built(Transformer, halton.transformer_of_halton(state, num_heads=4))
    vocabulary = Vocabulary.of(network.config)
    history = decode(
        lambda sequence: network(sequence, codes=vocabulary.num_logits),
        vocabulary.sequence(record["decode_labels"]),
        settings,
        mask_token=vocabulary.mask,
        noise=RecordedNoise(3, vocabulary.num_tokens, vocabulary.num_logits, 1),
    )
    sampled, written = record[f"{name}_sampled"], record[f"{name}_masks"].bool()
    if settings.policy == "redraw":
        written[:] = True  # It draws every token at each step; the masks say what stays.
    ours = history[:, :, 1:].transpose(0, 1).unflatten(2, (8, 8))
    assert torch.equal(ours[written], sampled[written])
    tokenizer = built(Tokenizer, halton.tokenizer_of_llamagen(weights(SHAPES["halton"]["tiny_vq"])))
    pixels = 2 * tokenizer.decode(vocabulary.grid(history[:, -1])).clamp(0, 1) - 1
    assert_close(pixels, record[f"{name}_pixels"])


@pytest.mark.parametrize(("heads", "name"), [(6, "transformer_tiny_16_proj1")])
def test_the_full_size_halton_transformer(heads, name):
    shapes, record = _full("halton", name)
    network = built(Transformer, halton.transformer_of_halton(weights(shapes, 2)))
    assert network.config.num_heads == heads
    codes = torch.from_numpy(record["full_codes"])
    with torch.no_grad():
        found = network(sequence_of(network.config, codes, torch.tensor([207]), torch.tensor([False])))
    assert_close(found[0, [1, 101, 256]], torch.from_numpy(record["full_logits_rows"]), 1e-3)


def test_llamagens_full_size_tokenizer():
    shapes, record = _full("halton", "VQ-16")
    network = built(Tokenizer, halton.tokenizer_of_llamagen(weights(shapes, 2)))
    image = torch.from_numpy(record["full_vq_image"]).float()
    expected = torch.from_numpy(record["full_vq_tokens"])
    assert (network.encode((image + 1) / 2)[0] == expected).float().mean() >= 0.995
    pixels = 2 * network.decode(expected[None]) - 1
    assert_close(pixels[0, :, ::8, ::8], torch.from_numpy(record["full_vq_pixels_every_8"]), 1e-3)


@pytest.mark.parametrize(
    ("project", "name"), [("maskbit", "tokenizer_lfq_14"), ("maskgit_vqgan", "imagenet_f16_256")]
)
def test_full_size_tokenizers_of_torch_projects(project, name):
    shapes, record = _full(project, name)
    network = built(Tokenizer, maskbit.tokenizer_of_torch(weights(shapes, 2)))
    expected = torch.from_numpy(record["full_tokens"]).unflatten(1, (16, 16))
    found = network.encode(torch.from_numpy(record["full_image"]).float())
    assert (found == expected).float().mean() >= 0.995
    pixels = network.decode(expected)[0, :, ::8, ::8]
    assert_close(pixels, torch.from_numpy(record["full_pixels_every_8"]), 1e-3)


def test_the_full_size_maskbit_generator():
    shapes, record = _full("maskbit", "lfq_bert_14_2")
    network = built(Transformer, maskbit.transformer_of_maskbit(weights(shapes, 2)))
    codes = torch.from_numpy(record["full_in"])
    sequence = sequence_of(network.config, codes, torch.tensor([207]), torch.tensor([False]))
    with torch.no_grad():
        found = network(sequence)[0, 1:].unflatten(0, (-1, 2))[[0, 100, 205, 255]]
    assert_close(found, torch.from_numpy(record["full_logits_rows"]), 1e-3)


def _full(project: str, name: str) -> tuple[dict, dict]:
    if not SHARED.is_dir():
        pytest.skip("the records of full-size networks are in ../shared/golden/peers alone")
    record = np.load(SHARED / f"{project}.npz")
    return json.loads((SHARED / f"{project}_shapes.json").read_text())[name], record


def test_published_files_are_read_whatever_stands_before_their_names(tmp_path):
    state = weights(SHAPES["halton"]["tiny_plain"])
    path = tmp_path / "model.pth"
    torch.save({"iter": 3, "model_state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}}, path)
    assert read_torch_file(path).keys() == state.keys()


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub of files by path; "raw" paths answer with a Git LFS pointer."""

    files: ClassVar[dict[str, bytes]] = {}
    stated: ClassVar[str | None] = None
    breaks_after: ClassVar[int | None] = None
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self):
        self.asked.append((self.path.rsplit("/", 1)[1], self.headers.get("Range")))
        _, _, rest = self.path.strip("/").partition("/resolve/main/")
        body = self.files.get(rest)
        if "/raw/main/" in self.path:
            content = self.files.get(self.path.rsplit("/", 1)[1])
            digest = self.stated or hashlib.sha256(content or b"").hexdigest()
            body = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 1\n".encode()
        if body is None:
            return self.send_error(404)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        end = len(body) if self.breaks_after is None else start + self.breaks_after
        self.wfile.write(body[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def local_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "stated", None)
    monkeypatch.setattr(Hub, "breaks_after", None)
    monkeypatch.setattr(Hub, "asked", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub
    server.shutdown()
    server.server_close()


def packed(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def publish(hub) -> None:
    """Put tiny files where the registry looks for those of maskbit-14."""
    hub.files["maskbit_tokenizer_14bit.bin"] = packed(weights(SHAPES["maskbit"]["tiny_lfq"]))
    hub.files["maskbit_generator_14bit.bin"] = packed(weights(SHAPES["maskbit"]["tiny_lfq_bert_2"]))


def test_a_published_model_is_fetched_converted_and_kept(local_hub):
    publish(local_hub)
    model = MaskGIT.from_pretrained("maskbit-14")
    assert model.config.sampler.guidance_scale == pytest.approx(8.1)
    assert model.config.transformer.groups == 2
    output = model.generate([1, 2], seed=4, steps=3)
    local_hub.files.clear()  # The network is gone.
    again = MaskGIT.from_pretrained("maskbit-14")
    assert torch.equal(again.generate([1, 2], seed=4, steps=3).tokens, output.tokens)


def test_a_download_that_broke_off_is_resumed(local_hub):
    publish(local_hub)
    local_hub.breaks_after = 1000
    with pytest.raises(DownloadError, match="run the same command again to resume"):
        MaskGIT.from_pretrained("maskbit-14")
    local_hub.breaks_after = None
    MaskGIT.from_pretrained("maskbit-14")
    assert ("maskbit_tokenizer_14bit.bin", "bytes=1000-") in local_hub.asked


def test_a_file_is_compared_with_the_hash_that_the_registry_names(local_hub):
    local_hub.files["vq_ds16_c2i.pt"] = packed(weights(SHAPES["halton"]["tiny_vq"]))
    local_hub.files["ImageNet_256_base.pth"] = packed(weights(SHAPES["halton"]["tiny_plain"]))
    with pytest.raises(DownloadError, match="not the file that this package names"):
        MaskGIT.from_pretrained("halton-256-base")


def test_a_tokenizer_alone_is_fetched_by_name_and_makes_no_images(local_hub):
    local_hub.files["maskgit-vqgan-imagenet-f16-256.bin"] = packed(weights(SHAPES["maskgit_vqgan"]["tiny"]))
    tokenizer = hub.load_tokenizer("maskgit-vqgan")
    assert tokenizer.config.codebook_size == 64
    local_hub.files.clear()
    assert hub.load_tokenizer("maskgit-vqgan").config == tokenizer.config
    with pytest.raises(ConfigError, match="a tokenizer without a transformer"):
        MaskGIT.from_pretrained("maskgit-vqgan")


def test_a_file_that_is_not_what_the_hub_states_is_thrown_away(local_hub):
    publish(local_hub)
    local_hub.stated = "0" * 64
    with pytest.raises(DownloadError, match="not the file that the hub states"):
        MaskGIT.from_pretrained("maskbit-14")
    local_hub.stated = None
    MaskGIT.from_pretrained("maskbit-14")


def test_another_projects_file_under_the_name_is_refused(local_hub):
    publish(local_hub)
    local_hub.files["maskbit_generator_14bit.bin"] = packed(weights(SHAPES["halton"]["tiny_plain"]))
    with pytest.raises(CheckpointError, match="no checkpoint of MaskBit"):
        MaskGIT.from_pretrained("maskbit-14")
    cache = Path(os.environ["MASKGIT_CACHE"])
    assert not [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_a_hub_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="cannot be reached"):
        MaskGIT.from_pretrained("halton-384")


def test_every_published_name_has_its_files_and_settings():
    assert {"halton-256", "halton-384", "maskbit-10", "maskbit-18"} <= set(PUBLISHED)
    for name, entry in PUBLISHED.items():
        assert all(file.url().startswith("https://huggingface.co/") for file in entry.files), name
        assert entry.sampler.guides() == (entry.transformer is not None), name
        assert "verified" in entry.about or all(file.sha256 for file in entry.files), name


def test_the_command_converts_files(tmp_path):
    paths = []
    for name, shapes in {"tokenizer.pt": "tiny_vq", "transformer.pth": "tiny_plain"}.items():
        paths.append(tmp_path / name)
        torch.save(weights(SHAPES["halton"][shapes]), paths[-1])
    arguments = ["--transformer", paths[1], "--as", "halton", "--heads", "4"]
    main(["convert", *map(str, [paths[0], tmp_path / "model", *arguments])])
    model = MaskGIT.from_pretrained(tmp_path / "model")
    assert model.config.sampler.policy == "halton"
    edited = model.generate([3], seed=1, steps=4)
    assert edited.tokens.max() < 128


def test_the_command_converts_a_tokenizer_alone(tmp_path):
    torch.save(weights(SHAPES["maskbit"]["tiny_vqgan_plus"]), tmp_path / "tokenizer.bin")
    main(["convert", str(tmp_path / "tokenizer.bin"), str(tmp_path / "folder"), "--as", "maskbit"])
    assert hub.load_tokenizer(tmp_path / "folder").config.codebook_size == 64


BAD = {
    "truncated": (lambda state: packed(state)[:-300], "cannot be read as a torch checkpoint"),
    "another size": (
        lambda state: packed({**state, "head.bias": torch.zeros(7)}),
        r"head.bias has the shape \(7,\) instead of \(129,\)",
    ),
    "NaN": (
        lambda state: packed({**state, "head.bias": torch.full((129,), math.nan)}),
        "head.bias holds NaN",
    ),
    "malicious": (lambda state: packed({**state, "run": Malicious()}), "asks for more than weights"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_a_sentence_and_leaves_nothing(kind, tmp_path, capsys):
    spoil, said = BAD[kind]
    tokenizer, transformer = tmp_path / "tokenizer.pt", tmp_path / "transformer.pth"
    torch.save(weights(SHAPES["halton"]["tiny_vq"]), tokenizer)
    transformer.write_bytes(spoil(weights(SHAPES["halton"]["tiny_plain"])))
    made = tmp_path / "model"
    with pytest.raises(CheckpointError, match=said):
        convert.load_published("halton", tokenizer, transformer, num_heads=4)
    options = ["--transformer", str(transformer), "--as", "halton", "--heads", "4"]
    assert main(["convert", str(tokenizer), str(made), *options]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not made.exists()


# Whose files are pickles: checkpoints to convert, and the weights and statistics of evaluation nets.
READERS = {
    "checkpoints/torch_files.py",
    "evaluation/networks/weights.py",
    "evaluation/scores/statistics.py",
}


def test_nothing_is_unpickled_but_by_the_readers_and_they_run_no_code():
    """Walk the package's calls: what could run code out of a file, under whatever name it was imported."""
    found = set()
    root = Path(convert.__file__).parent
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in (
                "pickle",
                "torch",
                "numpy",
                "joblib",
                "dill",
            ):
                imported = {alias.name for alias in node.names}
                assert not imported & {"load", "loads", "Unpickler"}, f"{name}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), name
                assert node.value.value is False, f"{name}:{node.value.lineno}"
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            place = f"{name}:{node.lineno}"
            assert called not in ("eval", "exec", "marshal.loads", "joblib.load", "shelve.open"), place
            assert not called.startswith(("pickle.load", "pickle.Unpickler", "dill.load")), place
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "np.load":
                assert given.get("allow_pickle", "False") == "False", place
            if called == "torch.load":
                assert given.get("weights_only") == "True", place
                found.add(name)
    assert found == READERS


class Malicious:
    def __reduce__(self):
        return open, ("/tmp/maskgit-was-here", "w")


def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"model": {"weight": torch.zeros(2)}, "run": Malicious()}, path)
    with pytest.raises(CheckpointError, match="asks for more than weights"):
        read_torch_file(path)
    assert not Path("/tmp/maskgit-was-here").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged, or a file of another kind"),
        (b"hi\n", "damaged, or a file of another kind"),
        (b"PK\x03\x04 cut", "cannot be read|damaged"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
    ],
)
def test_files_that_are_no_checkpoints_are_named(tmp_path, content, said):
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        read_torch_file(path)


def test_what_is_missing_or_left_over_is_named():
    state = weights(SHAPES["halton"]["tiny_plain"])
    with pytest.raises(CheckpointError, match="surplus"):
        halton.transformer_of_halton({**state, "surplus": torch.zeros(1)}, num_heads=4)
    with pytest.raises(CheckpointError, match=r"layers\.1\.attn\.wq\.weight is missing"):
        halton.transformer_of_halton(
            {k: v for k, v in state.items() if k != "transformer.layers.1.attn.wq.weight"}, num_heads=4
        )
    with pytest.raises(CheckpointError, match="holds NaN"):
        path_state = {**state, "head.bias": torch.full((129,), math.nan)}
        _read(path_state)


def _read(state):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        torch.save(state, path)
        return read_torch_file(path)


@pytest.mark.parametrize(("recipe", "name"), [("halton", "base_16_proj1"), ("maskbit", "lfq_bert_14_2")])
def test_recipes_train_the_architectures_that_were_published(recipe, name):
    """Shapes are those of the authors' state dicts, read without making weights."""
    root = Path(__file__).parents[1] / "recipes" / recipe
    shapes = _full(recipe, f"transformer_{name}" if recipe == "halton" else name)[0]
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in shapes.items() if not key.endswith(BUFFERS)}
        tokenizer = _full(recipe, "VQ-16" if recipe == "halton" else "tokenizer_lfq_14")[0]
        of_tokenizer = {
            key: torch.empty(shape) for key, shape in tokenizer.items() if not key.endswith(BUFFERS)
        }
    if recipe == "halton":
        expected = halton.transformer_of_halton(state)[0], halton.tokenizer_of_llamagen(of_tokenizer)[0]
    else:
        expected = maskbit.transformer_of_maskbit(state)[0], maskbit.tokenizer_of_torch(of_tokenizer)[0]
    transformer = TransformerTrainingConfig.from_dict(
        tomllib.loads((root / "transformer.toml").read_text("utf-8"))
    )
    assert dataclasses.replace(transformer.model, dropout=expected[0].dropout) == expected[0]
    assert transformer.sampler == PUBLISHED["halton-256-base" if recipe == "halton" else "maskbit-14"].sampler
    tokenizer = TokenizerTrainingConfig.from_dict(tomllib.loads((root / "tokenizer.toml").read_text("utf-8")))
    assert tokenizer.model == expected[1]
