"""Images per second of the input pipeline, compared with its codec alone, webdataset, and webdataset with Pillow.

    python benchmarks/pipeline.py --rounds=5
    python benchmarks/pipeline.py --cores 1 2 4 8 16 --contenders codec zslflax   # pinned to so many cores

Every contender reads the same shards, 500×375 JPEGs of quality 90 with captions, and makes 224×224 crops of 20 to 100%
of the area, in a process of its own. Each round measures all contenders in turn, so that other load on the machine
affects them equally. Each measurement prints a JSON line; the last line has the medians and the ratios.

    codec              zslflax.data.images alone, from memory, a thread per core; no flip, captions or batches
    zslflax            zslflax.data.pipeline.train_batches, with a tokenizer; --workers and --threads as in the config
    webdataset         the webdataset library with the same codec and tokenizer; a process per core
    pillow             webdataset with OpenCLIP's transform: Pillow, bicubic, to normalised float32; a process per core
    pillow_uint8       webdataset with Pillow's fastest transform: bilinear, to uint8; a process per core

The images are noise with the spectra of photographs (amplitude f to the power -1.1 … -1.5, mostly shared by the
colours) and some grain. At quality 90 they take 50-110 kB, like photographs of that size.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from zslflax.data import crops, images, pipeline
from zslflax.data.sources.shard_patterns import expand_patterns
from zslflax.data.sources.webdataset import WebDataset
from zslflax.data.text import Tokenizer

HEIGHT, WIDTH, QUALITY = 375, 500, 90
CROP, SCALE, RATIO = 224, (0.2, 1.0), (3 / 4, 4 / 3)
SHARDS, PER_SHARD = 4, 256
# Each shard has so many names. People train on more than 1,024 samples, and for so few grain takes ten times as long to
# draw one: 30 µs.
LINKS = 16
BATCH = 128
CORES = len(os.sched_getaffinity(0))
WARM_UP = 4 * BATCH  # images before the clock starts
WORDS = "a the of in with small large red blue green dog street house tree water boat people sky photo".split()
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenCLIP's
MAX_TOKENS = 60


def noise_image(rng: np.random.Generator) -> np.ndarray:
    """Noise of amplitude f to a power of -1.1 … -1.5, uint8 [375, 500, 3]."""
    fy, fx = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
    amplitude = np.maximum(np.hypot(fy, fx), 1 / WIDTH) ** -rng.uniform(1.1, 1.5)
    amplitude[0, 0] = 0

    def layer():
        noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((HEIGHT, WIDTH))) * amplitude, (HEIGHT, WIDTH))
        return noise / noise.std()

    shared = layer()
    channels = np.stack([shared + 0.3 * layer() for _ in range(3)], axis=2)
    grain = rng.standard_normal((HEIGHT, WIDTH, 1))
    return np.clip(118 + 50 * channels + 1.5 * grain, 0, 255).astype(np.uint8)


def write_shards(folder: Path) -> str:
    """Writes the shards in img2dataset's layout and returns their pattern."""
    rng, sizes = np.random.default_rng(0), []
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(PER_SHARD):
                file = io.BytesIO()
                Image.fromarray(noise_image(rng)).save(file, "JPEG", quality=QUALITY)
                sizes.append(len(file.getvalue()))
                caption = " ".join(rng.choice(WORDS, max(1, round(rng.normal(10, 5)))))
                for extension, contents in (("jpg", file.getvalue()), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{shard:05}{i:04}.{extension}")
                    info.size = len(contents)
                    tar.addfile(info, io.BytesIO(contents))
    low, middle, high = np.percentile(sizes, (5, 50, 95)) / 1000
    print(f"# {len(sizes)} images; percentiles 5, 50, 95: {low:.0f}, {middle:.0f}, {high:.0f} kB", flush=True)
    for shard in range(SHARDS, SHARDS * LINKS):
        os.link(folder / f"{shard % SHARDS:05}.tar", folder / f"{shard:05}.tar")
    return f"{folder}/{{00000..{SHARDS * LINKS - 1:05}}}.tar"


def load_tokenizer() -> Tokenizer:
    """A tokenizer of the captions' words, so that no pretrained encoder has to be installed."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return Tokenizer.from_folder(folder, MAX_TOKENS)


def write_tokenizer(folder: Path) -> None:
    """Writes the files of a BERT tokenizer that knows the captions' words."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


def run_codec(pattern: str, number: int) -> float:
    source = WebDataset(pattern)
    encoded = [source[i]["image"] for i in range(min(len(source), SHARDS * PER_SHARD))]

    def work(thread: int, number: int) -> None:
        rng = np.random.default_rng(thread)
        for data in itertools.islice(itertools.cycle(encoded[thread::CORES]), number // CORES):
            crops.random_resized_crop(images.decode(data), CROP, rng, SCALE, RATIO)

    with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        list(pool.map(work, range(CORES), [WARM_UP] * CORES))
        start = time.perf_counter()
        list(pool.map(work, range(CORES), [number] * CORES))
        return number / (time.perf_counter() - start)


def run_zslflax(pattern: str, number: int, workers: int = 0, threads: int = 0) -> float:
    source = WebDataset(pattern, require_captions=True)
    options = {"batch_size": BATCH, "image_size": CROP, "seed": 0, "workers": workers, "threads": threads}
    batches = pipeline.train_batches([source], (), load_tokenizer(), **options)
    return timed((len(batch["image"]) for batch in batches), number)


def timed(sizes, number: int) -> float:
    """Images per second of an iterator over batch sizes, after some to warm up."""
    seen = 0
    while seen < WARM_UP:
        seen += next(sizes)
    start, seen = time.perf_counter(), 0
    while seen < number:
        seen += next(sizes)
    return seen / (time.perf_counter() - start)


class CodecTransform:
    """This project's codec as a transform for webdataset."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __call__(self, data: bytes) -> np.ndarray:
        return crops.random_resized_crop(images.decode(data), CROP, self.rng, SCALE, RATIO, flip=0.5)


class PillowTransform:
    """torchvision's RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize, with Pillow."""

    def __init__(self, resampling: Image.Resampling, as_float: bool):
        self.resampling, self.as_float, self.rng = resampling, as_float, np.random.default_rng(0)

    def __call__(self, data: bytes):
        import torch

        image = Image.open(io.BytesIO(data)).convert("RGB")
        left, top, width, height = self.sample_box(*image.size)
        image = image.crop((left, top, left + width, top + height)).resize((CROP, CROP), self.resampling)
        if self.rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if not self.as_float:
            return np.array(image)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        return tensor.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])

    def sample_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """RandomResizedCrop.get_params without its fallback, which images of 4:3 never need."""
        while True:
            area = height * width * self.rng.uniform(*SCALE)
            aspect = math.exp(self.rng.uniform(*map(math.log, RATIO)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = self.rng.integers(width - w + 1), self.rng.integers(height - h + 1)
                return int(left), int(top), w, h


def run_webdataset(pattern: str, number: int, transform=None) -> float:
    """OpenCLIP's pipeline: resampled shards, a shuffle buffer, batches made in a DataLoader's workers."""
    import webdataset

    tokenizer = load_tokenizer()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers already use all cores
    tokenize = lambda data: tokenizer([data.decode()])[0][0]
    dataset = webdataset.DataPipeline(
        webdataset.ResampledShards([str(path) for path in expand_patterns(pattern)]),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(1000, initial=100),
        webdataset.rename(image="jpg", text="txt"),
        webdataset.map_dict(image=transform or CodecTransform(), text=tokenize),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(BATCH, partial=False),
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=CORES)
    return timed((len(image) for image, _ in loader), number)


def run_pillow(pattern: str, number: int) -> float:
    return run_webdataset(pattern, number, PillowTransform(Image.Resampling.BICUBIC, as_float=True))


def run_pillow_uint8(pattern: str, number: int) -> float:
    return run_webdataset(pattern, number, PillowTransform(Image.Resampling.BILINEAR, as_float=False))


CONTENDERS = {
    "codec": run_codec,
    "zslflax": run_zslflax,
    "webdataset": run_webdataset,
    "pillow": run_pillow,
    "pillow_uint8": run_pillow_uint8,
}
LIBRARIES = "numpy opencv-python-headless simplejpeg pillow grain tokenizers webdataset torch".split()


def machine() -> dict:
    """The hardware and the versions that a measurement depends on."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cpu = names[0].partition(": ")[2] if names else platform.processor()
    return {"cpu": cpu, "cores_of_machine": CORES, "python": platform.python_version(), **versions}


def measure(name: str, pattern: str, arguments: argparse.Namespace, cores: int) -> float:
    """Images per second of a contender, in a process of its own that is pinned to the first `cores` cores."""
    command = [sys.executable, __file__, f"--only={name}", f"--shards={pattern}", f"--number={arguments.number}"]
    command += [f"--workers={arguments.workers}", f"--threads={arguments.threads}"]
    pin = lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, preexec_fn=pin).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--number", type=int, default=4096, help="images in each measurement")
    parser.add_argument("--cores", type=int, nargs="+", default=[CORES], help="pins each measurement to so many cores")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--workers", type=int, default=0, help="of zslflax, as config.data.workers")
    parser.add_argument("--threads", type=int, default=0, help="of zslflax, as config.data.threads")
    parser.add_argument("--only", choices=CONTENDERS, help="measures one, in this process")
    parser.add_argument("--shards", help="pattern of existing shards")
    arguments = parser.parse_args()
    if arguments.only:
        options = {"workers": arguments.workers, "threads": arguments.threads} if arguments.only == "zslflax" else {}
        print(CONTENDERS[arguments.only](arguments.shards, arguments.number, **options))
        return
    if max(arguments.cores) > CORES:
        parser.error(f"this process may use {CORES} cores")
    with tempfile.TemporaryDirectory() as folder:
        pattern = arguments.shards or write_shards(Path(folder))
        for cores in arguments.cores:
            rates = {name: [] for name in arguments.contenders}
            for _, name in itertools.product(range(arguments.rounds), arguments.contenders):
                rates[name].append(measure(name, pattern, arguments, cores))
                line = {"benchmark": "pipeline", "name": name, "cores": cores}
                print(json.dumps(line | {"images_per_s": round(rates[name][-1], 1)} | machine()), flush=True)
            medians = {name: statistics.median(values) for name, values in rates.items()}
            line = {"benchmark": "pipeline", "cores": cores, "medians": medians}
            if "zslflax" in medians:
                line["ratios"] = {f"zslflax/{name}": round(medians["zslflax"] / medians[name], 3) for name in medians}
            print(json.dumps(line | machine()), flush=True)


if __name__ == "__main__":
    main()
