"""Networks as files that run without this package: ONNX graphs, and AOTInductor's compiled packages.

    DIR/config.json        the model's config, its vocabulary, and the names and measured error of the files
    DIR/transformer.onnx   sequence: int64 (B, S) → logits: float32 (B, S, K), of the image codes
    DIR/decoder.onnx       tokens: int64 (B, h, w) → images: float32 (B, 3, H, W), nominally in [0, 1]
    DIR/encoder.onnx       images: float32 (B, 3, H, W) in [0, 1] → tokens: int64 (B, h, w)

or the same with .pt2. The batch B is free. Every file is run by its own runtime and compared with the network
before the folder appears.

Shapes: B batch, S = N + 1 the sequence with its class token, K codes, h × w the token grid, H × W pixels.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from maskgit.errors import CheckpointError, ConfigError, OutputError, install_extra, unknown_name
from maskgit.foundation import __version__
from maskgit.foundation.files import expand, write_folder, write_json
from maskgit.foundation.notes import bar
from maskgit.model import plain_model
from maskgit.pipeline import MaskGIT

CONFIG = "config.json"
# Protobuf ends at 2 GiB; weights of a larger ONNX graph lie beside it.
MAX_ONNX_BYTES = 3 * 2**29
EXTERNAL = ".data"
# Traced with one batch, checked with others: a batch that was fixed by mistake would show.
TRACED_BATCH, CHECKED_BATCHES = 2, (1, 3)
# The largest error allowed, as a share of the largest value: float32 is some 1e-5 off, a wrong graph about 1.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}

Run = Callable[[Tensor], Tensor]


class Difference(NamedTuple):
    """How far a file's output is from the network's.

    Attributes:
        error: the largest difference.
        scale: the largest value that the network gave.
    """

    error: float
    scale: float


class Part(nn.Module):
    """A function of one tensor, made of a part of the model.

    Class attributes:
        input, output: the tensors' names.
    """

    input: ClassVar[str]
    output: ClassVar[str]

    def example(self, batch: int) -> Tensor:
        """Return inputs to trace and check with; the same at every call."""
        raise NotImplementedError

    @torch.no_grad()
    def difference(self, inputs: Tensor, outputs: Tensor) -> Difference:
        """Compare what a runtime made of inputs with what the network makes of them."""
        expected = self(inputs)
        if outputs.shape != expected.shape:
            return Difference(torch.inf, 0)
        return Difference(float((outputs - expected).abs().max()), float(expected.abs().max()))


class PredictLogits(Part):
    """sequence → logits."""

    input, output = "sequence", "logits"

    def __init__(self, pipe: MaskGIT) -> None:
        super().__init__()
        self.vocabulary = pipe.vocabulary
        self.transformer = pipe.transformer

    def forward(self, sequence: Tensor) -> Tensor:
        return self.transformer(sequence, codes=self.vocabulary.num_codes).float()

    def example(self, batch: int) -> Tensor:
        numbers, side = _numbers(), self.vocabulary.grid_size
        labels = torch.arange(batch) % self.vocabulary.num_classes
        tokens = torch.randint(self.vocabulary.image_codes, (batch, side, side), generator=numbers)
        masks = torch.rand(batch, side, side, generator=numbers) < 0.5
        return self.vocabulary.sequence(labels, tokens, masks)


class DecodeTokens(Part):
    """tokens → images."""

    input, output = "tokens", "images"

    def __init__(self, pipe: MaskGIT) -> None:
        super().__init__()
        self.vocabulary = pipe.vocabulary
        self.quantizer = pipe.tokenizer.quantizer
        self.decoder = pipe.tokenizer.decoder

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.quantizer.embed(tokens)).float()

    def example(self, batch: int) -> Tensor:
        shape = (batch, self.vocabulary.grid_size, self.vocabulary.grid_size)
        return torch.randint(self.vocabulary.image_codes, shape, generator=_numbers())


class EncodeImages(Part):
    """images → tokens."""

    input, output = "images", "tokens"

    def __init__(self, pipe: MaskGIT) -> None:
        super().__init__()
        self.image_size = pipe.config.image_size
        self.dtype = pipe.tokenizer.dtype
        self.encoder = pipe.tokenizer.encoder
        self.quantizer = pipe.tokenizer.quantizer

    def forward(self, images: Tensor) -> Tensor:
        return self.quantizer.tokens(self.encoder(images.to(self.dtype)))

    def example(self, batch: int) -> Tensor:
        return torch.rand(batch, 3, self.image_size, self.image_size, generator=_numbers())

    @torch.no_grad()
    def difference(self, inputs: Tensor, outputs: Tensor) -> Difference:
        """Compare distances: how much farther the codes of `outputs` are than the nearest.

        Where two codes are nearly as near, rounding decides between them, and neither is wrong.
        """
        distances = self.quantizer.distances(self.encoder(inputs.to(self.dtype)))
        fits = outputs.shape == distances.shape[:-1] and outputs.dtype == torch.int64
        if not fits or not bool(((outputs >= 0) & (outputs < distances.shape[-1])).all()):
            return Difference(torch.inf, 0)
        chosen = distances.gather(-1, outputs[..., None])[..., 0]
        return Difference(float((chosen - distances.amin(-1)).max()), float(distances.max()))


def _numbers() -> torch.Generator:
    return torch.Generator().manual_seed(0)


PARTS: dict[str, type[Part]] = {
    "transformer": PredictLogits,
    "decoder": DecodeTokens,
    "encoder": EncodeImages,
}


class Format(NamedTuple):
    """A way to keep a network.

    Attributes:
        suffix: of the files.
        packages: to be installed for it.
        write: (part, an example of its input, path); writes the file.
        load: path → what runs it.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[Part, Tensor, Path], None]
    load: Callable[[Path], Run]


