"""MaskGIT: masked generative image transformers in PyTorch.

    from maskgit import MaskGIT
    model = MaskGIT.from_pretrained()
    model.generate("frog", num_images=4, seed=1).to_pil()[0].save("frog.png")

Source: Chang, Zhang, Jiang, Liu, Freeman: MaskGIT: Masked Generative Image Transformer (CVPR 2022),
arXiv 2202.04200.
"""

from typing import TYPE_CHECKING, Any

from maskgit.foundation import __version__

if TYPE_CHECKING:
    from maskgit.config import ModelConfig
    from maskgit.errors import MaskGITError
    from maskgit.networks.config import TokenizerConfig, TransformerConfig
    from maskgit.pipeline import MaskGIT
    from maskgit.results import Output
    from maskgit.sampler.config import SamplerConfig

__all__ = [
    "MaskGIT",
    "MaskGITError",
    "ModelConfig",
    "Output",
    "SamplerConfig",
    "TokenizerConfig",
    "TransformerConfig",
    "__version__",
]

_HOME = {
    "MaskGIT": "pipeline",
    "Output": "results",
    "MaskGITError": "errors",
    "ModelConfig": "config",
    "SamplerConfig": "config",
    "TokenizerConfig": "config",
    "TransformerConfig": "config",
}


def __getattr__(name: str) -> Any:
    # Names are loaded when first used, so that `import maskgit` and `maskgit --help` do not wait for torch.
    if name not in _HOME:
        raise AttributeError(f"module 'maskgit' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"maskgit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
