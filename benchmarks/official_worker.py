"""The official JAX code as a worker of benchmarks/against_official.py; it runs in a Python of its own.

    python benchmarks/official_worker.py CHECKOUT --size 256 [--device cpu] [--image FILE [--run MODE]]

It works in a folder that holds `checkpoints/`, as the official code does, and leaves the checkout's files
as they are: a name that JAX has dropped is put back, and packages that are imported only for plotting,
downloading and opening files are stood in for where they are not installed. Everything is jitted, the whole
decoding loop included, with the weights as arguments; the official demo jits less. With --image it makes one
image from a fresh start and ends, in one of three run modes:

    jit     as above: the fastest that we found for it.
    normal  the demo's default: operation by operation.
    pmap    the demo's other one, which it recommends where there is memory; it compiles, weights included.
"""

import argparse
import importlib.machinery
import importlib.util
import os
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import workers

STEPS = 8
CODES = 1024


def installed(name: str) -> bool:
    """Return whether this Python has a package."""
    return importlib.util.find_spec(name) is not None


# What the official code imports at its top and needs only for plotting, downloading and opening files.
STOOD_IN = (
    ("requests",),
    ("matplotlib", "matplotlib.pyplot", "matplotlib.patches"),
    ("tensorflow", "tensorflow.compat", "tensorflow.compat.v1"),
)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Stand in for packages that are not installed, as long as the official code is imported.

    Later they would deceive the libraries that ask whether one is there.
    """
    made: list[str] = []
    for names in STOOD_IN:
        if installed(names[0]):
            continue
        for name in names:
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            made.append(name)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, sys.modules[name])
    if "tensorflow" in made:
        gfile = types.SimpleNamespace(GFile=open)
        sys.modules["tensorflow.compat.v1"].io = types.SimpleNamespace(gfile=gfile)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def import_official(checkout: Path) -> types.ModuleType:
    """Return the official module `inference`, made to run with today's JAX and this Python."""
    # What asks for TensorFlow when it is imported comes before the stand-ins.
    import flax  # noqa: F401
    import jax
    import jax.numpy as jnp

    jnp.DeviceArray = jax.Array  # type: ignore[attr-defined]
    # A folder without __init__.py, which a package of this name elsewhere on the path, ours, would hide.
    package = types.ModuleType("maskgit")
    package.__path__ = [str(checkout / "maskgit")]
    sys.modules["maskgit"] = package
    with stand_ins():
        return importlib.import_module("maskgit.inference")


class Official:
    """The official generator, jitted."""

    def __init__(self, checkout: Path, size: int) -> None:
        import jax

        inference = import_official(checkout)
        self.generator = inference.ImageNet_class_conditional_generator(image_size=size)
        self.generator.transformer_variables = jax.device_put(self.generator.transformer_variables)
        self.generator.tokenizer_variables = jax.device_put(self.generator.tokenizer_variables)
        self.weights = self.generator.transformer_variables, self.generator.tokenizer_variables
        self.jitted = {
            name: jax.jit(getattr(self, name)) for name in ("forward", "decode", "encode", "image8")
        }
        self.inputs: dict[tuple[str, int], tuple[Any, ...]] = {}

    def forward(self, weights: Any, sequence: Any) -> Any:
        """Logits of a sequence: int32 (B, N + 1), −1 where masked → float32 (B, N + 1, codes)."""
        return self.generator.transformer_model.apply(weights[0], sequence, deterministic=True)[..., :CODES]

    def decode(self, weights: Any, tokens: Any) -> Any:
        """Images of tokens: int32 (B, h, w) → float32 (B, H, W, 3)."""
        model = self.generator.tokenizer_model
        return model.apply(weights[1], tokens, method=model.decode_from_indices, mutable=False)

    def encode(self, weights: Any, image: Any) -> Any:
        """Tokens of images: float32 (B, H, W, 3) in [0, 1] → int32 (B, h, w)."""
        model = self.generator.tokenizer_model
        return model.apply(weights[1], {"image": image}, method=model.encode_to_indices, mutable=False)

    def image8(self, weights: Any, sequence: Any, key: Any) -> Any:
        """Images and their tokens, by the official `generate_samples`."""
        from maskgit.libml import parallel_decode

        made, decode = [], parallel_decode.decode

        def kept(*arguments: Any, **options: Any) -> Any:
            made.append(decode(*arguments, **options))
            return made[-1]

        # The weights are arguments of the jitted function: as constants they would be folded into it.
        self.generator.transformer_variables, self.generator.tokenizer_variables = weights
        parallel_decode.decode = kept
        try:
            images = self.generator.generate_samples(sequence, key, num_iterations=STEPS)
        finally:
            parallel_decode.decode = decode
        return images, made[0][:, -1, 1:]

    def arguments(self, name: str, inputs: dict[str, Any]) -> tuple[Any, ...]:
        """Return what a jitted function takes, on the device."""
        import jax
        import jax.numpy as jnp

        if name == "image8":
            labels = jnp.asarray(inputs["labels"], jnp.int32)
            blank = jnp.full((len(labels), self.generator.transformer_block_size - 1), -1, jnp.int32)
            sequence = jnp.concatenate([labels[:, None] + CODES, blank], axis=1)
            return sequence, jax.random.PRNGKey(int(inputs["seed"]))
        kind = {"forward": "sequence", "decode": "tokens", "encode": "image"}[name]
        return (jax.device_put(inputs[kind]),)

    def run(self, name: str, batch: int) -> Any:
        """Run a prepared function and bring what it makes to the host."""
        import jax

        return jax.device_get(self.jitted[name](self.weights, *self.inputs[name, batch]))

    def from_start(self, run: str) -> Any:
        """Return one image in [0, 1], float32 (1, H, W, 3), in a run mode of the command line."""
        import jax
        import numpy as np

        self.inputs["image8", 1] = self.arguments("image8", {"labels": np.array([1]), "seed": 0})
        sequence, key = self.inputs["image8", 1]
        if run == "jit":
            return self.run("image8", 1)[0]
        if run == "normal":
            return jax.device_get(self.generator.generate_samples(sequence, key, num_iterations=STEPS))
        mapped = self.generator.p_generate_samples(num_iterations=STEPS)
        return jax.device_get(mapped(sequence[None], key[None]))[0]


