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
from torch import Tensor, nn

from maskgit.engine import host
from maskgit.engine.graphs import GraphedSteps
from maskgit.engine.layers import (
    FIXED_ROWS,
    PATHS,
    BiasedStart,
    FoldedLayer,
    MergedUpsample,
    OneDnnLinear,
    PackedConvolution,
    PackedResBlock,
    PiecewiseGelu,
    can_pack,
    ways,
)
from maskgit.engine.masked import MaskedPredictor
from maskgit.errors import ConfigError
from maskgit.foundation.checks import Config, check_choice
from maskgit.foundation.compiled import Compiled
from maskgit.foundation.devices import Device, Dtype, choose_device, choose_dtype
from maskgit.model import AnyModel, plain_model
from maskgit.networks.tokenizer import Downsample, ResBlock, Upsample
from maskgit.networks.transformer import Layer, Transformer

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
        linear: the way of the other linear layers on a CPU, a key of `engine.layers.PATHS`.
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
    times = host.measured()

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
        linear: the way of linear layers on a CPU, a key of `engine.layers.PATHS`.

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
        host.keep_freed_memory()
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


def replace_linears(module: nn.Module, path: str) -> None:
    """Let every linear layer of a network go one way, in place."""
    make = PATHS[path][1]
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            replace_linears(child, path)
        # oneDNN has a tanh-GELU for nothing.
        elif (
            path == "onednn" and name in ("up", "dense") and is_tanh_gelu(getattr(module, "activation", None))
        ):
            setattr(module, name, OneDnnLinear.of(child, gelu=True))
            module.activation = nn.Identity()
        else:
            setattr(module, name, make(child))


def replace_gelus(module: nn.Module) -> None:
    """Compute every tanh-GELU of a network in place and in pieces."""
    for name, child in module.named_children():
        if is_tanh_gelu(child):
            setattr(module, name, PiecewiseGelu())
        else:
            replace_gelus(child)


def is_tanh_gelu(module: nn.Module | None) -> bool:
    """Return whether a module is the GELU that has a fast form."""
    return isinstance(module, nn.GELU) and module.approximate == "tanh"


@torch.no_grad()
def fold_biases(transformer: Transformer) -> None:
    """Take the biases of a transformer's layers out of their products, in place; weights stay as they are.

    A linear layer writes its bias into its output before it multiplies, a pass that costs 4 % of a forward.

    - That of `mlp.up` is added by its GELU.
    - That of `mlp.down` is added to the residual stream by the norm before, and `mlp.up` takes it off again.
    - Of that of `attention.qkv`, the queries' is added in place. The keys' adds the same to all scores of a
      query, so it does nothing. The values' goes through `attention.out` as it is, for what a query pays attention
      to sums to 1, so it becomes part of the bias there, which stays.
    """
    for number, layer in enumerate(transformer.layers):
        assert isinstance(layer, Layer), "not replaced yet"
        transformer.layers[number] = FoldedLayer(layer)
        attention, mlp = layer.attention, layer.mlp
        queries, _, values = attention.qkv.bias.chunk(3)
        attention.out.bias = _folded(attention.out.bias, attention.out.weight, values)
        attention.qkv.register_parameter("bias", None)
        attention.add_module("qkv", BiasedStart(attention.qkv, queries))
        attention.norm.bias = _frozen(attention.norm.bias + mlp.down.bias)
        up_bias = _folded(mlp.up.bias, mlp.up.weight, -mlp.down.bias)
        mlp.add_module("activation", PiecewiseGelu(up_bias))
        for linear in (mlp.up, mlp.down):
            linear.register_parameter("bias", None)


def _folded(bias: Tensor, weight: Tensor, added: Tensor) -> nn.Parameter:
    """Return the bias of a layer whose inputs are to have something added."""
    return _frozen(bias.double() + weight.double() @ added.double())


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.float(), requires_grad=False)


def prepare_convolutions(module: nn.Module, *, pack: bool) -> None:
    """Lay a network's convolutions out with channels last, merge its up-samplings, and swish in place.

    Args:
        module: is changed in place.
        pack: whether oneDNN packs the weights; for float32 and bfloat16 on a CPU, without compilation.
    """
    if not pack:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _replace_convolutions(module, pack)


def _replace_convolutions(module: nn.Module, pack: bool) -> None:
    for name, child in module.named_children():
        if isinstance(child, Upsample):
            setattr(module, name, MergedUpsample(child, packed=pack))
        elif isinstance(child, nn.SiLU):
            # Its input is always a norm's output, which nothing else reads.
            setattr(module, name, nn.SiLU(inplace=True))
        elif pack and isinstance(child, nn.Conv2d):
            # A downsampling of kernel 3 pads at the right and below alone.
            pads = isinstance(child, Downsample) and not child.padding[0]
            setattr(module, name, PackedConvolution.of(child, pads=pads))
        else:
            _replace_convolutions(child, pack)
            if pack and isinstance(child, ResBlock):
                setattr(module, name, PackedResBlock(child))