def _write_onnx(part: Part, example: Tensor, path: Path) -> None:
    program = torch.onnx.export(
        part,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=[part.input],
        output_names=[part.output],
        dynamic_shapes=({0: "batch"},),
    )
    assert program is not None, "asked for a program, not a file"
    # Each node comes with the traceback that made it: paths of this machine, which are nobody's business.
    for node in program.model.graph:
        node.metadata_props.clear()
    program.save(path, external_data=_num_bytes(part) > MAX_ONNX_BYTES)


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (node.name for node in session.get_inputs())
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.cpu().numpy()})[0])


def _write_aoti(part: Part, example: Tensor, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    # Traced outside the `try`: what fails there is not the compiler's doing.
    program = torch.export.export(part, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    try:
        aoti_compile_and_package(program, package_path=str(path))
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"The {path.stem} could not be compiled ({reason}). AOTInductor needs a working C++ "
            "compiler: install g++, name yours in the environment variable CXX, or export with --format onnx."
        ) from error


def _load_aoti(path: Path) -> Run:
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx),
    "aoti": Format(".pt2", (), _write_aoti, _load_aoti),
}


class Exported(NamedTuple):
    """A file that was written.

    Attributes:
        path: where it is.
        num_bytes: its size, and that of the weights beside it.
        difference: the largest that was found between it and the network.
    """

    path: Path
    num_bytes: int
    difference: float


