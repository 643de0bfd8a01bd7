"""How a model runs fast: types, packed and int8 weights, layouts, compilation, CUDA graphs.

`MaskGIT.optimize` returns a model that shares the weights of the one it was made from and computes the same
function, in the mode that is asked for:

    exact   float32; the same tokens as the plain networks.
    fast    the fastest of what the device is good at: bfloat16, compiled and captured on a GPU; bfloat16 or
            int8 on a CPU, whichever a first measurement finds faster.
    int8    int8 linear layers, on a CPU.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from maskgit.engine import probe
from maskgit.engine.convolution import can_pack, prepare_convolutions
from maskgit.engine.folding import fold_biases, replace_gelus
from maskgit.engine.graphs import GraphedSteps
from maskgit.engine.host import keep_freed_memory
from maskgit.engine.layers import FIXED_ROWS, PATHS, replace_linears, ways
from maskgit.engine.masked import MaskedPredictor
from maskgit.errors import ConfigError
from maskgit.foundation.checks import Config, check_choice
from maskgit.foundation.compiled import Compiled
from maskgit.foundation.devices import Device, Dtype, choose_device, choose_dtype
from maskgit.model import AnyModel, plain_model

MODES = ("exact", "fast", "int8")
DTYPES = ("float32", "bfloat16", "float16")
# Graphs are captured by `engine.graphs`, so the compiler is not to do it, too.
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "cuda": {"mode": "max-autotune-no-cudagraphs"},
    "cpu": {"options": {"freezing": True}},
    "mps": {},
}


@dataclass(frozen=True)
class Engine(Config):
    """How a model runs.

    Attributes:
        device: cpu, cuda, cuda:1, mps, …
        dtype: float32, bfloat16 or float16, that the networks compute in.
        quantize: "" or "int8": the transformer's linear layers.
        linear: the way of the other linear layers on a CPU, a key of `engine.linear.PATHS`.
        compile: whether `torch.compile` builds the networks; takes a minute at first use, and a C++ compiler.
        graphs: whether decoding steps are captured as CUDA graphs.
    """

    device: str = "cpu"
    dtype: str = "float32"
    quantize: str = ""
    linear: str = "torch"
    compile: bool = False
    graphs: bool = False

    def numbers(self) -> dict[str, Any]:
        """Return what of it decides the last bits of numbers, as JSON values: all but which device it is."""
        values = {key: value for key, value in self.to_dict().items() if key != "device"}
        # Once a choice. Evaluations that were begun with it compare what they stored with this.
        return values | {"reuse": 1}

    def validate(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("quantize", self.quantize, ("", "int8"))
        kind = torch.device(self.device).type
        if self.quantize and kind != "cpu":
            raise ConfigError("int8 is for CPUs; on a GPU use bfloat16 (fast).")
        if self.quantize and self.dtype != "float32":
            raise ConfigError(f"int8 layers take and give float32, so the dtype cannot be {self.dtype}.")
        if self.quantize and "int8" not in ways(torch.float32):
            raise ConfigError("This build of torch has no int8 products; use the exact or the fast mode.")
        if self.graphs and kind != "cuda":
            raise ConfigError("CUDA graphs need a CUDA device.")


def choose(mode: str = "fast", **choices: Any) -> Engine:
    """Return how a model should run: of the `alternatives` the one that was measured to be the fastest here.

    Args:
        mode: exact, fast or int8.
        **choices: as for `alternatives`.

    Raises:
        ConfigError: a choice is unknown, not available here, or does not go with another.
    """
    found = alternatives(mode, **choices)
    if len(found) == 1:
        return found[0]
    times = probe.measured()

    def seconds(engine: Engine) -> float:
        if engine.quantize:
            # Where they are close, bfloat16 and float32 are the more accurate.
            return times["int8 int8"] / 0.8
        if not engine.compile:
            return times[f"{engine.dtype} {engine.linear}"]
        return min(time for name, time in times.items() if name.startswith(f"{engine.dtype} "))

    return min(found, key=seconds)


def alternatives(
    mode: str = "fast",
    *,
    device: Device = "auto",
    dtype: Dtype | None = None,
    compile: bool | None = None,
    quantize: str | None = None,
    linear: str | None = None,
) -> list[Engine]:
    """Return the ways to run a model that are open here; what is None is the mode's choice.

    Which of them is the fastest is measured, so that it may differ between machines and numbers of threads; all
    else is the same everywhere.

    Args:
        mode: exact, fast or int8.
        device: "auto" takes CUDA, else MPS, else the CPU.
        dtype: a type or its name; "auto" is the mode's choice, too.
        compile: whether to use `torch.compile`.
        quantize: "int8" or "" (no).
        linear: the way of linear layers on a CPU, a key of `engine.linear.PATHS`.

    Raises:
        ConfigError: a choice is unknown, not available here, or does not go with another.
    """
    check_choice("mode", mode, MODES)
    # A device that a plan names need not be here.
    chosen = device if isinstance(device, torch.device) else choose_device(device)
    kind = chosen.type
    asked = choose_dtype(dtype)
    named = None if asked is None else str(asked).removeprefix("torch.")
    if named is not None:
        check_choice("dtype", named, DTYPES)
    fast = mode == "fast"
    if compile is None:
        compile = fast and kind == "cuda"
    forms = _forms(kind, named, fast, "int8" if mode == "int8" and quantize is None else quantize)
    graphs = fast and kind == "cuda"
    found = []
    for form, quantized in forms:
        # The compiler packs weights itself.
        packs = kind == "cpu" and form != "float16" and not quantized and not compile
        open_ways = [way for way in ways(getattr(torch, form)) if way != "int8"] if packs else ["torch"]
        if linear is not None:
            check_choice("linear", linear, [name for name in PATHS if name != "int8"])
            open_ways = [way for way in open_ways if way == linear]
        found += [Engine(str(chosen), form, quantized, way, compile, graphs) for way in open_ways]
    if not found:
        layers = f"{named or 'float32'}{', compiled' if compile else ''}"
        raise ConfigError(f"Linear layers of {layers} cannot go the way {linear!r} on this machine's {kind}.")
    return found


def _forms(kind: str, dtype: str | None, fast: bool, quantize: str | None) -> list[tuple[str, str]]:
    """Return the pairs of a number type and a quantization that a device may be the fastest with."""
    if dtype is not None or quantize or not fast:
        return [(dtype or "float32", quantize or "")]
    if kind == "cuda":
        return [("bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32", "")]
    if kind != "cpu":
        return [("float32", "")]
    found = [("float32", ""), ("bfloat16", "")]
    return found + [("float32", "int8")] * (quantize is None and "int8" in ways(torch.float32))


def optimize(model: AnyModel, mode: str = "fast", **choices: Any) -> AnyModel:
    """Return the model made ready to run fast; the one it is made from stays as it is.

    Weights that need not change are shared. The returned model is for running: with bfloat16, float16 or int8
    weights it is not the one to save.

    Args:
        model: as it was loaded.
        mode: "exact", "fast" or "int8".
        **choices: as for `alternatives`, in place of the mode's own; the device is the model's if none is given.

    Returns:
        A `MaskGIT` whose `engine` says how it runs.

    Raises:
        ConfigError: a choice is unknown, not available here, or does not go with another; or the model was
            optimized before.
    """
    if choices.get("device") is None:
        choices["device"] = model.device
    return build(model, choose(mode, **choices))


def build(model: AnyModel, engine: Engine) -> AnyModel:
    """Return the model made to run as an engine says; see `optimize`.

    Raises:
        ConfigError: the model was optimized before, or this machine cannot run it so.
    """
    if model.engine is not None:
        raise ConfigError("This model is optimized already; optimize the one that it was made from.")
    model = plain_model(model)
    form: torch.dtype = getattr(torch, engine.dtype)
    if engine.device == "cpu" and (engine.quantize or engine.linear) not in ways(form):
        raise ConfigError(
            f"This machine has no {engine.quantize or engine.linear!r} products of {engine.dtype}, which the engine asks for."
        )
    made = type(model)(model.config, _shared(model.tokenizer), _shared(model.transformer))
    made.to(torch.device(engine.device), form)
    if engine.device == "cpu":
        keep_freed_memory()
        if engine.dtype == "float32" and engine.linear != "onednn" and not engine.compile:
            shape = made.config.transformer
            if not engine.quantize and shape.block == "official" and shape.activation == "gelu_tanh":
                fold_biases(made.transformer)
            replace_gelus(made.transformer)
        if engine.linear in FIXED_ROWS:
            made.local_transformer = _shared(made.transformer)
        # The last layers, small and close to the logits, stay as they are in int8.
        replace_linears(
            made.transformer.layers if engine.quantize else made.transformer, engine.quantize or engine.linear
        )
    # On a GPU channels last pays in half precision, and there only where the compiler joins the norms between.
    if engine.device == "cpu" or (engine.compile and engine.dtype != "float32"):
        pack = engine.device == "cpu" and form != torch.float16 and not engine.compile and can_pack(form)
        prepare_convolutions(made.tokenizer, pack=pack)
    if engine.compile:
        for network in (made.transformer, made.tokenizer.decoder, made.tokenizer.encoder):
            options = COMPILE_OPTIONS[torch.device(engine.device).type]
            network.forward = Compiled(network.forward, **options)  # type: ignore[method-assign]
    elif engine.device == "cpu" and len(made.transformer.layers) > 1:
        made.masked_predictor = MaskedPredictor(
            made.transformer,
            made.local_transformer,
            codes=made.config.transformer.num_logits,
            mask_token=made.vocabulary.mask,
            remember=engine.dtype == "float32",
        )
    if engine.graphs:
        made.decode_step = GraphedSteps(compile_noise=engine.compile)
    if model.guide is not None:
        made.guide = build(model.guide, engine)
    made.engine = engine
    return made


def _shared(module: nn.Module) -> Any:
    """Return a copy of a network for evaluation whose parameters share their memory with the network's."""
    # New parameters, for moving a module changes its parameters in place.
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo).eval()
