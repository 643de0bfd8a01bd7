"""What an image costs with each model that others released: parameters, memory, operations, seconds of a CPU core.

    python benchmarks/released.py [--models NAME ...] [--json FILE]

Weights are drawn at random at each model's full size, which does not affect the time. `core_s` is the processor time of one
thread for an image at the model's own settings in the mode `exact`: that of a guided evaluation of a half masked sequence, times
the steps, and that of decoding once. `h100_ms` is arithmetic: the matrix products at 35 % of 989 TFLOP/s (bfloat16), the share that
large batches are estimated to reach (docs/performance.md).
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import models
import timing
from maskgit.checkpoints.published import PUBLISHED
from maskgit.config import ModelConfig
from maskgit.evaluation.runs.cost import network_flops
from maskgit.networks.config import TokenizerConfig, TransformerConfig

H100_FLOPS = 0.35 * 989e12
# Of Halton-MaskGIT's sizes, by name: width, layers, heads, width of the MLP.
HALTON = {
    "tiny": (384, 6, 6, 1024),
    "small": (512, 12, 6, 1536),
    "base": (768, 12, 12, 2048),
    "large": (1024, 24, 16, 2816),
}


def config_of(name: str) -> ModelConfig:
    """Return a released model's shape."""
    project, *rest = name.split("-")
    if project == "halton":
        width, layers, heads, inner = HALTON[rest[1]]
        tokenizer = TokenizerConfig(
            decoder_res_blocks=3,
            embedding_dim=8,
            codebook_size=16384,
            latent_channels=256,
            conv_downsample=True,
            downsample_kernel=3,
            normalize_codes=True,
            block="taming",
            attention=True,
            symmetric_pixels=True,
        )
        transformer = TransformerConfig(
            num_codes=16384,
            grid_size=int(rest[0]) // 16,
            hidden_size=width,
            num_layers=layers,
            num_heads=heads,
            intermediate_size=inner,
            block="modern",
            conditioning="adaln",
            class_embedding="own",
            query_key_norm="width",
            registers=1,
            predict_mask=True,
        )
    else:
        bits = int(rest[0])
        tokenizer = TokenizerConfig(
            embedding_dim=bits,
            codebook_size=2**bits,
            conv_downsample=True,
            downsample_kernel=3,
            quantizer="lfq",
        )
        transformer = TransformerConfig(
            num_codes=2**bits,
            hidden_size=1024,
            intermediate_size=4096,
            activation="gelu",
            class_embedding="own",
            groups=2,
            tie_embeddings=False,
        )
    return ModelConfig(
        tokenizer,
        transformer,
        image_size=16 * transformer.grid_size,
        label_dropout=0.1,
        sampler=PUBLISHED[name].sampler,
    )


def measure(name: str) -> dict[str, Any]:
    """Return what an image of a model costs."""
    plain = models.random_model(config_of(name))
    sampler, vocabulary = plain.config.sampler, plain.vocabulary
    model = plain.optimize("exact")
    labels = torch.tensor([207, -1])
    grid = torch.zeros(2, vocabulary.grid_size, vocabulary.grid_size, dtype=torch.int64)
    half = torch.rand(grid.shape[1:], generator=torch.Generator().manual_seed(0)) < 0.5
    sequence = vocabulary.sequence(labels, grid, half)
    predict = model.predictor(known=False)
    seconds = {}
    # The second of two, as the first packs weights.
    for _ in range(2):
        for work, run in {
            "step": lambda: predict(sequence),
            "decode": lambda: model.decode_tokens(grid[:1]),
        }.items():
            start = time.process_time()
            run()
            seconds[work] = time.process_time() - start
    sequence_flops, decoder_flops = network_flops(plain)
    flops = 2 * sampler.steps * sequence_flops + decoder_flops
    counts = [
        sum(p.numel() for p in network.parameters()) for network in (plain.transformer, plain.tokenizer)
    ]
    return {
        "model": name,
        "transformer_parameters": counts[0],
        "tokenizer_parameters": counts[1],
        "float32_bytes": 4 * sum(counts),
        "steps": sampler.steps,
        "tflop": flops / 1e12,
        "step_core_s": seconds["step"],
        "decode_core_s": seconds["decode"],
        "core_s": sampler.steps * seconds["step"] + seconds["decode"],
        "h100_ms": 1e3 * flops / H100_FLOPS,
    }


def main() -> None:
    """Measure the models that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name, entry in PUBLISHED.items() if entry.transformer and name.count("-") == 2]
    parser.add_argument("--models", nargs="+", default=[*names, "maskbit-10", "maskbit-14", "maskbit-18"])
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"environment": timing.environment(), "rows": []}
    for name in options.models:
        record["rows"].append(measure(name))
        print(record["rows"][-1], flush=True)
        if options.json:
            timing.write_json(options.json, record)


if __name__ == "__main__":
    main()
