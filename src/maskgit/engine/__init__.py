"""How a model runs fast: types, packed and int8 weights, layouts, compilation, CUDA graphs.

`MaskGIT.optimize` returns a model that shares the weights of the one it was made from and computes the same
function, in the mode that is asked for:

    exact   float32; the same tokens as the plain networks.
    fast    the fastest of what the device is good at: bfloat16, compiled and captured on a GPU; bfloat16 or
            int8 on a CPU, whichever a first measurement finds faster.
    int8    int8 linear layers, on a CPU.

Beside a mode, decoding may reuse what it computed of known tokens (`engine.reuse`), which is approximate.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from maskgit.checks import check_choice, check_count, check_range
from maskgit.config import Config
from maskgit.devices import Device, Dtype, choose_device, choose_dtype
from maskgit.engine import probe
from maskgit.engine.convolution import can_pack, prepare_convolutions
from maskgit.engine.folding import fold_biases, replace_gelus
from maskgit.engine.graphs import GraphedSteps
from maskgit.engine.host import keep_freed_memory
from maskgit.engine.linear import FIXED_ROWS, has_int8, replace_linears
from maskgit.engine.masked import MaskedPredictor
from maskgit.errors import ConfigError

if TYPE_CHECKING:
    from maskgit.pipeline import MaskGIT

MODES = ("exact", "fast", "int8")
DTYPES = ("float32", "bfloat16", "float16")
MAX_REUSE = 256
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
        reuse: of so many evaluations in decoding one at least is full (see `engine.reuse`); 1 is all of them.
    """

    device: str = "cpu"
    dtype: str = "float32"
    quantize: str = ""
    linear: str = "torch"
    compile: bool = False
    graphs: bool = False
    reuse: int = 1

    def validate(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("quantize", self.quantize, ("", "int8"))
        kind = torch.device(self.device).type
        if self.quantize and kind != "cpu":
            raise ConfigError("int8 is for CPUs; on a GPU use bfloat16 (fast).")
        if self.quantize and self.dtype != "float32":
            raise ConfigError(f"int8 layers take and give float32, so the dtype cannot be {self.dtype}.")
        if self.quantize and not has_int8():
            raise ConfigError("This build of torch has no int8 products; use the exact or the fast mode.")
        if self.graphs and kind != "cuda":
            raise ConfigError("CUDA graphs need a CUDA device.")
        check_range("reuse", self.reuse, 1, MAX_REUSE)
        if self.graphs and self.reuse > 1:
            raise ConfigError(
                "CUDA graphs repeat the same work at every step, which reuse does not; choose one of them."
            )


def choose(
    mode: str = "fast",
    *,
    device: Device = "auto",
    dtype: Dtype | None = None,
    compile: bool | None = None,
    quantize: str | None = None,
    reuse: int = 1,
) -> Engine:
    """Return how a model should run; what is None is the mode's choice.

    Args:
        mode: exact, fast or int8.
        device: "auto" takes CUDA, else MPS, else the CPU.
        dtype: a type or its name; "auto" is the mode's choice, too.
        compile: whether to use `torch.compile`.
        quantize: "int8" or "" (no).
        reuse: of so many evaluations in decoding one at least is full; above 1 there are no CUDA graphs.

    Raises:
        ConfigError: a choice is unknown, not available here, or does not go with another.
    """
    check_choice("mode", mode, MODES)
    reuse = check_count("reuse", reuse, 1, MAX_REUSE)
    chosen = choose_device(device)
    kind = chosen.type
    asked = choose_dtype(dtype)
    named = None if asked is None else str(asked).removeprefix("torch.")
    if named is not None:
        check_choice("dtype", named, DTYPES)
    if quantize is None:
        quantize = (
            "int8" if mode == "int8" or (mode == "fast" and named is None and _prefers_int8(kind)) else ""
        )
    if named is None:
        named = "bfloat16" if mode == "fast" and not quantize and _is_fast_in_bfloat16(kind) else "float32"
    if compile is None:
        compile = mode == "fast" and kind == "cuda"
    # The compiler packs weights itself.
    packs = kind == "cpu" and named != "float16" and not quantize and not compile
    return Engine(
        device=str(chosen),
        dtype=named,
        quantize=quantize,
        linear=probe.fastest(named) if packs else "torch",
        compile=compile,
        graphs=mode == "fast" and kind == "cuda" and reuse == 1,
        reuse=reuse,
    )


def _is_fast_in_bfloat16(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    times = probe.measured()
    return times[f"bfloat16 {probe.fastest('bfloat16')}"] < times[f"float32 {probe.fastest('float32')}"]


def _prefers_int8(kind: str) -> bool:
    if kind != "cpu" or not has_int8():
        return False
    times = probe.measured()
    others = min(times[f"{dtype} {probe.fastest(dtype)}"] for dtype in probe.DTYPES)
    # Where they are close, bfloat16 and float32 are the more accurate.
    return times.get("int8 int8", float("inf")) < 0.8 * others


def optimize(
    model: "MaskGIT",
    mode: str = "fast",
    *,
    device: Device | None = None,
    dtype: Dtype | None = None,
    compile: bool | None = None,
    quantize: str | None = None,
    reuse: int = 1,
) -> "MaskGIT":
    """Return the model made ready to run fast; the one it is made from stays as it is.

    Weights that need not change are shared. The returned model is for running: with bfloat16, float16 or int8
    weights it is not the one to save.

    Args:
        mode: "exact", "fast" or "int8".
        device: where to run; None stays where the model is.
        dtype: float32, bfloat16 or float16 in place of the mode's choice.
        compile: whether `torch.compile` builds the networks, in place of the mode's choice.
        quantize: "int8" or "" in place of the mode's choice.
        reuse: above 1, decoding is approximate: of so many evaluations in a row one at least is full, and the
            others compute only tokens that are masked or new (`engine.reuse`).

    Returns:
        A `MaskGIT` whose `engine` says how it runs.

    Raises:
        ConfigError: a choice is unknown, not available here, or does not go with another; or the model was
            optimized before.
    """
    from maskgit.pipeline import MaskGIT, plain_model

    if model.engine is not None:
        raise ConfigError("This model is optimized already; optimize the one that it was made from.")
    model = plain_model(model)
    engine = choose(
        mode,
        device=model.device if device is None else device,
        dtype=dtype,
        compile=compile,
        quantize=quantize,
        reuse=reuse,
    )
    made = MaskGIT(model.config, _shared(model.tokenizer), _shared(model.transformer))
    made.to(torch.device(engine.device), getattr(torch, engine.dtype))
    if engine.device == "cpu":
        keep_freed_memory()
        if engine.dtype == "float32" and engine.linear != "onednn" and not engine.compile:
            if not engine.quantize:
                fold_biases(made.transformer)
            replace_gelus(made.transformer)
        if engine.linear in FIXED_ROWS:
            made.local_transformer = _shared(made.transformer)
        # The last layers, small and close to the logits, stay as they are in int8.
        replace_linears(
            made.transformer.layers if engine.quantize else made.transformer, engine.quantize or engine.linear
        )
    # Channels last pays for convolutions everywhere; where the device is a GPU, in half precision.
    if engine.device == "cpu" or engine.dtype != "float32":
        kind: torch.dtype = getattr(torch, engine.dtype)
        pack = engine.device == "cpu" and kind != torch.float16 and not engine.compile and can_pack(kind)
        prepare_convolutions(made.tokenizer, pack=pack)
    if engine.device.startswith("cuda") and mode == "exact":
        # On by default, and three digits short of float32; set for the whole process, as torch has it.
        torch.backends.cudnn.allow_tf32 = False
    if engine.compile:
        for network in (made.transformer, made.tokenizer.decoder, made.tokenizer.encoder):
            network.compile(**COMPILE_OPTIONS[torch.device(engine.device).type])
    elif engine.device == "cpu" and engine.reuse == 1 and len(made.transformer.layers) > 1:
        made.masked_predictor = MaskedPredictor(
            made.transformer,
            made.local_transformer,
            codes=made.vocabulary.num_codes,
            mask_token=made.vocabulary.mask,
            remember=engine.dtype == "float32",
        )
    if engine.graphs:
        made.decode_step = GraphedSteps(compile_noise=engine.compile)
    made.engine = engine
    return made


def _shared(module: nn.Module) -> Any:
    """Return a copy of a network for evaluation whose parameters share their memory with the network's."""
    # New parameters, for moving a module changes its parameters in place.
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo).eval()
