"""The decoding loop, the policies that choose which tokens to keep, and their settings."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskgit.sampler.loop import decode, decode_steps

__all__ = ["decode", "decode_steps"]


def __getattr__(name: str) -> Any:
    # Loaded when first used, so that the settings alone can be read without torch.
    if name not in __all__:
        raise AttributeError(f"module 'maskgit.sampler' has no attribute {name!r}")
    from maskgit.sampler import loop

    return getattr(loop, name)
