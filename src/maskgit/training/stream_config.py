"""What a run is told that reads its images from their source while it trains."""

import dataclasses
from dataclasses import dataclass

from maskgit.data.augment import AUGMENTATIONS
from maskgit.data.image_cache import MAX_SIDE
from maskgit.errors import ConfigError
from maskgit.foundation.checks import Config, check_choice, check_range

# What may differ when a run goes on: the fingerprint tells whether the source is still the same.
STREAM_MAY_CHANGE = ("stream.source", "stream.revision", "stream.max_bad_share")


@dataclass(frozen=True)
class StreamConfig(Config):
    """How images are streamed; without a source they are not.

    Attributes:
        source: a folder, Parquet files, WebDataset tars, a pattern of files, or a name on the Hugging Face Hub.
        split: which part, as the source names it; None takes its only one, or "train".
        config: which configuration of a data set on the hub.
        revision: a commit, tag or branch of a data set on the hub; with a commit, later changes there do not
            matter.
        image_column: the column of images; found by its kind or name when "auto".
        decoded_size: pixels a side of the square that each image is scaled and cut to before it is augmented;
            None takes those that the networks see.
        lanes: 1, and every process reads the whole source but decodes only its share; or a multiple of the
            number of processes, at most the source's files, and each process reads its own files.
        shuffle_buffer: images among which the next is drawn, held undecoded in memory for each lane; 0 keeps the
            source's order. A folder of images is shuffled as a whole with any other number.
        max_bad_share: largest share of images that may be unusable.
    """

    source: str = ""
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    image_column: str = "auto"
    decoded_size: int | None = None
    lanes: int = 1
    shuffle_buffer: int = 1000
    max_bad_share: float = 0.01

    def validate(self) -> None:
        check_range("stream.lanes", self.lanes, 1, 65_536)
        check_range("stream.shuffle_buffer", self.shuffle_buffer, 0, 1_000_000)
        check_range("stream.max_bad_share", self.max_bad_share, 0, 1)
        if self.decoded_size is not None:
            check_range("stream.decoded_size", self.decoded_size, 1, MAX_SIDE)
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if changed and not self.source:
            raise ConfigError(
                f"stream.{changed[0]} is given, but stream.source, what is to be streamed, is not."
            )

    def check(self, data: str | None, data_is: str, num_workers: int) -> None:
        """Raise a `ConfigError` unless a run reads from one place, and can.

        Args:
            data: the run's cache, or None.
            data_is: what that is, in words.
            num_workers: threads that make batches.
        """
        if bool(self.source) == (data is not None):
            given = "both are given" if self.source else "neither is given"
            raise ConfigError(
                f"A run reads either data, the folder of {data_is}, or stream.source, but {given}."
            )
        if self.source and num_workers < 1:
            raise ConfigError("num_workers must be at least 1 where images are streamed, to decode them.")


@dataclass(frozen=True)
class TokenStreamConfig(StreamConfig):
    """How images are streamed whose tokens a transformer is trained on.

    Attributes:
        augment: how images are changed before they are encoded: a name in `augment.AUGMENTATIONS`.
        label_column: the column of labels; found by name when "auto"; "none" gives all images one class.
        class_names: names for integer labels, in place of those that the source gives.
    """

    augment: str = "flip"
    label_column: str = "auto"
    class_names: tuple[str, ...] | None = None

    def validate(self) -> None:
        super().validate()
        check_choice("stream.augment", self.augment, AUGMENTATIONS)
