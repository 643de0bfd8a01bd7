"""All that is asked of a machine with a GPU, in ten minutes: what is right there, and how fast it is.

    make gpu
    python benchmarks/gpu.py [--out out/gpu] [--only NAME ...] [--budget 600]

It needs torch for CUDA and this package with its own requirements. Each section is a process with a time limit;
results are JSON and Markdown in the folder, and what was found before an end is kept. Beside what is measured stands
what arithmetic expects. Weights are random where only time matters.
"""

import argparse
import json
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import flops
import models
import timing
from maskgit import MaskGIT
from maskgit.engine.graphs import GraphedSteps
from maskgit.sampler.noise import ImageNoise
from maskgit.sampler.policies import POLICIES
from sections import Record, Section, run_sections

# Dense bfloat16 operations a second and bytes a second, by what is in the name. Source: NVIDIA's data sheets (SXM).
PEAKS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12)}
# Images of the 256 model a second, in 8 steps at batch 64 in bfloat16: of a peak of 1063 products alone would
# allow, what attention, norms, noise and the decoder's passes over memory leave.
IMAGES_PER_SECOND = {"H200": (365.0, 430.0), "H100": (330.0, 390.0)}
BATCH = 64
ODD_BATCHES = (1, 3, 7, 65)
EXACT = (1.0, 1.0)


def name_of(device: str) -> str:
    """Return what a device is called."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"


def known(table: dict[str, Any], device: str) -> Any:
    """Return the entry of a table for a GPU, or None."""
    return next((value for key, value in table.items() if key in name_of(device)), None)


def expected_images(size: str, device: str) -> tuple[float, float] | None:
    """Return how many images a second arithmetic expects: as the operations of an image are to the 256 model's."""
    found = known(IMAGES_PER_SECOND, device)
    if found is None:
        return None
    config, least = models.SIZES[size](), models.SIZES["256"]()
    share = flops.generate(least, 8) / flops.generate(config, config.sampler.steps)
    return found[0] * share, found[1] * share


def wait(device: str) -> None:
    """Wait for a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def bundled(device: str, mode: str = "exact") -> MaskGIT:
    """Return the bundled model in a mode."""
    return MaskGIT.from_pretrained().optimize(mode, device=device)


def images_a_second(model: MaskGIT, batch: int, rounds: int, device: str) -> float:
    """Return how many images are made in a second, from labels to pixels on the CPU."""
    classes = models.NewClasses(model.config)
    work = timing.clock(lambda: model.generate(classes.take(batch), batch_size=batch), device)
    times = timing.in_turns({"": work}, rounds, warmups=2)[""]
    return batch / timing.spread(times)["seconds"]


def environment(options: argparse.Namespace, record: Record) -> None:
    """Say where the figures are from."""
    for key, value in timing.environment(options.device).items():
        record.add(key, value if isinstance(value, int | float | str) else json.dumps(value))
    if torch.device(options.device).type == "cuda":
        properties = torch.cuda.get_device_properties(options.device)
        record.add("memory", properties.total_memory / 2**30, "GiB")
        record.add("multiprocessors", properties.multi_processor_count)
        record.add("GPUs", torch.cuda.device_count())
        record.add("cuDNN", torch.backends.cudnn.version())


@torch.no_grad()
def tokens(options: argparse.Namespace, record: Record) -> None:
    """Compare noise, tokens and codes with the CPU's."""
    words, indices = torch.tensor([[5, 0], [2**32 - 1, 2**32 - 1]]), torch.tensor([0, 2**40])

    def drawn(device: str) -> torch.Tensor:
        noise = ImageNoise.of_words(words.to(device), indices.to(device), 257, 1024)
        return noise.uniform(torch.tensor([[3], [9]], device=device), 3).cpu()

    record.add("equal uniform numbers", _share(drawn("cpu"), drawn(options.device)), expected=EXACT)
    labels = list(range(10)) * 4
    plain = bundled("cpu")
    wanted = plain.generate(labels, seed=3)
    codes = plain.encode_pixels(wanted.images)
    for mode in ("exact", "fast"):
        model = bundled(options.device, mode)
        made = model.generate(labels, seed=3)
        expected = EXACT if mode == "exact" else None
        record.add(f"{mode}: equal tokens", _share(made.tokens, wanted.tokens), expected=expected)
        found = model.encode_pixels(wanted.images)
        record.add(f"{mode}: equal codes of images", _share(found, codes), expected=expected)
        far = (model.decode_tokens(wanted.tokens) - wanted.images).abs().max()
        record.add(f"{mode}: greatest difference of pixels", float(far))


