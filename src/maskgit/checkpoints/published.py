"""Models that others published: where their files are, under what terms, and how their authors sample them.

The files are torch checkpoints, read by `checkpoints.torch_files` and turned into a model folder once. Sources of
settings and scores: the README and config files of valeoai/Halton-MaskGIT (commit f61b0a1) and markweberdev/maskbit
(5ea3d73). Both guide c + w·(c − u), which is our scale 1 + w.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from maskgit.checkpoints.halton import tokenizer_of_llamagen, transformer_of_halton
from maskgit.checkpoints.maskbit import tokenizer_of_torch, transformer_of_maskbit
from maskgit.checkpoints.torch_files import read_torch_file
from maskgit.checkpoints.weights import loaded
from maskgit.config import ModelConfig
from maskgit.foundation.checks import check_choice
from maskgit.model import Parts
from maskgit.networks.classes import imagenet_class_names
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer
from maskgit.sampler.config import SamplerConfig

# By the project whose code wrote the files: readers of the tokenizer's and of the transformer's.
PROJECTS = {
    "halton": (tokenizer_of_llamagen, transformer_of_halton),
    "maskbit": (tokenizer_of_torch, transformer_of_maskbit),
}
# As LCGLiChenge/MoTAR, which trains from the file, states it.
KNOWN_SHA256 = {
    "ImageNet_256_base.pth": "7fe25cb80b05743e8b42dacc61d88792a9ab5217d6bd756bef28821e0a5fc68f",
}
# What both projects trained with: one image in ten without its class.
LABEL_DROPOUT = 0.1


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the Hugging Face Hub.

    Attributes:
        repository, name: which.
        sha256: what the file must have, where someone who had it says so; the hub's own statement is compared anyway.
        revision: the commit or branch. Branches move: a commit is named as soon as one is known to us.
    """

    repository: str
    name: str
    sha256: str | None = None
    revision: str = "main"

    def url(self, kind: str = "resolve") -> str:
        """Return where the file is, or with "raw" the Git LFS pointer that states its SHA-256.

        $HF_ENDPOINT names another hub, as for the hub's own client.
        """
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return f"{hub}/{self.repository}/{kind}/{self.revision}/{self.name}"


@dataclass(frozen=True)
class Published:
    """A model, or a tokenizer alone, that others published.

    Attributes:
        project: whose code reads it: a name in `PROJECTS`.
        tokenizer, transformer: its files; of a tokenizer alone the second is None.
        sampler: its authors' settings.
        licence: the terms that its authors state.
        score: FID, the one of 50,000 samples on ImageNet that they publish for these settings, or that of
            reconstructions.
    """

    project: str
    tokenizer: HubFile
    transformer: HubFile | None
    sampler: SamplerConfig
    licence: str
    score: str

    @property
    def files(self) -> tuple[HubFile, ...]:
        """Its files, the tokenizer's first."""
        return (self.tokenizer,) if self.transformer is None else (self.tokenizer, self.transformer)

    @property
    def about(self) -> str:
        """What `maskgit info` says of it."""
        named = all(file.sha256 for file in self.files)
        checked = "hash as others state it" if named else "hash and revision not verified by us"
        return f"{self.files[-1].repository} ({self.licence}; {self.score}; {checked})"


def _halton(size: int, name: str, weight: float, fid: str) -> Published:
    file = f"ImageNet_{size}_{name}.pth"
    return Published(
        "halton",
        HubFile("FoundationVision/LlamaGen", "vq_ds16_c2i.pt"),
        HubFile("llvictorll/Halton-Maskgit", file, KNOWN_SHA256.get(file)),
        SamplerConfig(steps=32, policy="halton", mask_schedule="arccos", guidance_scale=1 + weight),
        "MIT",
        f"FID {fid}",
    )


def _maskbit(bits: int, weight: float, power: float, choice_temperature: float, fid: str) -> Published:
    steps = 64
    return Published(
        "maskbit",
        HubFile(f"markweber/maskbit_tokenizer_{bits}bit", f"maskbit_tokenizer_{bits}bit.bin"),
        HubFile(f"markweber/maskbit_generator_{bits}bit", f"maskbit_generator_{bits}bit.bin"),
        SamplerConfig(
            steps=steps,
            mask_schedule="arccos",
            choice_temperature=choice_temperature,
            guidance_scale=1 + weight,
            guidance_schedule=f"power-cosine:{power:g}@before",
        ),
        "for research purposes only",
        f"FID {fid}",
    )