def noise(key: Any, batch: int, positions: int) -> dict[str, Any]:
    """Return the Gumbel noise that the official decoder draws from a key, for T steps.

    Returns:
        `gumbel_tokens` float32 (T, B, N + 1, codes) and `gumbel_choice` float32 (T, B, N + 1).
    """
    import jax
    import numpy as np

    tokens, choice = [], []
    for _ in range(STEPS):
        key, drawn = jax.random.split(key, 2)
        tokens.append(np.asarray(jax.random.gumbel(drawn, (batch, positions, CODES))))
        key, drawn = jax.random.split(key)
        choice.append(np.asarray(jax.random.gumbel(drawn, (batch, positions))))
    return {"gumbel_tokens": np.stack(tokens), "gumbel_choice": np.stack(choice)}


def handlers(official: Official) -> dict[str, Any]:
    """Return what the worker can be asked for."""
    import flax
    import jax
    import numpy as np

    def describe() -> dict[str, Any]:
        return {
            "jax": jax.__version__,
            "flax": flax.__version__,
            "device": str(jax.devices()[0]),
            "tensorflow": installed("tensorflow"),
            "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        }

    def prepare(name: str, batch: int, inputs: str, mode: str) -> dict[str, Any]:
        start = time.perf_counter()
        official.inputs[name, batch] = official.arguments(name, dict(np.load(inputs)))
        official.run(name, batch)
        return {"seconds": time.perf_counter() - start}

    def timed(name: str, batch: int, mode: str) -> dict[str, Any]:
        start = time.perf_counter()
        official.run(name, batch)
        return {"seconds": time.perf_counter() - start}

    def outputs(name: str, batch: int, mode: str, path: str) -> dict[str, Any]:
        made = official.run(name, batch)
        if name == "image8":
            sequence, key = official.inputs[name, batch]
            record = {"images": made[0], "tokens": made[1]} | noise(key, *sequence.shape)
        else:
            record = {{"forward": "logits", "decode": "images", "encode": "tokens"}[name]: made}
        np.savez(path, **record)
        return {}

    return {"describe": describe, "prepare": prepare, "time": timed, "outputs": outputs}


def main() -> None:
    """Serve, or make one image."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--run", default="jit", choices=["jit", "normal", "pmap"])
    options = parser.parse_args()
    if not (options.checkout / workers.OFFICIAL).is_file():
        parser.error(workers.NO_CHECKOUT.format(options.checkout))
    os.environ["JAX_PLATFORMS"] = options.device
    # The GPU's memory is shared with the other side.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # XLA warns of each constant that it takes more than a second to fold.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    official = Official(options.checkout.resolve(), options.size)
    if options.image is None:
        workers.serve(handlers(official))
        return
    import numpy as np
    from PIL import Image

    images = official.from_start(options.run)
    Image.fromarray((np.clip(images[0], 0, 1) * 255).round().astype(np.uint8)).save(options.image)


if __name__ == "__main__":
    main()
