"""Turning what the model made into the bytes of an answer."""

import base64
import json
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from maskgit import explain, images
from maskgit.apps.serving.inputs import JSON, PICTURES
from maskgit.images import provenance
from maskgit.pipeline import MaskGIT
from maskgit.results import Output

# Pixels a side of a preview.
PREVIEW_SIZE = 128


class Answer(NamedTuple):
    """A body and its type."""

    body: bytes
    media_type: str = JSON


class Allowance:
    """Decides which previews are made: after the first, only as many as take a small share of a request's time."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._spent = 0.0

    def allows(self, elapsed: float) -> bool:
        """Return whether another preview may be made, seconds after the request began."""
        return self._spent <= self._share * elapsed

    def spend(self, seconds: float) -> None:
        """Count the time that a preview has taken."""
        self._spent += seconds


class Recipe(NamedTuple):
    """What decided the pictures of a request.

    Attributes:
        settings: as metadata tells them, without seed and index.
        seed: None where nothing was drawn.
        first_index: the first picture's index.
    """

    settings: dict[str, Any]
    seed: int | None = None
    first_index: int = 0

    def of(self, number: int) -> dict[str, Any]:
        """Return the metadata of one picture."""
        if self.seed is None:
            return self.settings
        return self.settings | {"seed": self.seed, "index": self.first_index + number}


def one_picture(made: Output, media_type: str, recipe: Recipe, writing: dict[str, Any]) -> Answer:
    """Return the first picture as the whole answer; for `writing` see `flags.Marking`."""
    data = images.encode(made.to_pil()[0], PICTURES[media_type], settings=recipe.of(0), **writing)
    return Answer(data, media_type)


def pictures(
    model: MaskGIT,
    name: str,
    made: Output,
    form: str,
    recipe: Recipe,
    writing: dict[str, Any],
    *,
    with_tokens: bool,
    notes: list[str],
) -> Answer:
    """Return all pictures inside JSON; see `schemas.Pictures`, and `flags.Marking` for `writing`."""
    listed = []
    for number, picture in enumerate(made.to_pil()):
        data = images.encode(picture, form, settings=recipe.of(number), **writing)
        shown: dict[str, Any] = {
            "image": base64.b64encode(data).decode("ascii"),
            "media_type": f"image/{form}",
            "seed": recipe.seed,
            "index": None if recipe.seed is None else recipe.first_index + number,
            "tokens": made.tokens[number].tolist() if with_tokens else None,
        }
        if made.trace is not None:
            shown["trace"] = _trace(model, made, writing)
        listed.append(shown)
    guess = None
    if made.class_guess is not None:
        guess = {"number": made.class_guess.label, "name": class_name(model, made.class_guess.label)}
    answer = {"model": name, "settings": recipe.settings, "class_guess": guess, "images": listed}
    return to_json(answer | {"notes": notes})


def _trace(model: MaskGIT, made: Output, writing: dict[str, Any]) -> dict[str, Any]:
    """Return how the only image was decoded, as `schemas.Trace` has it."""
    assert made.trace is not None, "asked for"
    steps = made.trace.tokens[0]
    frames = images.to_pil(torch.cat([model.decode_tokens(part) for part in steps.split(16)]))
    provenance.say(frames, made.source if writing["mark"] else None)
    # Of an edit, the part that the model saw.
    explained = explain.explain(replace(made, photos=None))
    files = {
        "explanation": images.encode(explained, **writing),
        "animation": explain.encode_animation(explain.animation(model, made), ".gif", **writing),
    }
    return {
        "steps": len(steps),
        "fixed_at": made.trace.fixed_at[0].tolist(),
        "confidence": [[round(p, 4) for p in row] for row in made.trace.final_confidence[0].tolist()],
        "tokens": made.tokens[0].tolist(),
        "frames": [base64.b64encode(images.encode(frame)).decode("ascii") for frame in frames],
        **{name: base64.b64encode(data).decode("ascii") for name, data in files.items()},
    }


def class_name(model: MaskGIT, label: int) -> str | None:
    """Return the first of a class's names, or None if it has none."""
    return None if model.class_names is None else model.class_names[label].split(",")[0]


def previews(pixels: torch.Tensor, source: str | None) -> list[str]:
    """Return images float32 (B, 3, H, W) as small PNGs, base64; for `source` see `provenance.say`."""
    pictures = images.to_pil(pixels)
    provenance.say(pictures, source)
    for picture in pictures:
        picture.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
    return [base64.b64encode(images.encode(picture)).decode("ascii") for picture in pictures]


def to_json(values: Any) -> Answer:
    """Return JSON values as an answer."""
    return Answer(json.dumps(values, allow_nan=False, separators=(",", ":")).encode())


def event(name: str, data: bytes | dict[str, Any]) -> bytes:
    """Return a server-sent event whose data is JSON on one line."""
    line = data if isinstance(data, bytes) else to_json(data).body
    return b"event: " + name.encode() + b"\ndata: " + line + b"\n\n"
