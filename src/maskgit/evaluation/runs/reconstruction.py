"""A tokenizer's reconstructions of real images, scored and written up by any number of processes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskgit.data.picture_sets import Pictures
from maskgit.data.rows import check_share
from maskgit.evaluation.networks.features import FeatureNet
from maskgit.evaluation.networks.lpips import LPIPS
from maskgit.evaluation.report.report import Picture, Report
from maskgit.evaluation.runs.evaluate import EvaluationConfig
from maskgit.evaluation.runs.running import Progress, run_works
from maskgit.evaluation.runs.sampling import Reconstructions, gather
from maskgit.evaluation.scores.names import Names
from maskgit.evaluation.scores.references import evaluator_identity
from maskgit.evaluation.scores.scores import reconstruction_scores
from maskgit.foundation.checks import check_range
from maskgit.foundation.files import expand
from maskgit.foundation.units import Units
from maskgit.networks.tokenizer import Tokenizer


@dataclass(frozen=True)
class ReconstructionEvaluation:
    """An evaluation of a tokenizer on real images that it was not trained on.

    Attributes:
        tokenizer: the tokenizer.
        name: what it is called.
        weights: its SHA-256 by name.
        net: what features are computed with, and `features` its name in `FEATURE_NETS`.
        data: the images.
        config: how thoroughly they are scored.
        num_images: how many of them, spread evenly over them; None takes all.
        batch_size: images reconstructed together.
        unit_size: images of a unit of work.
        lpips: computes LPIPS, if it is wanted, and `lpips_name` says which it is.
        command: what was typed to begin it, for the report.
    """

    tokenizer: Tokenizer
    name: str
    weights: dict[str, str]
    net: FeatureNet
    features: str
    data: Pictures
    config: EvaluationConfig
    num_images: int | None = None
    batch_size: int = 64
    unit_size: int = 512
    lpips: LPIPS | None = None
    lpips_name: str | None = None
    command: str = ""

    def run(self, out: str | Path, progress: Progress | None = None) -> Path | None:
        """Reconstruct the images, score them and write the report; see `run_works`.

        Raises:
            ConfigError: the images do not fit the tokenizer, or the folder was begun with other settings.
            DataError: the images cannot be read.
        """
        check_range("batch_size", self.batch_size, 1, 65_536)
        check_range("unit_size", self.unit_size, 1, 1_000_000)
        work = Reconstructions(
            self.tokenizer,
            self.data,
            self.net,
            weights=self.weights,
            lpips=self.lpips,
            lpips_name=self.lpips_name,
            num_images=self.num_images,
            batch_size=self.batch_size,
            unit_size=self.unit_size,
        )
        return run_works(expand(out), {"reconstructions": work}, self._write, progress=progress)

    def _write(self, units: dict[str, Units]) -> Report:
        """Turn finished units into a report."""
        done = units["reconstructions"]
        found = gather(done)
        check_share(self.data.name, done.work.count, found.skipped, self.data.max_bad_share)
        names = Names(self.features, self.net)
        scores, cautions = reconstruction_scores(found.arrays, names, splits=self.config.splits)
        cautions += [f"{self.data.name}: {line}" for line in self.data.left_out]
        shown = found.arrays.get("shown", ())
        captions: Sequence[str] = ("original", "reconstruction") * (len(shown) // 2)
        identities: dict[str, dict[str, Any]] = {
            "model": {"name": self.name, "weights": self.weights},
            "evaluator": evaluator_identity(names),
            "reference": {
                "name": self.data.name,
                "sha256": self.data.fingerprint,
                "num_images": len(self.data),
                "resolution": self.data.resolution,
            },
        }
        return Report(
            title=self.name,
            kind="reconstructions",
            num_images=len(found.arrays["pooled"]),
            scores=scores,
            cautions=cautions,
            sheet=[Picture(*pair) for pair in zip(shown, captions, strict=True)],
            pairs=True,
            settings=done.plan,
            identities=identities,
            skipped=found.skipped,
            run=({"command": self.command} if self.command else {})
            | {
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "seconds": done.seconds(),
                "device": str(self.net.device),
            },
        )