def policies(options: argparse.Namespace, record: Record) -> None:
    """Compare captured steps with the same steps uncaptured, beside a busy second thread."""
    captured = bundled(options.device, "fast")
    plain = bundled(options.device, "fast")
    # Padded and compiled in the same way, so that only the capture differs.
    plain.decode_step = GraphedSteps(capture=False, compile_noise=captured.engine.compile)  # type: ignore[union-attr]
    with busy(options.device):
        for policy in POLICIES:
            for guidance in (1.0, 2.0):
                shares = []
                for batch in ODD_BATCHES:
                    asked: dict[str, Any] = {"seed": batch, "steps": 4, "policy": policy, "batch_size": batch}
                    labels = [n % 10 for n in range(batch)]
                    made = [m.generate(labels, guidance_scale=guidance, **asked) for m in (captured, plain)]
                    shares.append(_share(made[0].tokens, made[1].tokens))
                record.add(f"{policy}, guidance {guidance:g}: equal tokens", min(shares), expected=EXACT)


@contextmanager
def busy(device: str) -> Any:
    """Let a second thread allocate, compute, copy and wait on a device meanwhile."""
    over, failed = threading.Event(), []

    def work() -> None:
        try:
            while not over.is_set():
                x = torch.randn(512, 512).to(device)
                (x @ x).sum().item()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failed:
        raise failed[0]


def training(options: argparse.Namespace, record: Record) -> None:
    """Train 20 steps of each stage from the command line, go on from the tenth, and shard over one process."""
    import numpy as np
    from PIL import Image

    home = Path(options.out).resolve() / "training"
    rng = np.random.default_rng(0)
    for number in range(64):
        place = home / "pictures" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{number}.png")
    network = ("model.filters=32", "model.channel_multipliers=[1,2]", "model.codebook_size=64")
    common = ("batch_size=8", "checkpoint_every=10", 'tracker="none"', f'device="{options.device}"')
    first = (*network, *common, "perceptual_weight=0", "discriminator_filters=32", f'out="{home}/tokenizer"')
    second = (
        "model.hidden_size=64",
        "model.num_layers=2",
        "model.num_heads=4",
        "model.intermediate_size=128",
    )
    second = (*second, "model.num_codes=64", "model.num_classes=2", "model.grid_size=16", *common)
    second = (*second, f'data="{home}/tokens"', f'tokenizer="{home}/tokenizer/model"')
    pack = ("pack", f"{home}/pictures", f"{home}/images", "--size", "32")
    tokenize = ("tokenize", f"{home}/images", f"{home}/tokens", "--tokenizer", f"{home}/tokenizer/model")
    _maskgit(record, "pack", *pack)
    for steps in (10, 20):
        settings = (*first, f'data="{home}/images"', f"steps={steps}")
        _maskgit(record, f"tokenizer to step {steps}", "train", "tokenizer", *_recipe(home, settings))
    _maskgit(record, "tokenize", *tokenize, "--device", options.device)
    for steps in (10, 20):
        settings = (*second, f'out="{home}/transformer"', f"steps={steps}")
        _maskgit(record, f"transformer to step {steps}", "train", "transformer", *_recipe(home, settings))
    settings = (*second, f'out="{home}/sharded"', "steps=20", "fsdp=true")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    _maskgit(record, "FSDP2 of one process", "train", "transformer", *_recipe(home, settings), launch=launch)


def _recipe(home: Path, settings: tuple[str, ...]) -> tuple[str, ...]:
    """Write a recipe of settings KEY=VALUE and return its path."""
    path = home / "recipe.toml"
    path.write_text("".join(f"{text.replace('=', ' = ', 1)}\n" for text in settings), "utf-8")
    return (str(path),)


def _maskgit(record: Record, what: str, *arguments: str, launch: tuple[str, ...] = ()) -> None:
    """Run the command line in a process of its own and record whether it ended well."""
    command = [sys.executable, *launch, "-m", "maskgit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n")
    record.add(f"{what}: ended well", int(done.returncode == 0), expected=EXACT)