def export_model(
    pipe: MaskGIT,
    out: str | Path,
    *,
    format: str = "onnx",
    parts: Sequence[str] = tuple(PARTS),
    overwrite: bool = False,
    progress: bool = False,
) -> list[Exported]:
    """Write a model's networks as files that run without this package, after checking them.

    Args:
        pipe: the model, not in training mode. An AOTInductor package is made for its device and type; an ONNX
            graph runs anywhere.
        out: the folder, made if needed; it is written whole or not at all.
        format: "onnx", or "aoti" for AOTInductor.
        parts: which networks: names in `PARTS`.
        overwrite: replace an export that is there.
        progress: whether to show a progress bar, on a terminal.

    Returns:
        What was written, a row for each part.

    Raises:
        ConfigError: a name is unknown, a package or a compiler is missing, or the model is of another type
            than the format can hold.
        CheckpointError: a file does not compute what the network does; the folder is as it was.
        OutputError: the folder holds something, or cannot be written.
    """
    out, pipe = expand(out), plain_model(pipe)
    check_export(out, format=format, parts=parts, overwrite=overwrite)
    dtype = pipe.tokenizer.dtype
    if format == "onnx" and dtype != torch.float32:
        raise ConfigError(f"ONNX graphs are exported in float32, but the model is in {dtype}.")
    if pipe.transformer.training or pipe.tokenizer.training:
        raise ConfigError("The model is in training mode; call eval() on its networks before the export.")
    made: list[Exported] = []

    def write(folder: Path) -> None:
        graphs = {}
        for name in bar(dict.fromkeys(parts), unit="part", shown=progress):
            part = PARTS[name](pipe).eval()
            written = _export_part(part, folder / (name + FORMATS[format].suffix), FORMATS[format], pipe)
            made.append(written._replace(path=out / written.path.name))
            graphs[name] = {
                "file": written.path.name,
                "input": part.input,
                "output": part.output,
                "max_difference": written.difference,
            }
        write_json(folder / CONFIG, _describe(pipe, format) | {"graphs": graphs})

    ends = [kind.suffix + end for kind in FORMATS.values() for end in ("", EXTERNAL)]
    write_folder(out, (CONFIG, *(name + end for name in PARTS for end in ends)), write, overwrite=overwrite)
    return made


def _export_part(part: Part, path: Path, kind: Format, pipe: MaskGIT) -> Exported:
    """Write a file and compare what it computes with what the network does.

    Raises:
        CheckpointError: they differ by more than rounding explains.
    """
    with torch.no_grad():
        kind.write(part, part.example(TRACED_BATCH).to(pipe.device), path)
    run = kind.load(path)
    dtype = pipe.tokenizer.dtype
    # On a GPU, float32 convolutions may round to TF32, which has float16's digits.
    rounds = dtype == torch.float32 and pipe.device.type == "cuda"
    tolerance = TOLERANCES[torch.float16 if rounds else dtype]
    largest = 0.0
    for batch in CHECKED_BATCHES:
        inputs = part.example(batch).to(pipe.device)
        error, scale = part.difference(inputs, run(inputs).to(pipe.device))
        # Written so that NaN fails.
        if not error <= tolerance * scale:
            raise CheckpointError(
                f"The exported {path.stem} differs from the network by {error:.2g} at values "
                f"up to {scale:.2g} and was thrown away. Export on the CPU in float32, or with versions of "
                "torch and the runtime that are tested (constraints.txt)."
            )
        largest = max(largest, error)
    num_bytes = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    return Exported(path, num_bytes, largest)


def check_export(out: Path, *, format: str, parts: Sequence[str], overwrite: bool) -> None:
    """Raise what can be known to be wrong before any work is done; see `export_model`."""
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if not parts:
        raise ConfigError(f"Name at least one part to export: {', '.join(PARTS)}.")
    for name in parts:
        if name not in PARTS:
            raise unknown_name("part", name, PARTS)
    try:
        str(out).encode()
    except UnicodeEncodeError as error:
        raise OutputError(
            f"{out} has a name that is not UTF-8, which exporters cannot open; choose another folder."
        ) from error
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputError(f"{out} is there already; choose another folder, or say --overwrite.")
    for package in FORMATS[format].packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(f"Export to {format} needs {package}: {install_extra('export')}.") from error


def _describe(pipe: MaskGIT, format: str) -> dict[str, Any]:
    """Return what a program needs to know to use the files."""
    made_for = {"device": str(pipe.device), "dtype": str(pipe.tokenizer.dtype).removeprefix("torch.")}
    vocabulary = pipe.vocabulary
    return {
        "maskgit": __version__,
        "torch": torch.__version__,
        "format": format,
        **(made_for if format == "aoti" else {}),
        "vocabulary": {
            "num_codes": vocabulary.num_codes,
            **({"groups": vocabulary.groups} if vocabulary.groups > 1 else {}),
            "num_classes": vocabulary.num_classes,
            "grid_size": vocabulary.grid_size,
            "mask": vocabulary.mask,
        },
        "model": pipe.config.to_dict(),
    }
