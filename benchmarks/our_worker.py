"""Ours as a worker of benchmarks/against_official.py, with the same requests as official_worker.py.

    python benchmarks/our_worker.py [--device cpu]

It works in a folder that holds `checkpoints/` with the two official checkpoints.
"""

import argparse
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import models
import timing
import workers
from maskgit import MaskGIT, convert
from maskgit.sampler.loop import decode
from maskgit.sampler.noise import Noise


class Ours:
    """The pipelines of the modes in use, and what they are to be run on."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.models: dict[str, MaskGIT] = {}
        self.inputs: dict[tuple[str, int], dict[str, Any]] = {}

    def model(self, mode: str) -> MaskGIT:
        """Return the pipeline of a mode, loaded when first asked for."""
        if mode not in self.models:
            model = convert.load_official(*convert.find_official("checkpoints"))
            self.models[mode] = models.in_mode(model, mode, self.device)
        return self.models[mode]

    def run(self, name: str, batch: int, mode: str) -> Tensor:
        """Run a prepared function; what it makes is on the CPU."""
        model, inputs = self.model(mode), self.inputs[name, batch]
        if name == "forward":
            return model.predict_logits(inputs["sequence"].to(model.device)).float().cpu()
        if name == "decode":
            return model.decode_tokens(inputs["tokens"])
        if name == "encode":
            return model.encode_pixels(inputs["image"])
        # Other classes each time, or the first step would be remembered.
        inputs["labels"] = (inputs["labels"] + batch) % model.config.transformer.num_classes
        return model.generate(
            inputs["labels"], steps=models.STEPS, seed=inputs["seed"], batch_size=batch
        ).images


def with_noise(model: MaskGIT, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
    """Return the images and tokens that a model makes from given noise."""
    sequence = model.vocabulary.sequence(labels).to(model.device)
    config = model.sampler_config(steps=models.STEPS)
    predict = model.predictor(known=False)
    steps = decode(predict, sequence, config, mask_token=model.vocabulary.mask, noise=noise)
    tokens = steps[:, -1]
    return {
        "images": model.decode_tokens(model.vocabulary.grid(tokens)).movedim(1, -1),
        "tokens": tokens[:, 1:].cpu(),
    }


class Recorded:
    """Noise that another run drew."""

    def __init__(self, record: Mapping[str, np.ndarray], device: torch.device) -> None:
        self._tokens = torch.from_numpy(record["gumbel_tokens"]).to(device)
        self._choice = torch.from_numpy(record["gumbel_choice"]).to(device)
        self._rows = torch.arange(self._choice.shape[1], device=device)

    def tokens(self, step: Tensor) -> Tensor:
        """Return Gumbel noise, float32 (B, N + 1, codes)."""
        return self._tokens[step[:, 0], self._rows]

    def choice(self, step: Tensor) -> Tensor:
        """Return Gumbel noise, float32 (B, N + 1)."""
        return self._choice[step[:, 0], self._rows]

    def uniform(self, step: Tensor, stream: int) -> Tensor:
        """Refuse: the policy that is timed asks for none."""
        raise NotImplementedError("no uniform numbers were recorded")


def handlers(ours: Ours) -> dict[str, Any]:
    """Return what the worker can be asked for."""

    def describe() -> dict[str, Any]:
        return timing.environment(ours.device)

    def prepare(name: str, batch: int, inputs: str, mode: str) -> dict[str, Any]:
        given = np.load(inputs)
        mask = ours.model(mode).vocabulary.mask
        sequence = torch.from_numpy(given["sequence"]).long()
        ours.inputs[name, batch] = {
            "sequence": sequence.masked_fill(sequence < 0, mask),
            "tokens": torch.from_numpy(given["tokens"]).long(),
            "image": torch.from_numpy(given["image"]).movedim(-1, 1).contiguous(),
            "labels": torch.from_numpy(given["labels"]).long(),
            "first_labels": torch.from_numpy(given["labels"]).long(),
            "seed": int(given["seed"]),
        }
        start = time.perf_counter()
        ours.run(name, batch, mode)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "engine": models.engine_of(ours.model(mode))}

    def timed(name: str, batch: int, mode: str) -> dict[str, Any]:
        start = time.perf_counter()
        ours.run(name, batch, mode)
        return {"seconds": time.perf_counter() - start}

    def outputs(name: str, batch: int, mode: str, path: str, noise: str) -> dict[str, Any]:
        if name == "image8":
            model = ours.model(mode)
            record = Recorded(np.load(noise), model.device)
            made = with_noise(model, ours.inputs[name, batch]["first_labels"], record)
        else:
            made = {"forward": "logits", "decode": "images", "encode": "tokens"}[name]
            made = {made: ours.run(name, batch, mode)}
            if name == "decode":
                made["images"] = made["images"].movedim(1, -1)
        np.savez(path, **{key: value.numpy() for key, value in made.items()})
        return {}

    return {"describe": describe, "prepare": prepare, "time": timed, "outputs": outputs}


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    workers.serve(handlers(Ours(options.device)))


if __name__ == "__main__":
    main()
