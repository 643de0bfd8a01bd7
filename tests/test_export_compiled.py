"""What torch.compile and AOTInductor make of our code; in a file of its own because a compiler takes its time."""

import json
import os
import subprocess
import sys

import torch
from torch._inductor import aoti_load_package

from maskgit.engine.graphs import CompiledNoise
from maskgit.export import export_model
from maskgit.sampler.noise import ImageNoise, seed_words


def test_captured_noise_may_be_compiled():
    words, indices, step = seed_words([5, 2**64 - 1]), torch.tensor([0, 7]), torch.tensor([[0], [3]])
    plain = ImageNoise.of_words(words, indices, 17, 8).tokens(step)
    torch.testing.assert_close(
        CompiledNoise.of_words(words, indices, 17, 8).tokens(step), plain, atol=1e-5, rtol=1e-5
    )


def test_a_compiled_package_computes_what_the_network_does(tiny, tmp_path):
    (made,) = export_model(tiny, tmp_path / "out", format="aoti", parts=["transformer"])
    predict = aoti_load_package(str(made.path))
    sequences = tiny.vocabulary.sequence(torch.tensor([1, 3, 3, 0]))
    torch.testing.assert_close(predict(sequences), tiny.predict_logits(sequences), atol=2e-5, rtol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert (config["format"], config["device"], config["dtype"]) == ("aoti", "cpu", "float32")


def test_without_a_compiler_the_sentence_says_so(tiny_folder, tmp_path):
    command = ["export", tiny_folder, "--format", "aoti", "--device", "cpu", "--parts", "decoder"]
    done = subprocess.run(
        [sys.executable, "-m", "maskgit", *command, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        env=os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "C++ compiler" in done.stderr
    assert not (tmp_path / "out").exists()
