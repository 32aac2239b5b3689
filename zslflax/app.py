"""A page in the browser that names a picture, and finds pictures of a folder by a sentence.

    python -m zslflax.app --workdir=runs/demo --images=FOLDER

It needs no network, sends nothing anywhere, and answers this machine alone unless --host says otherwise.
Of the folder it hands out nothing but small copies of what was found.
"""

import argparse
import html
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import gradio as gr
import numpy as np

from zslflax import figures
from zslflax.cli import exit_on_error, start_logging
from zslflax.data import images
from zslflax.inference.image_input import read_image
from zslflax.inference.predictor import Predictor

log = logging.getLogger("zslflax")
MEGABYTES = 20  # of an upload
NAMES, CHARACTERS = 1_000, 500  # at most: names at once, and characters of a name or a sentence
BEST, FOUND = 20, 12  # names, and images of a search, that are shown
SIDE = 256  # of images on the page, pixels
KEEP = 3_600  # seconds until an upload is removed; all go when the program ends
CHUNK = 1_024  # images of the folder that are in memory at once
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
HINT = "Type names, with commas between them."
BAR = (
    '<div class="row"><span class="name">{}</span><span class="score">{:.3f}</span>'
    '<div class="track"><div class="bar" style="width: {:.1f}%"></div></div></div>'
)
CSS = """
footer { display: none !important }
#found .grid-wrap { overflow-y: auto }
.bars .row { display: grid; grid-template-columns: 1fr auto; margin-bottom: 10px }
.bars .name { overflow-wrap: anywhere }
.bars .score { font-variant-numeric: tabular-nums; opacity: 0.7 }
.bars .track { grid-column: 1 / 3; background: var(--background-fill-secondary) }
.bars .bar { background: var(--color-accent) }
.bars .track, .bars .bar { height: 10px; border-radius: 5px }
"""


def parse_names(text: str) -> list[str]:
    """Names with commas or line ends between them, each once; unlike `read_class_names`, never a file."""
    names = list(dict.fromkeys(name.strip() for name in re.split(r"[,\n]", text) if name.strip()))
    if len(names) > NAMES or max(map(len, names), default=0) > CHARACTERS:
        refuse(f"At most {NAMES:,} names of {CHARACTERS} characters each.")
    return names


def bars(rows: Sequence[tuple[str, float]]) -> str:
    """Names with their scores and bars."""
    lengths = figures.bar_lengths([score for _, score in rows])
    parts = [BAR.format(html.escape(name), s, 100 * length) for (name, s), length in zip(rows, lengths)]
    return f'<div class="bars">{"".join(parts)}</div>'


def read_folder(predictor: Predictor, folder: Path) -> tuple[list[Path], np.ndarray]:
    """The readable images below a folder, and their embeddings fp32 [n, d].

    Raises:
        ValueError: there are none.
    """
    candidates = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    paths, image_emb = [], []
    for start in range(0, len(candidates), CHUNK):
        prepared = []
        for path in candidates[start : start + CHUNK]:
            try:
                prepared.append(predictor.preprocess(path))
                paths.append(path)
            except (images.BadSample, OSError) as error:
                log.warning("left out %s", error)
        if prepared:
            image_emb.append(predictor.encode_image(np.stack(prepared)))
    if not paths:
        raise ValueError(f"{folder} has no readable image ({', '.join(sorted(SUFFIXES))})")
    log.info("%d of %d images in %s can be searched", len(paths), len(candidates), folder)
    return paths, np.concatenate(image_emb)


def refuse(message: str) -> NoReturn:
    """Shows the person a message; the server goes on."""
    raise gr.Error(message, print_exception=False)


def page(predictor: Predictor, folder: Path | None) -> gr.Blocks:
    """The page, with a search where there is a folder."""

    def classify(upload: str | None, text: str):
        if not upload:
            refuse("Drop an image first.")
        try:
            image = images.decode(Path(upload).read_bytes())
        except images.BadSample as error:
            refuse(f"This file can't be used: {error}.")
        names = parse_names(text)
        answer = bars(predictor.classify(image, names, top_k=BEST)[0]) if names else HINT
        return figures.fit_image(image, SIDE), answer

    def search(query: str):
        if not query.strip() or len(query) > CHARACTERS:
            refuse(f"Type a sentence of at most {CHARACTERS} characters.")
        answer = [(paths[i], score) for i, score in predictor.search(query, image_emb, top_k=FOUND)]
        return [(figures.fit_image(read_image(path), SIDE), f"{path.name}  {s:.3f}") for path, s in answer]

    alone = {"concurrency_limit": 1, "concurrency_id": "model"}
    with gr.Blocks(title="zslflax", analytics_enabled=False, delete_cache=(KEEP // 6, KEEP)) as blocks:
        gr.Markdown(f"## Name a picture\nwith {predictor.config.name} at step {predictor.step:,}")
        with gr.Row():
            with gr.Column():
                upload = gr.File(label="Image", file_types=["image"], height=150, elem_id="upload")
                example = "red circle, blue fish, …"
                names = gr.Textbox(label="Names", placeholder=example, lines=3, elem_id="names")
                button = gr.Button("Name it", variant="primary", elem_id="name-it")
            with gr.Column():
                shown = gr.Image(show_label=False, interactive=False, height=250, buttons=[], elem_id="shown")
                scores = gr.HTML(elem_id="scores")
        asked = [upload.upload, names.submit, button.click]
        gr.on(asked, classify, [upload, names], [shown, scores], **alone)
        upload.clear(lambda: (None, ""), None, [shown, scores])
        if folder is not None:
            paths, image_emb = read_folder(predictor, folder)
            gr.Markdown(f"## Find pictures\namong the {len(paths):,} in {folder.name}")
            example = "a red circle next to a blue fish"
            query = gr.Textbox(label="Sentence, Enter", placeholder=example, max_lines=1, elem_id="query")
            found = gr.Gallery(show_label=False, columns=6, height="auto", buttons=[], elem_id="found")
            query.submit(search, query, found, **alone)
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser("python -m zslflax.app", description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", required=True, help="of a training run; or an exported folder, or a Hub id")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="whose images can be searched")
    parser.add_argument("--host", default="127.0.0.1", help="to serve on; default: this machine alone")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    start_logging()
    blocks = page(Predictor.restore(args.workdir), args.images and args.images.expanduser().resolve())
    _, url, _ = blocks.launch(
        server_name=args.host,
        server_port=args.port,
        max_file_size=f"{MEGABYTES}mb",
        css=CSS,
        theme=gr.themes.Base(font="system-ui", font_mono="monospace"),
        footer_links=[],
        ssr_mode=False,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    log.info("the page is at %s; Ctrl-C ends it", url)
    blocks.block_thread()


if __name__ == "__main__":
    with exit_on_error():
        main()
