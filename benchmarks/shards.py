"""How long many shards take to index and to open, and whether reading them keeps memory flat.

    python benchmarks/shards.py

Prints JSON lines: seconds to index, once, and to open, the best of several processes, 100 shards of 10,000
samples (jpg, txt, json); and the resident memory of a process while train_batches reads 200,000 of them.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from zslflax.data import pipeline
from zslflax.data.sources.webdataset import WebDataset

SHARDS, PER_SHARD = 100, 10_000
SAMPLES, BATCH, SIZE = 200_000, 500, 16


def write_shard(path: Path, samples: int) -> None:
    """Writes one shard, and an image of a few hundred bytes in each of its samples."""
    file = io.BytesIO()
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(picture).save(file, "JPEG", quality=50)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(samples):
            text = f"caption {i}".encode()
            for extension, contents in (("jpg", file.getvalue()), ("txt", text), ("json", b"{}")):
                info = tarfile.TarInfo(f"{i:09}.{extension}")
                info.size = len(contents)
                tar.addfile(info, io.BytesIO(contents))


def open_shards(pattern: str) -> float:
    start = time.perf_counter()
    assert len(WebDataset(pattern)) == SHARDS * PER_SHARD
    return time.perf_counter() - start


class Lengths:
    """The least of a tokenizer: one token, the caption's length."""

    identity = {"pad_id": 0}

    def __call__(self, captions):
        ids = np.array([[len(caption)] for caption in captions], np.int32)
        return ids, np.ones_like(ids, bool)


def resident() -> float:
    """MB of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def read_samples(pattern: str) -> list[float]:
    """Resident memory, after every tenth of the samples."""
    source = WebDataset(pattern)
    options = {"batch_size": BATCH, "image_size": SIZE, "seed": 0}
    batches, seen = pipeline.train_batches([source], (), Lengths(), **options), []
    for step in range(1, SAMPLES // BATCH + 1):
        assert next(batches)["valid"].all()
        if step % (SAMPLES // BATCH // 10) == 0:
            seen.append(round(resident(), 1))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("open", "read"), help="does one, in this process")
    parser.add_argument("--shards", help="pattern of shards that there are already")
    arguments = parser.parse_args()
    if arguments.only:
        measure = {"open": open_shards, "read": read_samples}[arguments.only]
        return print(json.dumps(measure(arguments.shards)))
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder, "00000.tar"), PER_SHARD)
        for shard in range(1, SHARDS):
            os.link(f"{folder}/00000.tar", f"{folder}/{shard:05}.tar")
        pattern = f"{folder}/{{00000..{SHARDS - 1:05}}}.tar"

        def measure(what: str):
            command = [sys.executable, __file__, f"--only={what}", f"--shards={pattern}"]
            return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

        shape = {"benchmark": "shards", "shards": SHARDS, "samples_per_shard": PER_SHARD}
        print(json.dumps(shape | {"name": "index", "s": round(measure("open"), 3)}), flush=True)
        times = [measure("open") for _ in range(5)]
        line = {"name": "open", "s": round(min(times), 3), "median_s": round(statistics.median(times), 3)}
        print(json.dumps(shape | line), flush=True)
        print(json.dumps(shape | {"name": "read", "samples": SAMPLES, "resident_mb": measure("read")}))


if __name__ == "__main__":
    main()