PUBLISHED = {
    "halton-256-tiny": _halton(256, "tiny", 1.5, "10.2"),
    "halton-256-small": _halton(256, "small", 1.0, "6.40"),
    "halton-256-base": _halton(256, "base", 0.7, "4.17"),
    "halton-384-small": _halton(384, "small", 1.0, "6.11"),
    "halton-384-base": _halton(384, "base", 0.7, "4.15"),
    "halton-384-large": _halton(384, "large", 0.5, "2.59"),
    "maskbit-10": _maskbit(10, 6.4, 2.5, 10.5, "1.68"),
    "maskbit-12": _maskbit(12, 7.1, 3, 8.2, "1.65"),
    "maskbit-14": _maskbit(14, 7.1, 3, 7.8, "1.62"),
    "maskbit-16": _maskbit(16, 6.5, 2.5, 7.5, "1.64"),
    "maskbit-18": _maskbit(18, 5.7, 2.5, 8.5, "1.67"),
}


def _tokenizer(project: str, repository: str, name: str, licence: str, fid: str) -> Published:
    return Published(
        project,
        HubFile(repository, name),
        None,
        SamplerConfig(),
        licence,
        f"a tokenizer, reconstruction FID {fid}",
    )


PUBLISHED |= {
    "llamagen-16": _tokenizer("halton", "FoundationVision/LlamaGen", "vq_ds16_c2i.pt", "MIT", "2.19"),
    "llamagen-8": _tokenizer("halton", "FoundationVision/LlamaGen", "vq_ds8_c2i.pt", "MIT", "0.59"),
    "vqgan-plus-12": _tokenizer(
        "maskbit", "markweber/vqgan_plus_12bit", "vqgan_plus_12bit.bin", "for research purposes only", "1.39"
    ),
    "maskgit-vqgan": _tokenizer(
        "maskbit", "fun-research/TiTok", "maskgit-vqgan-imagenet-f16-256.bin", "Apache-2.0", "1.96"
    ),
}
PUBLISHED |= {"halton-256": PUBLISHED["halton-256-base"], "halton-384": PUBLISHED["halton-384-large"]}


def read_published_tokenizer(project: str, path: str | Path) -> Tokenizer:
    """Return the tokenizer of a published file; see `read_published`."""
    check_choice("project", project, PROJECTS)
    config, state = PROJECTS[project][0](read_torch_file(path))
    return loaded(Tokenizer, config, state)


def read_published(
    project: str,
    tokenizer: str | Path,
    transformer: str | Path,
    sampler: SamplerConfig | None = None,
    *,
    num_heads: int | None = None,
) -> Parts:
    """Return what two published files make together.

    Args:
        project: whose format they have: a name in `PROJECTS`.
        tokenizer, transformer: torch checkpoints.
        sampler: the settings that the model brings; None is the project's policy with our defaults.
        num_heads: the transformer's attention heads, if it is of no published size.

    Raises:
        CheckpointError: a file is damaged, of another project, or asks for code to be run.
        ConfigError: the project is unknown, or the two do not belong together.
    """
    check_choice("project", project, PROJECTS)
    of_tokenizer, of_transformer = PROJECTS[project]
    first_config, first = of_tokenizer(read_torch_file(tokenizer))
    second_config, second = of_transformer(read_torch_file(transformer), num_heads=num_heads)
    if sampler is None:
        sampler = SamplerConfig(
            policy="halton" if project == "halton" else "confidence", mask_schedule="arccos"
        )
    config = ModelConfig(
        first_config,
        second_config,
        image_size=second_config.grid_size * first_config.patch_size,
        class_names=imagenet_class_names() if second_config.num_classes == 1000 else None,
        label_dropout=LABEL_DROPOUT,
        sampler=sampler,
    )
    return Parts(config, loaded(Tokenizer, first_config, first), loaded(Transformer, second_config, second))
