"""Halton-MaskGIT's and MaskBit's own code and ours, timed in turns: one process, the same weights and settings.

    git clone https://github.com/valeoai/Halton-MaskGIT HALTON
    git clone https://github.com/markweberdev/maskbit MASKBIT
    python benchmarks/against_authors.py --halton HALTON --maskbit MASKBIT [--models NAME ...] [--json FILE]

Needs einops and tqdm for their code, whose files are not touched. Weights come from a formula, at each model's full size.
Rows: `forward`, a guided evaluation (two halves in one batch) of a sequence that is half masked, as decoding makes it, and
`image`, a picture at the authors' published settings, from the class to pixels. Theirs runs as their samplers call it, in
float32, eagerly; `ratio` is theirs_s / ours_s of the medians. `logits_error` is the largest difference of logits of masked
tokens, in standard deviations.
"""

import argparse
import math
import sys
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
import timing
from maskgit import MaskGIT
from maskgit.checkpoints.halton import HEADS, tokenizer_of_llamagen, transformer_of_halton
from maskgit.checkpoints.maskbit import tokenizer_of_torch, transformer_of_maskbit
from maskgit.checkpoints.published import PUBLISHED
from maskgit.checkpoints.weights import loaded
from maskgit.config import ModelConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer

LABEL = 207
MODES = ("eager", "exact", "fast", "int8")
# Width, layers and MLP argument of Halton-MaskGIT's sizes (Trainer/cls_trainer.py).
HALTON_SIZES = {
    "tiny": (384, 6, 4 * 384),
    "small": (512, 12, 4 * 512),
    "base": (768, 12, 4 * 768),
    "large": (1024, 24, 4 * 1024),
}


@torch.no_grad()
def fill_weights(module: torch.nn.Module, seed: int = 2) -> None:
    """Give every parameter values that depend on its name, its shape and a seed alone."""
    for name, value in module.named_parameters():
        shape = tuple(value.shape)
        key = [zlib.crc32(name.encode()), seed]
        drawn = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
        if name.endswith("bias"):
            drawn *= 0.1
        elif any(word in name for word in ("emb", "pos", "tokens")) and len(shape) > 1:
            drawn *= 0.5
        elif len(shape) < 2:
            drawn = 1 + 0.1 * drawn
        else:
            drawn /= math.sqrt(math.prod(shape[1:]))
        value.copy_(torch.from_numpy(drawn))


def ours_of(name: str, parts: tuple[tuple[Any, Any], tuple[Any, Any]]) -> MaskGIT:
    """Return our model of what the two readers made of the authors' state dicts."""
    (first_config, first), (second_config, second) = parts
    config = ModelConfig(
        first_config,
        second_config,
        image_size=second_config.grid_size * first_config.patch_size,
        label_dropout=0.1,
        sampler=PUBLISHED[name].sampler,
    )
    return MaskGIT(config, loaded(Tokenizer, first_config, first), loaded(Transformer, second_config, second))


