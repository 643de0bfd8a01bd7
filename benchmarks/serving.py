"""The server under load beside the pipeline's own batches, as docs/serving.md shows them.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/serving.py --out out/serving.json [--clients 32] \\
        [--images 96] [--rounds 3] [--steps 16]

Starts `maskgit serve` with the bundled model and its defaults, and takes turns with it: a round of the
pipeline makes images in batches of 16 and encodes each as a PNG; a round of the server answers the same
images to concurrent clients, one a request, as PNGs over HTTP. Each round is of new seeds. Both use all
cores (or OMP_NUM_THREADS); without OMP_WAIT_POLICY=PASSIVE, threads that wait burn the time that the other
processes need.

Prints the table, and the ratio of the best rounds' images/s, which must be 0.85 or more; exits with 1 if it
is not. Peak memory is the server process's (Linux alone). Latency is what a client waits for one image while
all others wait, too; `alone` is with no other client, and the pipeline's with batches of one.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from maskgit import MaskGIT, images
from maskgit.foundation import files

LEAST = 0.85
BATCH_SIZE = 16
ALONE = 8


def start() -> tuple[subprocess.Popen[str], str]:
    """Start a server on a free port; return its process and its URL."""
    command = [sys.executable, "-m", "maskgit", "serve", "--port", "0", "--max-batch", str(BATCH_SIZE)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    found = re.search(r"http://\S+", line)
    if not found:
        raise SystemExit(f"The server did not start: {line}")
    return server, found.group()


def peak_memory(pid: int) -> float | None:
    """Return the most memory that a process has held, in MB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000


def run_pipeline(pipe: MaskGIT, count: int, seed: int, steps: int, batch_size: int = BATCH_SIZE) -> float:
    """Make images and their PNGs; return the seconds."""
    started = time.perf_counter()
    for first in range(0, count, batch_size):
        labels = [index % pipe.vocabulary.num_classes for index in range(first, first + batch_size)]
        made = pipe.generate(labels, seed=seed, first_index=first, steps=steps, batch_size=batch_size)
        for picture in made.to_pil():
            images.encode(picture)
    return time.perf_counter() - started


async def run_server(url: str, count: int, seed: int, steps: int, clients: int) -> tuple[float, list[float]]:
    """Ask for as many images with concurrent clients; return the seconds, and those that each took."""
    todo = list(range(count))
    took: list[float] = []
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def ask() -> None:
            while todo:
                index = todo.pop()
                body = {"class": index % 10, "seed": seed, "first_index": index, "steps": steps}
                started = time.perf_counter()
                answer = await client.post("/v1/generate", json=body, headers={"accept": "image/png"})
                took.append(time.perf_counter() - started)
                answer.raise_for_status()

        started = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(clients)))
        return time.perf_counter() - started, took


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured."""
    pipe = MaskGIT.from_pretrained().optimize("exact")
    server, url = start()
    count, steps = arguments.images, arguments.steps
    try:
        run_pipeline(pipe, BATCH_SIZE, 0, steps)
        asyncio.run(run_server(url, BATCH_SIZE, 0, steps, BATCH_SIZE))
        alone_pipeline = run_pipeline(pipe, ALONE, 1, steps, batch_size=1) / ALONE
        alone = asyncio.run(run_server(url, ALONE, 1, steps, 1))[1]
        pipeline, served, latencies = [], [], []
        for number in range(arguments.rounds):
            seconds = run_pipeline(pipe, count, 2 + number, steps)
            pipeline.append(count / seconds)
            seconds, took = asyncio.run(run_server(url, count, 2 + number, steps, arguments.clients))
            served.append(count / seconds)
            latencies += took
            print(
                f"round {number}: pipeline {pipeline[-1]:.2f}, server {served[-1]:.2f} images/s", flush=True
            )
        memory = peak_memory(server.pid)
    finally:
        server.terminate()
        server.wait()
    cuts = statistics.quantiles(latencies, n=100)
    return {
        "clients": arguments.clients,
        "images": count,
        "rounds": arguments.rounds,
        "steps": steps,
        "cores": os.cpu_count(),
        "pipeline_images_per_second": pipeline,
        "server_images_per_second": served,
        "ratio": max(served) / max(pipeline),
        "latency_p50": cuts[49],
        "latency_p99": cuts[98],
        "alone_seconds": statistics.median(alone),
        "alone_seconds_pipeline": alone_pipeline,
        "peak_memory_mb": memory,
    }


def table(made: dict[str, Any]) -> str:
    """Return the load table as Markdown."""
    rows = [
        ("images/s, pipeline, batches of 16", f"{max(made['pipeline_images_per_second']):.2f}"),
        (f"images/s, server, {made['clients']} clients", f"{max(made['server_images_per_second']):.2f}"),
        ("ratio", f"{made['ratio']:.2f}"),
        ("latency under that load, p50 / p99", f"{made['latency_p50']:.2f} s / {made['latency_p99']:.2f} s"),
        ("latency alone, median", f"{made['alone_seconds']:.2f} s"),
        ("the pipeline's, one image", f"{made['alone_seconds_pipeline']:.2f} s"),
        (
            "server's peak memory",
            "unknown" if made["peak_memory_mb"] is None else f"{made['peak_memory_mb']:.0f} MB",
        ),
    ]
    return "\n".join(
        ["| measured | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a JSON file for the numbers")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--images", type=int, default=96, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    arguments = parser.parse_args()
    made = measure(arguments)
    files.write_bytes(arguments.out, (json.dumps(made, indent=1) + "\n").encode())
    print(table(made))
    return 0 if made["ratio"] >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
