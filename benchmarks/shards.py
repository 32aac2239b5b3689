"""The time to index and to open many shards, and the memory of a process that reads them.

    python benchmarks/shards.py

Uses 100 shards of 10,000 samples (jpg, txt, json) and prints JSON lines:

    index_tarfile  seconds to index the shards where the standard library's tarfile finds the members
    index          seconds to index the shards, which is done once
    open           seconds to open the indexed shards, the best of several processes
    read           resident memory while train_batches reads 200,000 samples
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
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from zslflax.data import pipeline
from zslflax.data.sources import tar_index
from zslflax.data.sources.shard_patterns import expand_patterns
from zslflax.data.sources.tar_format import SPARSE
from zslflax.data.sources.webdataset import WebDataset

SHARDS, PER_SHARD = 100, 10_000
SAMPLES, BATCH, SIZE = 200_000, 500, 16


def write_shard(path: Path, samples: int) -> None:
    """Writes a shard whose samples have images of a few hundred bytes."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=50)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(samples):
            text = f"caption {i}".encode()
            for extension, contents in (("jpg", file.getvalue()), ("txt", text), ("json", b"{}")):
                info = tarfile.TarInfo(f"{i:09}.{extension}")
                info.size = len(contents)
                tar.addfile(info, io.BytesIO(contents))


def open_shards(pattern: str) -> float:
    """Seconds to open the shards; the first time, this includes indexing them."""
    start = time.perf_counter()
    assert len(WebDataset(pattern)) == SHARDS * PER_SHARD
    return time.perf_counter() - start


def iter_members_with_tarfile(file: BinaryIO, path: str) -> Iterator[tuple[bytes, int, int]]:
    """What `tar_format.iter_members` yields of good files, with the standard library's tarfile."""
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # otherwise they pile up
            if member.isreg():
                name = member.name.encode(errors="surrogateescape")
                yield name, SPARSE if member.issparse() else member.offset_data, member.size


def index_with_tarfile(pattern: str) -> float:
    """Seconds to index and open the shards with tarfile; leaves no index."""
    tar_index.iter_members = iter_members_with_tarfile
    seconds = open_shards(pattern)
    for path in expand_patterns(pattern):
        Path(path + tar_index.SUFFIX).unlink()
    return seconds


class Lengths:
    """A minimal tokenizer: one token, the caption's length."""

    identity = {"pad_id": 0}

    def __call__(self, captions):
        ids = np.array([[len(caption)] for caption in captions], np.int32)
        return ids, np.ones_like(ids, bool)


def resident() -> float:
    """The resident memory of this process, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def read_samples(pattern: str) -> list[float]:
    """The resident memory after each tenth of the samples, MB."""
    source = WebDataset(pattern)
    options = {"batch_size": BATCH, "image_size": SIZE, "seed": 0}
    batches, memory = pipeline.train_batches([source], (), Lengths(), **options), []
    for step in range(1, SAMPLES // BATCH + 1):
        assert next(batches)["valid"].all()
        if step % (SAMPLES // BATCH // 10) == 0:
            memory.append(round(resident(), 1))
    return memory


MEASUREMENTS = {"index_tarfile": index_with_tarfile, "open": open_shards, "read": read_samples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=MEASUREMENTS, help="measures one, in this process")
    parser.add_argument("--shards", help="pattern of existing shards")
    arguments = parser.parse_args()
    if arguments.only:
        return print(json.dumps(MEASUREMENTS[arguments.only](arguments.shards)))
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder, "00000.tar"), PER_SHARD)
        for shard in range(1, SHARDS):
            os.link(f"{folder}/00000.tar", f"{folder}/{shard:05}.tar")
        pattern = f"{folder}/{{00000..{SHARDS - 1:05}}}.tar"

        def measure(what: str):
            command = [sys.executable, __file__, f"--only={what}", f"--shards={pattern}"]
            return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

        shape = {"benchmark": "shards", "shards": SHARDS, "samples_per_shard": PER_SHARD}
        print(json.dumps(shape | {"name": "index_tarfile", "s": round(measure("index_tarfile"), 3)}), flush=True)
        print(json.dumps(shape | {"name": "index", "s": round(measure("open"), 3)}), flush=True)
        times = [measure("open") for _ in range(5)]
        line = {"name": "open", "s": round(min(times), 3), "median_s": round(statistics.median(times), 3)}
        print(json.dumps(shape | line), flush=True)
        print(json.dumps(shape | {"name": "read", "samples": SAMPLES, "resident_mb": measure("read")}))


if __name__ == "__main__":
    main()