class Theirs:
    """The authors' networks and what is timed of them."""

    model: MaskGIT

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the logits of both halves of guidance, (2, …), of codes int64 (1, units)."""
        raise NotImplementedError

    def image(self) -> None:
        """Make a picture at the published settings."""
        raise NotImplementedError


class Halton(Theirs):
    """Halton-MaskGIT's transformer and sampler, with LlamaGen's tokenizer."""

    def __init__(self, checkout: Path, name: str) -> None:
        sys.path.insert(0, str(checkout))
        from Network.transformer import Transformer as TheirTransformer
        from Network.vq_model import ModelArgs, VQModel
        from Sampler.halton_sampler import HaltonSampler

        _, image_size, size = name.split("-")
        width, depth, mlp = HALTON_SIZES[size]
        self.side, self.codes = int(image_size) // 16, 16384
        self.network = TheirTransformer(
            self.side, width, self.codes, depth, HEADS[width], mlp, nclass=1000, register=1
        ).eval()
        self.tokenizer = VQModel(ModelArgs()).eval()
        for network in (self.network, self.tokenizer):
            fill_weights(network)
        arguments = types.SimpleNamespace(mask_value=self.codes, codebook_size=self.codes, device="cpu")
        # What the sampler reads of their trainer.
        self.trainer = types.SimpleNamespace(
            vit=self.network,
            ae=self.tokenizer,
            args=arguments,
            input_size=self.side,
            autocast=torch.autocast("cpu", enabled=False),
        )
        sampler = PUBLISHED[name].sampler
        self.sampler = HaltonSampler(w=sampler.guidance_scale - 1, step=sampler.steps, randomize=True)
        self.model = ours_of(
            name,
            (
                tokenizer_of_llamagen(self.tokenizer.state_dict()),
                transformer_of_halton(self.network.state_dict()),
            ),
        )

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        grid = codes.view(1, self.side, self.side)
        labels = torch.tensor([LABEL, LABEL])
        return self.network(torch.cat([grid, grid]), labels, torch.tensor([False, True]))

    def image(self) -> None:
        self.sampler(self.trainer, nb_sample=1, labels=torch.tensor([LABEL]), verbose=False)


class Settings(dict):
    """Their configuration, whose entries are attributes, too."""

    __getattr__ = dict.__getitem__


class MaskBit(Theirs):
    """MaskBit's generator, tokenizer and sampling function."""

    def __init__(self, checkout: Path, name: str) -> None:
        sys.path.insert(0, str(checkout))
        _without_torchvision()
        from modeling.bert import LFQBert
        from modeling.conv_vqgan import ConvVQModel
        from modeling.modules.sampling import sample

        self.bits = int(name.split("-")[1])
        self.network = LFQBert(
            hidden_dim=1024, codebook_size=2**self.bits, codebook_splits=2, depth=24, heads=16, mlp_dim=4096
        ).eval()
        self.tokenizer = ConvVQModel(
            Settings(
                quantizer_type="lookup-free",
                codebook_size=2**self.bits,
                token_size=self.bits,
                commitment_cost=0.25,
                entropy_loss_weight=0.02,
                entropy_loss_temperature=0.01,
                entropy_gamma=1.0,
                num_channels=3,
                hidden_channels=128,
                channel_mult=[1, 1, 2, 2, 4],
                num_resolutions=5,
                num_res_blocks=2,
                sample_with_conv=True,
            )
        ).eval()
        for network in (self.network, self.tokenizer):
            fill_weights(network)
        self.sample = sample
        self.settings = PUBLISHED[name].sampler
        self.model = ours_of(
            name,
            (
                tokenizer_of_torch(self.tokenizer.state_dict()),
                transformer_of_maskbit(self.network.state_dict()),
            ),
        )

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        units = codes.view(1, 256, 2)
        labels = torch.tensor([LABEL, LABEL])
        return self.network(torch.cat([units, units]), labels, torch.tensor([False, True])).flatten(1, 2)

    def image(self) -> None:
        curve, _, power = self.settings.guidance_schedule.partition(":")
        assert curve == "power-cosine", "MaskBit's only"
        self.sample(
            self.network,
            self.tokenizer,
            num_samples=1,
            labels=torch.tensor([LABEL]),
            randomize_temperature=self.settings.choice_temperature,
            mask_schedule_strategy="arccos",
            num_steps=self.settings.steps,
            guidance_scale=self.settings.guidance_scale - 1,
            mask_token=2 ** (self.bits // 2),
            guidance_annealing="cosine",
            scale_pow=float(power.removesuffix("@before")),
            codebook_size=2**self.bits,
            codebook_splits=2,
        )


def _without_torchvision() -> None:
    """Let their training losses import what is not run here."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        for name in ("torchvision", "torchvision.models", "torchvision.models.feature_extraction"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["torchvision"].models = sys.modules["torchvision.models"]  # type: ignore[attr-defined]
        extraction = sys.modules["torchvision.models.feature_extraction"]
        extraction.create_feature_extractor = None  # type: ignore[attr-defined]


def measure(name: str, theirs: Theirs, modes: list[str], rounds: dict[str, int]) -> list[dict[str, Any]]:
    """Time one model's forward pass and picture."""
    vocabulary = theirs.model.vocabulary
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(vocabulary.num_codes, (1, vocabulary.num_tokens), generator=generator)
    masked = torch.rand(codes.shape, generator=generator) < 0.5
    sequence = torch.cat(
        [torch.tensor([[vocabulary.num_codes + LABEL]]), codes.masked_fill(masked, vocabulary.mask)], dim=1
    )
    both = torch.cat([sequence, sequence])
    both[1, 0] = vocabulary.mask
    their_codes = codes.masked_fill(masked, vocabulary.num_codes)
    runs = {mode: models.in_mode(theirs.model, mode, "cpu") for mode in modes}
    with torch.no_grad():
        expected = theirs.forward(their_codes)[:, masked[0]]
        errors = {}
        for mode, model in runs.items():
            found = model.predictor(known=False)(both)[:, 1:][:, masked[0]]
            errors[mode] = float((found - expected).abs().max() / expected.std())

    def forward_of(model: MaskGIT) -> Callable[[], Any]:
        predict = model.predictor(known=False)
        return lambda: predict(both)

    seeds = iter(range(10_000))
    works = {
        "forward": {"authors": lambda: theirs.forward(their_codes)}
        | {mode: forward_of(model) for mode, model in runs.items()},
        # Another class each time, so that no first step is remembered.
        "image": {"authors": theirs.image}
        | {
            mode: lambda model=model: model.generate([next(seeds) % 1000], seed=1)
            for mode, model in runs.items()
        },
    }
    rows = []
    for work, sides in works.items():
        if not rounds[work]:
            continue
        with torch.no_grad():
            times = timing.in_turns(
                {side: timing.clock(run) for side, run in sides.items()},
                rounds[work],
                warmups=int(work == "forward"),
            )
        authors = timing.spread(times["authors"])
        for mode in modes:
            ours = timing.spread(times[mode])
            rows.append(
                {
                    "model": name,
                    "name": work,
                    "mode": mode,
                    "engine": models.engine_of(runs[mode]),
                    "authors_s": authors["seconds"],
                    "ours_s": ours["seconds"],
                    "ratio": authors["seconds"] / ours["seconds"],
                    "authors": authors,
                    "ours": ours,
                    "logits_error": errors[mode] if work == "forward" else None,
                }
            )
            print(
                f"{name} {work} {mode}: {rows[-1]['authors_s']:.3f} s, {rows[-1]['ours_s']:.3f} s, "
                f"{rows[-1]['ratio']:.2f}, error {errors[mode]:.1e}",
                flush=True,
            )
    return rows


def main() -> None:
    """Measure the models that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--halton", type=Path, help="a checkout of valeoai/Halton-MaskGIT")
    parser.add_argument("--maskbit", type=Path, help="a checkout of markweberdev/maskbit")
    parser.add_argument("--models", nargs="+", default=["halton-256-base", "maskbit-14"], choices=PUBLISHED)
    parser.add_argument("--modes", nargs="+", default=["exact", "fast"], choices=MODES)
    parser.add_argument("--rounds", type=int, default=5, help="of the forward pass")
    parser.add_argument("--image-rounds", type=int, default=1, help="of the picture; 0 leaves it out")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    record: dict[str, Any] = {"environment": timing.environment(), "rows": []}
    for name in options.models:
        kind = Halton if name.startswith("halton") else MaskBit
        checkout = options.halton if kind is Halton else options.maskbit
        if checkout is None:
            parser.error(f"{name} needs --{kind.__name__.lower()} CHECKOUT")
        theirs = kind(checkout, name)
        rounds = {"forward": options.rounds, "image": options.image_rounds}
        record["rows"] += measure(name, theirs, options.modes, rounds)
        if options.json:
            timing.write_json(options.json, record)


if __name__ == "__main__":
    main()