def roofline(options: argparse.Namespace, record: Record) -> None:
    """Make batches of 64 in the fast mode."""
    config = models.SIZES[options.size]()
    device, batch = options.device, options.batch
    model = models.random_model(config).optimize("fast", device=device)
    record.add("engine", json.dumps(model.engine.to_dict() if model.engine else {}))
    rate = images_a_second(model, batch, options.rounds, device)
    record.add(
        "images a second",
        rate,
        expected=expected_images(options.size, device),
        source="arithmetic" if options.size == "256" else "arithmetic for 256, by operations",
    )
    operations = flops.generate(config, config.sampler.steps)
    record.add("operations a second", rate * operations / 1e12, "TFLOP/s")
    peak = known(PEAKS, device)
    if peak is not None:
        record.add("share of the bfloat16 peak", rate * operations / peak[0])
    events = _profile(model, batch, device)
    launches = [event for event in events if not event.key.startswith("Mem")]
    record.add("kernels a batch", sum(event.count for event in launches))
    record.add("copies a batch", sum(event.count for event in events if event.key.startswith("Memcpy")))
    if torch.device(device).type == "cuda":
        record.add("bytes of memory at most", torch.cuda.max_memory_allocated(device) / 2**30, "GiB")


def _profile(model: MaskGIT, batch: int, device: str) -> list[Any]:
    """Return what ran on the device while a batch was made."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.device(device).type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        model.generate([0] * batch, batch_size=batch)
        wait(device)
    return list(profiler.key_averages())


def roofline_512(options: argparse.Namespace, record: Record) -> None:
    """Make batches of 64 of the 512 model in the fast mode."""
    roofline(argparse.Namespace(**vars(options) | {"size": "512"}), record)


def scaling(options: argparse.Namespace, record: Record) -> None:
    """Make batches of 1 to 256, and of sizes that are padded."""
    model = models.random_model(models.SIZES[options.size]()).optimize("fast", device=options.device)
    for batch in options.batches:
        rate = images_a_second(model, batch, options.rounds, options.device)
        expected = expected_images(options.size, options.device) if batch >= BATCH else None
        record.add(f"batch {batch}: images a second", rate, expected=expected, source="as at batch 64")


@torch.no_grad()
def attention(options: argparse.Namespace, record: Record) -> None:
    """Time each way of attention at the model's shape."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    config = models.SIZES[options.size]().transformer
    shape = (options.batch, config.num_heads, config.num_tokens + 1, config.hidden_size // config.num_heads)
    half = torch.bfloat16
    q, k, v = (torch.randn(shape, device=options.device, dtype=half) for _ in range(3))
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ):

        def attend(backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, k, v)

        try:
            times = timing.in_turns({"": timing.clock(attend, options.device)}, 20, warmups=3)[""]
            record.add(backend.name, 1e3 * timing.spread(times)["seconds"], "ms")
        except RuntimeError as error:
            record.add(backend.name, f"not here: {str(error).splitlines()[0][:80]}")


def memory(options: argparse.Namespace, record: Record) -> None:
    """Capture ever more programs and see what each adds."""
    model = models.random_model(models.SIZES[options.size]()).optimize("fast", device=options.device)
    for number, batch in enumerate(options.batches[::-1], 1):
        model.generate([1] * batch, batch_size=batch)
        wait(options.device)
        if torch.device(options.device).type == "cuda":
            reserved = torch.cuda.memory_reserved(options.device) / 2**30
            record.add(f"reserved after {number} programs, the last of batch {batch}", reserved, "GiB")
    model.free_memory()
    if torch.device(options.device).type == "cuda":
        record.add(
            "reserved when they are forgotten", torch.cuda.memory_reserved(options.device) / 2**30, "GiB"
        )


def server(options: argparse.Namespace, record: Record) -> None:
    """Ask the batcher for one image, and for many at once."""
    from maskgit.engine.batching import Batcher, Job
    from maskgit.engine.graphs import fixed_sizes

    model = models.random_model(models.SIZES[options.size]()).optimize("fast", device=options.device)
    batcher = Batcher(model, max_batch=16, sizes=fixed_sizes(16))
    sequence = model.vocabulary.sequence(torch.tensor([1]))[0]

    def finish(count: int) -> None:
        for index in range(count):
            batcher.add(Job(sequence, model.config.sampler, index=index))
        while len(batcher):
            for news in batcher.step():
                if news.error is not None:
                    raise news.error

    for count in (1, 16, 64):
        times = timing.in_turns({"": timing.clock(lambda c=count: finish(c), options.device)}, options.rounds)
        seconds = timing.spread(times[""])["seconds"]
        record.add(f"{count} requests at once: images a second", count / seconds)
        if count == 1:
            record.add("one request alone", 1e3 * seconds, "ms")


