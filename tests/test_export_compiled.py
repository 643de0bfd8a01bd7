"""Networks compiled by AOTInductor; in a file of its own because a compiler takes its time."""

import json
import os
import subprocess
import sys

import torch
from torch._inductor import aoti_load_package

from maskgit.export import export_model


def test_a_compiled_package_computes_what_the_network_does(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    (made,) = export_model(tiny, tmp_path / "out", format="aoti", parts=["transformer"])
    predict = aoti_load_package(str(made.path))
    sequences = tiny.vocabulary.sequence(torch.tensor([1, 3, 3, 0]))
    torch.testing.assert_close(predict(sequences), tiny.predict_logits(sequences), atol=2e-5, rtol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert (config["format"], config["device"], config["dtype"]) == ("aoti", "cpu", "float32")


def test_without_a_compiler_the_sentence_says_so(tiny, tmp_path):
    model = tiny.save_pretrained(tmp_path / "model")
    command = ["export", model, "--format", "aoti", "--device", "cpu", "--parts", "decoder"]
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
