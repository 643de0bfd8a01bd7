"""The most memory that one image of the full-size models takes, from the shell.

    python benchmarks/memory.py [--sizes 256 512] [--modes exact fast int8] [--device cpu] [--json FILE]

Each model (random weights) generates in a process of its own, whose largest resident size is read at its end (Linux);
on a GPU, what torch had allocated at most. The bound of the 512 model is 4 GiB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import models
import timing

ONE_IMAGE = """
import json, sys, torch
from pathlib import Path
from maskgit.apps.cli.commands import main
code = main(sys.argv[1:])
gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
# Not ru_maxrss, which counts the process that started this one, too.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"code": code, "gpu": gpu, "cpu": 1024 * int(status["VmHWM"].split()[0])}))
"""


def peak_bytes(model: Path, mode: str, device: str, out: Path) -> dict[str, int]:
    """Return the most bytes that one image took, on the host and on a GPU."""
    command = ["generate", "--class", "1", "--model", str(model), "--out", str(out), "--overwrite"]
    command += ["--device", device, f"--{mode}"]
    done = subprocess.run(
        [sys.executable, "-c", ONE_IMAGE, *command], check=True, capture_output=True, text=True
    )
    made = json.loads(done.stdout.splitlines()[-1])
    if made.pop("code"):
        raise SystemExit(done.stderr)
    return made


def main() -> None:
    """Print a line for each size and mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=models.SIZES, default=["256", "512"])
    parser.add_argument("--modes", nargs="+", choices=models.MODES[1:], default=list(models.MODES[1:]))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in options.sizes:
            config = models.SIZES[size]()
            models.random_model(config).save_pretrained(folder / size)
            for mode in options.modes:
                peak = peak_bytes(folder / size, mode, options.device, folder / "out")
                rows.append({"size": size, "steps": config.sampler.steps, "mode": mode, **peak})
                print(
                    f"{size:6}{mode:8}{peak['cpu'] / 2**30:6.2f} GiB on the host {peak['gpu'] / 2**30:6.2f} GiB on the GPU"
                )
    if options.json:
        timing.write_json(options.json, {"device": options.device, "rows": rows})


if __name__ == "__main__":
    main()