def profile(options: argparse.Namespace, record: Record) -> None:
    """Name the kernels that take the most time."""
    model = models.random_model(models.SIZES[options.size]()).optimize("fast", device=options.device)
    for _ in range(2):
        model.generate([0] * options.batch, batch_size=options.batch)
    events = _profile(model, options.batch, options.device)

    def spent(event: Any) -> float:
        cuda = torch.device(options.device).type == "cuda"
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    total = sum(map(spent, events)) or 1.0
    for event in sorted(events, key=spent, reverse=True)[:20]:
        record.add(f"{event.key[:100]} × {event.count}", spent(event) / total)


def synchronization(options: argparse.Namespace, record: Record) -> None:
    """Let nothing wait for the device within decoding, and count what does in training."""
    from maskgit.sampler.loop import decode_steps

    cuda = torch.device(options.device).type == "cuda"
    model = bundled(options.device, "exact")
    for policy in POLICIES:
        config = model.sampler_config(steps=4, policy=policy)
        sequence = model.vocabulary.sequence(torch.tensor([1, 2])).to(options.device)
        noise = ImageNoise(1, torch.arange(2, device=options.device), sequence.shape[1], 512)
        steps = decode_steps(
            model.predict_logits, sequence, config, mask_token=model.vocabulary.mask, noise=noise
        )
        # The first step puts the plan on the device.
        next(steps)
        try:
            with _error_on_waiting() if cuda else nullcontext():
                for _ in steps:
                    pass
            record.add(f"{policy}: waits for nothing", 1, expected=EXACT)
        except RuntimeError as error:
            record.add(f"{policy}: waits for nothing", 0, expected=EXACT, source=str(error)[:80])
    # Only the networks as they were loaded can be trained.
    model = MaskGIT.from_pretrained().to(options.device)
    optimizer = torch.optim.AdamW(model.transformer.parameters(), fused=cuda)
    sequence = model.vocabulary.sequence(torch.tensor([1, 2])).to(options.device)
    model.transformer.train().requires_grad_(True)
    with warnings.catch_warnings(record=True) as waited:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        for _ in range(3):
            loss = model.transformer(sequence).float().logsumexp(-1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
    count = sum("synchroniz" in str(warning.message) for warning in waited)
    record.add("waits in three updates of the transformer", count)


@contextmanager
def _error_on_waiting() -> Any:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _share(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return (made == wanted).float().mean().item()


SECTIONS = (
    Section("environment", 30, environment, "The machine."),
    Section("tokens", 60, tokens, "Noise, tokens and codes are the CPU's."),
    Section(
        "policies", 120, policies, "Captured steps make what uncaptured ones make, beside a busy thread."
    ),
    Section("synchronization", 45, synchronization, "Nothing waits for the device within decoding."),
    Section("training", 120, training, "Both stages train, go on, and shard."),
    Section("roofline-256", 90, roofline, "The 256 model at batch 64."),
    Section("roofline-512", 120, roofline_512, "The 512 model at batch 64."),
    Section("scaling", 120, scaling, "Batches of 1 to 256."),
    Section("attention", 30, attention, "The ways of attention."),
    Section("memory", 90, memory, "What captured programs hold."),
    Section("server", 90, server, "One request, and many."),
    Section("profile", 60, profile, "Where a batch's time goes."),
)


def main() -> None:
    """Run the sections, or one of them as a process of its own."""
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--budget", type=float, default=600, help="seconds for all sections")
    parser.add_argument("--list", action="store_true", help="name the sections and end")
    parser.add_argument("--size", default="256", choices=list(models.SIZES))
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 8, 16, 64, 65, 128, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--section", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        for section in SECTIONS:
            print(f"{section.name:16} {section.seconds:4.0f} s  {section.about}")
        return
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks/gpu.py needs a CUDA GPU, and this torch finds none: run it on a machine that has one, with a "
            "build of torch for CUDA."
        )
    if options.section:
        section = next(section for section in SECTIONS if section.name == options.section)
        section.run(options, Record(options.out / f"{section.name}.json"))
        return
    chosen = [section for section in SECTIONS if section.name in options.only]
    handed = [text for text in sys.argv[1:] if text != "--only"]
    handed = [text for text in handed if text not in names]

    def command(section: Section) -> list[str]:
        return [sys.executable, __file__, *handed, "--section", section.name]

    title = f"GPU: {name_of(options.device)}, torch {torch.__version__}"
    if not run_sections(chosen, command, options.out, budget=options.budget, title=title):
        raise SystemExit(f"Not all sections ended well: see {options.out / 'results.md'}.")


if __name__ == "__main__":
    main()
