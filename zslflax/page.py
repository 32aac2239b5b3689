"""A page in the browser that classifies an image by any class names, and finds the images that fit a sentence.

The page needs no network and sends nothing to other hosts. It serves no file of the folder that it searches, only small
copies of the images found.
"""

import functools
import html
import io
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
import numpy as np
from PIL import Image
from starlette.middleware import Middleware

from zslflax import figures
from zslflax.data.images import IMAGE_EXTENSIONS, BadSample, available_formats, decode
from zslflax.errors import UserError
from zslflax.files import read_bytes
from zslflax.inference.image_input import find_images, read_image
from zslflax.inference.predictor import Predictor
from zslflax.page_guard import Guard

log = logging.getLogger("zslflax")
MAX_UPLOAD = 20 << 20  # bytes of an image
MAX_BODY = 2 << 20  # bytes of any other request; 1,000 class names of 500 characters take 0.5 MB
MAX_UPLOADS, MAX_UPLOADED = 1_000, 1 << 30  # images, and their bytes, that are kept at a time
MAX_PIXELS = 1 << 24  # of an image; a JPEG, of which phones make larger ones, decodes 10 times as fast and may have 4×
MAX_WAITING = 32  # requests for the model
MAX_CLASS_NAMES, MAX_CHARACTERS = 1_000, 500  # class names at once, and characters of a class name or a sentence
SHOWN_CLASSES, SHOWN_IMAGES = 20, 12  # best class names of an image, and images of a search
SIDE = 256  # of images on the page, pixels
KEPT = 3_600  # seconds until an upload is removed; all are removed when the program ends
CHUNK = 1_024  # images of the folder that are in memory at once
HINT = "Type class names, with commas between them."
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


def serve_page(predictor: Predictor, folder: Path | None, host: str, port: int) -> None:
    """Serves the page until the program is interrupted.

    Args:
        predictor: the model.
        folder: whose images can be searched, or None.
        host: to serve on; "127.0.0.1" answers this machine only.
        port: to serve on.

    Raises:
        UserError: the folder has no readable image.
    """
    blocks = build_page(predictor, folder)
    exempt_from_proxy("127.0.0.1", "localhost", host)
    limits = {"max_body": MAX_BODY, "max_upload": MAX_UPLOAD + (1 << 20)}  # a form has more than its file
    uploads = {"max_uploads": MAX_UPLOADS, "max_uploaded": MAX_UPLOADED, "kept": KEPT + KEPT // 6}
    blocks.queue(max_size=MAX_WAITING)
    _, url, _ = blocks.launch(
        app_kwargs={"middleware": [Middleware(Guard, host=host, **limits, **uploads)]},
        server_name=host,
        server_port=port,
        max_file_size=MAX_UPLOAD,
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


def exempt_from_proxy(*hosts: str) -> None:
    """Lets this process reach hosts directly: Gradio asks its own page at the start, which no proxy can reach."""
    for name in ("no_proxy", "NO_PROXY"):
        exempt = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*exempt, *hosts]))


