"""A whole model's description, and the face of the typed configs of its parts."""

from dataclasses import dataclass, field

from maskgit.errors import ConfigError
from maskgit.foundation.checks import Config, check_range
from maskgit.networks.config import TokenizerConfig, TransformerConfig
from maskgit.sampler.config import SamplerConfig, StepTables

__all__ = ["ModelConfig", "SamplerConfig", "StepTables", "TokenizerConfig", "TransformerConfig"]


@dataclass(frozen=True)
class ModelConfig(Config):
    """A whole model: its two networks, its image size, its classes and how it is best sampled.

    Attributes:
        tokenizer: the tokenizer's shape.
        transformer: the transformer's shape; its codes and grid must fit the tokenizer and the image size.
        image_size: pixels a side of the square images that the model was trained on; the height of others.
        class_names: a name for each class (several separated by commas are synonyms), or none.
        label_dropout: share of training sequences whose class was masked; above 0 the model can be guided
            and can generate without a class.
        sampler: the settings used when the caller names none.
    """

    tokenizer: TokenizerConfig
    transformer: TransformerConfig
    image_size: int
    class_names: tuple[str, ...] | None = None
    label_dropout: float = 0.0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def validate(self) -> None:
        side = self.transformer.grid_size * self.tokenizer.patch_size
        if self.image_size != side:
            raise ConfigError(
                f"image_size is {self.image_size}, but {self.transformer.grid_size} tokens of "
                f"{self.tokenizer.patch_size} pixels make {side}."
            )
        if self.tokenizer.codebook_size != self.transformer.num_codes:
            raise ConfigError(
                f"The tokenizer has {self.tokenizer.codebook_size} codes, "
                f"but the transformer predicts {self.transformer.num_codes}: they do not belong together."
            )
        if self.class_names is not None and len(self.class_names) != self.transformer.num_classes:
            raise ConfigError(
                f"There are {len(self.class_names)} class names for {self.transformer.num_classes} classes."
            )
        check_range("label_dropout", self.label_dropout, 0, 1)
