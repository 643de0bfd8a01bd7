"""How near the networks come to what the machine can do.

    python benchmarks/roofline.py [--size 256] [--modes eager exact fast int8] [--json FILE]

Attainable is the better of a product of two 4096 × 4096 matrices and a 3×3 convolution of 256 channels at
64×64 pixels, in the same number type (8-bit: the library's fastest product) and timed in the same turns.
The networks' operations are counted by benchmarks/flops.py; their rate is the model's arithmetic over wall
time, so work that is avoided counts as done.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flops
import models
import timing
from maskgit import MaskGIT

PARTS = ("forward", "decode", "encode", "image8", "again8")


class Work(NamedTuple):
    """Something to time, and its operations in each number type."""

    run: Callable[[], Any]
    flops: dict[str, int]


Works = dict[str, Work]


def integer_product(size: int, device: str) -> Callable[[], Tensor]:
    """Return the fastest product of 8-bit matrices that this build of PyTorch has."""
    first, second = (
        torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2)
    )
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return lambda: torch._int_mm(first, second)
    ops = torch.ops.onednn
    unsigned, packed = first.int().add(128).to(torch.uint8), ops.qlinear_prepack(second, [size, size])
    scales, zeros = torch.ones(size), torch.zeros(size, dtype=torch.int32)
    return lambda: ops.qlinear_pointwise(
        unsigned, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def ceilings(kinds: list[str], size: int, side: int, device: str) -> Works:
    """Return the works whose rate is attainable, by "type: work", each with its operations."""
    works: Works = {}
    for kind in kinds:
        if kind == "int8":
            works["int8: product"] = Work(integer_product(size, device), {kind: 2 * size**3})
            continue
        options: Any = {"dtype": getattr(torch, kind), "device": device}
        a, b = torch.randn(size, size, **options), torch.randn(size, size, **options)
        works[f"{kind}: product"] = Work(lambda a=a, b=b: a @ b, {kind: 2 * size**3})
        conv = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False, **options)
        conv = conv.to(memory_format=torch.channels_last)
        x = torch.randn(1, 256, side, side, **options).to(memory_format=torch.channels_last)
        count = 2 * 9 * 256 * 256 * side * side
        works[f"{kind}: convolution"] = Work(lambda conv=conv, x=x: conv(x), {kind: count})
    return works


def parts(model: MaskGIT, names: list[str], batch: int) -> Works:
    """Return the works of a model by name."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    side, pixels = config.transformer.grid_size, config.image_size
    tokens = torch.randint(config.transformer.num_codes, (batch, side, side), generator=generator)
    labels = [1] * batch
    sequence = model.vocabulary.sequence(torch.tensor(labels)).to(model.device)
    image = torch.rand(batch, 3, pixels, pixels, generator=generator)
    engine = models.engine_of(model)
    # What an int8 mode leaves in floating point, and all that other modes do, is in the engine's type.
    plain = engine.get("dtype", "float32")
    linear = engine.get("quantize") or plain
    forward, decode = flops.forward(config.transformer, batch), flops.decode(config.tokenizer, pixels, batch)
    image8 = Counter({linear: models.STEPS * forward}) + Counter({plain: decode})
    classes = models.NewClasses(config)

    def generate(labels: list[int]) -> None:
        model.generate(labels, steps=models.STEPS, batch_size=batch)

    works = {
        "forward": Work(lambda: model.predict_logits(sequence), {linear: forward}),
        "decode": Work(lambda: model.decode_tokens(tokens), {plain: decode}),
        "encode": Work(
            lambda: model.encode_pixels(image), {plain: flops.encode(config.tokenizer, pixels, batch)}
        ),
        "image8": Work(lambda: generate(classes.take(batch)), dict(image8)),
        "again8": Work(lambda: generate(labels), dict(image8)),
    }
    return {name: works[name] for name in names}


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time all works in turns and return the record."""
    config = models.SIZES[options.size]()
    plain = models.random_model(config)
    works: dict[tuple[str, str], Work] = {}
    engines = {}
    for mode in options.modes:
        model = models.in_mode(plain, mode, options.device)
        engines[mode] = models.engine_of(model)
        works |= {(mode, name): work for name, work in parts(model, options.names, options.batch).items()}
    kinds = sorted({kind for work in works.values() for kind in work.flops})
    limits = ceilings(kinds, options.product, options.convolution, options.device)
    works |= {("", name): work for name, work in limits.items()}
    clocks = {key: timing.clock(work.run, options.device) for key, work in works.items()}
    times = {key: timing.spread(t) for key, t in timing.in_turns(clocks, options.rounds).items()}
    rates = {key: sum(work.flops.values()) / times[key]["seconds"] / 1e9 for key, work in works.items()}
    attainable = {
        kind: max(rates["", name] for name, work in limits.items() if kind in work.flops) for kind in kinds
    }
    rows = []
    for (mode, name), work in works.items():
        if mode:
            least_s = sum(count / attainable[kind] / 1e9 for kind, count in work.flops.items())
            row = {"name": name, "device": options.device, "batch": options.batch, "mode": mode}
            row |= times[mode, name] | {"gflop": {kind: n / 1e9 for kind, n in work.flops.items()}}
            row |= {"gflop_per_s": rates[mode, name], "share": least_s / times[mode, name]["seconds"]}
            rows.append(row)
    return {
        "environment": timing.environment(options.device),
        "engines": engines,
        "attainable_gflop_per_s": attainable,
        "ceilings_gflop_per_s": {name: rates["", name] for name in limits},
        "rows": rows,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="256", choices=list(models.SIZES))
    parser.add_argument("--modes", nargs="+", default=list(models.MODES), choices=list(models.MODES))
    parser.add_argument("--names", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--product", type=int, default=4096, help="the matrices' side")
    parser.add_argument("--convolution", type=int, default=64, help="the convolution's side in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record = measure(options)
    for kind, rate in record["attainable_gflop_per_s"].items():
        print(f"attainable in {kind}: {rate:.1f} GFLOP/s")
    for row in record["rows"]:
        print(
            f"{row['mode']:6} {row['name']:8} {row['seconds']:8.4f} s {row['gflop_per_s']:9.1f} GFLOP/s, "
            f"{row['share']:.1%} of what is attainable in {' and '.join(row['gflop'])}"
        )
    if options.json:
        timing.write_json(options.json, record)


if __name__ == "__main__":
    main()
