"""Images that come with a model, for the page: one of each class, and a few as they form.

    python -m maskgit.apps.serving.samples FOLDER

writes them into a model's folder: samples/classes.webp, samples/forming.webp, and samples/samples.json, which says
what the sheets show.
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from maskgit import images
from maskgit.apps.serving import schemas
from maskgit.errors import ConfigError
from maskgit.foundation import files
from maskgit.images import provenance
from maskgit.pipeline import MaskGIT

FOLDER, ABOUT = "samples", "samples.json"
SHEETS = ("classes.webp", "forming.webp")
# Classes in a row; images that form, and frames of each; pixels a side of a tile at most.
COLUMNS, NUM_FORMING, NUM_FRAMES, TILE = 10, 9, 8, 96
# Images of each class, of which the one that is most clearly of its class is shown.
CANDIDATES = 8
_MAX_ABOUT = 2**16


def read(folder: Path) -> schemas.Samples:
    """Return what a model's samples show; of a folder without any, or with damaged ones, that there are none."""
    try:
        with (folder / ABOUT).open("rb") as file:
            about = schemas.Samples.model_validate_json(file.read(_MAX_ABOUT))
    except (OSError, ValidationError):
        return schemas.Samples()
    return about if all((folder / name).is_file() for name in SHEETS) else schemas.Samples()


def write(model: MaskGIT, folder: Path) -> schemas.Samples:
    """Make a model's samples with its default settings, and write them into FOLDER/samples."""

    def clearness(pixels: Tensor, labels: Tensor) -> Tensor:
        tokens = model.encode_pixels(pixels)
        return torch.stack(
            [
                model.guess_class(row[None]).log_softmax(0)[label]
                for row, label in zip(tokens, labels, strict=True)
            ]
        )

    count = model.vocabulary.num_classes
    best = []
    for label in range(count):
        made = model.generate_best(label, candidates=CANDIDATES, scorer=clearness)
        assert made.indices is not None, "chosen by score"
        best.append((made, int(made.indices[0])))
    tile = min(TILE, model.config.image_size)
    _save(folder / SHEETS[0], [made.to_pil()[0] for made, _ in best], min(COLUMNS, count), tile)
    shown = [round(i * (count - 1) / max(1, NUM_FORMING - 1)) for i in range(NUM_FORMING)]
    forming, frames = [], []
    for number, label in enumerate(shown):
        index = best[label][1] if label not in shown[:number] else number
        made = model.generate(label, seed=0, first_index=index, return_steps=True)
        assert made.trace is not None, "asked for"
        steps = made.trace.tokens[0]
        chosen = torch.linspace(0, len(steps) - 1, NUM_FRAMES).round().long()
        decoded = images.to_pil(model.decode_tokens(steps[chosen]))
        frames += decoded[:-1] + made.to_pil()
        forming.append(schemas.Sample(number=label, seed=0, index=index))
    _save(folder / SHEETS[1], frames, NUM_FRAMES, tile)
    about = schemas.Samples(columns=min(COLUMNS, count), frames=NUM_FRAMES, forming=forming)
    files.write_bytes(folder / ABOUT, (about.model_dump_json(indent=1) + "\n").encode())
    return about


def _save(path: Path, pictures: list[Image.Image], columns: int, tile: int) -> None:
    """Write pictures as a sheet of square tiles without gaps."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * tile, rows * tile))
    for number, picture in enumerate(pictures):
        small = picture.resize((tile, tile), Image.Resampling.LANCZOS)
        sheet.paste(small, (number % columns * tile, number // columns * tile))
    provenance.say([sheet], provenance.GENERATED)
    files.write_bytes(path, images.encode(sheet, "webp"))


def main() -> None:
    """Write the samples of the model in the folder that the command line names."""
    if len(sys.argv) != 2:
        raise ConfigError("Give the folder of one model: python -m maskgit.apps.serving.samples FOLDER")
    folder = Path(sys.argv[1])
    write(MaskGIT.from_pretrained(folder), folder / FOLDER)


if __name__ == "__main__":
    main()
