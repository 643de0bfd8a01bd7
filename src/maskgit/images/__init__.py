"""Images: untrusted files, arrays, contact sheets. All ranges, sizes and file formats are handled here."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskgit.images.arrays import (
        contact_sheet,
        fit,
        overlay_mask,
        read_settings,
        save_png,
        shorten,
        to_array,
        to_pil,
        to_tensor,
        to_uint8,
    )
    from maskgit.images.encoding import encode
    from maskgit.images.reading import MAX_PIXELS, read_image

__all__ = [
    "MAX_PIXELS",
    "contact_sheet",
    "encode",
    "fit",
    "overlay_mask",
    "read_image",
    "read_settings",
    "save_png",
    "shorten",
    "to_array",
    "to_pil",
    "to_tensor",
    "to_uint8",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that files can be read without torch.
    if name not in __all__:
        raise AttributeError(f"module 'maskgit.images' has no attribute {name!r}")
    import importlib

    home = {"encode": "encoding", "read_image": "reading", "MAX_PIXELS": "reading"}.get(name, "arrays")
    return getattr(importlib.import_module(f"maskgit.images.{home}"), name)