def build_page(predictor: Predictor, folder: Path | None) -> gr.Blocks:
    """Builds the page, with a search if there is a folder."""

    def classify(upload: str | None, text: str) -> tuple[Image.Image, str]:
        if not upload:
            refuse("Drop an image first.")
        try:
            image = decode_upload(read_bytes(Path(upload), MAX_UPLOAD))
        except UserError as error:
            refuse(f"This file can't be used: {error}.")
        names = parse_class_names(text)
        answer = format_bars(predictor.classify(image, names, top_k=SHOWN_CLASSES)[0]) if names else HINT
        return figures.fit_image(image, SIDE), answer

    def search(query: str) -> list[tuple[Image.Image, str]]:
        if not query.strip() or len(query) > MAX_CHARACTERS:
            refuse(f"Type a sentence of at most {MAX_CHARACTERS} characters.")
        ranked = predictor.search(query, image_emb, top_k=len(paths))
        return list(itertools.islice(shown_images((paths[i], score) for i, score in ranked), SHOWN_IMAGES))

    def shown_images(ranked: Iterable[tuple[Path, float]]) -> Iterator[tuple[Image.Image, str]]:
        for path, score in ranked:
            try:
                if not path.resolve().is_relative_to(root):
                    raise UserError(f"{path} now leads out of the folder")
                yield figures.fit_image(read_image(path), SIDE), f"{path.name}  {score:.3f}"
            except UserError as error:  # it was removed or replaced since the start
                log.warning("left out of the answer: %s", error)

    # Each thread keeps the memory of the largest image that it has decoded: one thread for all images.
    executor = ThreadPoolExecutor(1)

    def in_one_thread(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(function)(lambda *args: executor.submit(function, *args).result())

    root = (folder or Path()).resolve()
    with gr.Blocks(title="zslflax", analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)) as blocks:
        gr.Markdown(f"## Classify an image\nwith {predictor.config.name} at step {predictor.step:,}")
        with gr.Row():
            with gr.Column():
                upload = gr.File(label="Image", file_types=["image"], height=150, elem_id="upload")
                example = "red circle, blue fish, …"
                names = gr.Textbox(label="Class names", placeholder=example, lines=3, elem_id="names")
                button = gr.Button("Classify", variant="primary", elem_id="classify")
            with gr.Column():
                shown = gr.Image(show_label=False, interactive=False, height=250, buttons=[], elem_id="shown")
                scores = gr.HTML(elem_id="scores")
        events = [upload.upload, names.submit, button.click]
        # One call of the model at a time.
        gr.on(
            events,
            in_one_thread(classify),
            [upload, names],
            [shown, scores],
            concurrency_limit=1,
            concurrency_id="model",
        )
        upload.clear(lambda: (None, ""), None, [shown, scores])
        if folder is not None:
            paths, image_emb = embed_folder(predictor, folder)
            gr.Markdown(f"## Find images\namong the {len(paths):,} in {folder.name}")
            example = "a red circle next to a blue fish"
            query = gr.Textbox(label="Sentence (Enter searches)", placeholder=example, max_lines=1, elem_id="query")
            found = gr.Gallery(show_label=False, columns=6, height="auto", buttons=[], elem_id="found")
            query.submit(in_one_thread(search), query, found, concurrency_limit=1, concurrency_id="model")
    return blocks


def decode_upload(data: bytes) -> np.ndarray:
    """Decodes an uploaded image to uint8 [h, w, 3], upright.

    Raises:
        BadSample: it is no image, is damaged, or has more than `MAX_PIXELS` pixels and is no JPEG.
    """
    try:
        with Image.open(io.BytesIO(data), formats=available_formats()) as image:
            kind, width, height = image.format, image.width, image.height
    except Exception:  # Pillow raises many types of errors on damaged files; `decode` says which damage it is
        kind, width, height = "", 0, 0
    if kind != "JPEG" and width * height > MAX_PIXELS:
        raise BadSample(f"the image has {width} × {height} pixels, more than the {MAX_PIXELS:,} allowed here")
    return decode(data, apply_orientation=True)


def embed_folder(predictor: Predictor, folder: Path) -> tuple[list[Path], np.ndarray]:
    """Embeds the readable images below a folder; the others are logged.

    Returns:
        The paths, and the embeddings fp32 [n, d].

    Raises:
        UserError: there is no readable image.
    """
    candidates = list(find_images(folder))
    paths, image_emb = [], []
    for start in range(0, len(candidates), CHUNK):
        prepared = []
        for path in candidates[start : start + CHUNK]:
            try:
                prepared.append(predictor.preprocess(path))
                paths.append(path)
            except UserError as error:
                log.warning("left out %s", error)
        if prepared:
            image_emb.append(predictor.encode_image(np.stack(prepared)))
    if not paths:
        raise UserError(f"{folder} has no readable image ({', '.join(IMAGE_EXTENSIONS)})")
    log.info("%d of %d images in %s can be searched", len(paths), len(candidates), folder)
    return paths, np.concatenate(image_emb)


def parse_class_names(text: str) -> list[str]:
    """Splits class names at commas and line ends, and keeps each once; unlike `read_class_names` it never opens a file.

    >>> parse_class_names("a cat, a dog,\\na cat")
    ['a cat', 'a dog']
    """
    names = list(dict.fromkeys(name.strip() for name in re.split(r"[,\n]", text) if name.strip()))
    if len(names) > MAX_CLASS_NAMES or max(map(len, names), default=0) > MAX_CHARACTERS:
        refuse(f"At most {MAX_CLASS_NAMES:,} class names of {MAX_CHARACTERS} characters each.")
    return names


def format_bars(rows: Sequence[tuple[str, float]]) -> str:
    """Formats names with their scores and bars as HTML."""
    lengths = figures.bar_lengths([score for _, score in rows])
    parts = [BAR.format(html.escape(name), s, 100 * length) for (name, s), length in zip(rows, lengths)]
    return f'<div class="bars">{"".join(parts)}</div>'


def refuse(message: str) -> NoReturn:
    """Shows a message on the page; the server continues."""
    raise gr.Error(message, print_exception=False)
