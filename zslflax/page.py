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

import numpy as np
from PIL import Image

from zslflax import figures
from zslflax.data.images import IMAGE_EXTENSIONS, BadSample, available_formats, decode
from zslflax.errors import MissingLibraryError, UserError
from zslflax.files import read_bytes
from zslflax.inference.embed_files import embed_files
from zslflax.inference.image_input import find_images, read_image
from zslflax.inference.predictor import Predictor
from zslflax.page_guard import Guard
from zslflax.progress import Progress

try:
    import gradio as gr
    from starlette.middleware import Middleware
except ImportError as error:
    raise MissingLibraryError(f'{error}; pip install "zslflax[app]"') from error

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
HINT = "Type class names, with commas between them."
BAR = (
    '<div class="row"><span class="name">{}</span>'
    '<span><b class="probability">{:.0%}</b> <span class="score">{:.3f}</span></span>'
    '<div class="track"><div class="bar" style="width: {:.1f}%"></div></div></div>'
)
SOFTMAX = (
    "<b>Bold</b>: the probability of each name, if exactly one of the names fits. Behind it and as a bar: the "
    "similarity of name and image, from −1 to 1, often 0.2 to 0.4 for true names; compare it within one list alone."
)
SIGMOID = (
    "<b>Bold</b>: the probability that the name fits, each by itself. Behind it and as a bar: the similarity of name "
    "and image, from −1 to 1."
)
CSS = """
footer { display: none !important }
#found .grid-wrap { overflow-y: auto }
.bars .row { display: grid; grid-template-columns: 1fr auto; margin-bottom: 10px }
.bars .name { overflow-wrap: anywhere }
.bars .score { font-variant-numeric: tabular-nums; opacity: 0.7 }
.bars .track { grid-column: 1 / 3; background: var(--background-fill-secondary) }
.bars .bar { background: var(--color-accent) }
.explained { font-size: 0.9em; opacity: 0.7; margin-top: 6px }
#found .caption-label { max-width: 94% }
#search { align-self: end; min-width: 100px; height: 42px }
@media (max-width: 640px) {
  #found .grid-container { grid-template-columns: repeat(3, 1fr) !important }
  .gradio-container { padding: 8px !important }
}
.bars .track, .bars .bar { height: 10px; border-radius: 5px }
"""


def serve_page(
    predictor: Predictor, folder: Path | None, host: str, port: int, class_names: Sequence[str] = ()
) -> None:
    """Serves the page until the program is interrupted.

    Args:
        predictor: the model.
        folder: whose images can be searched, or None.
        host: to serve on; "127.0.0.1" answers this machine only.
        port: to serve on.
        class_names: that the page starts with.

    Raises:
        UserError: the folder has no readable image.
    """
    blocks = build_page(predictor, folder, class_names)
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


def build_page(predictor: Predictor, folder: Path | None, class_names: Sequence[str] = ()) -> gr.Blocks:
    """Builds the page, with a search if there is a folder."""
    # Each thread keeps the memory of the largest image that it has decoded: one thread for all images.
    executor = ThreadPoolExecutor(1)

    def call_model(events: Sequence[Any], function: Callable[..., Any], inputs: Any, outputs: Any) -> None:
        """Calls a function at each event, but one call of the model at a time."""
        in_one_thread = functools.wraps(function)(lambda *args: executor.submit(function, *args).result())
        gr.on(events, in_one_thread, inputs, outputs, concurrency_limit=1, concurrency_id="model")

    with gr.Blocks(title="zslflax", analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)) as blocks:
        add_classification(predictor, class_names, call_model)
        if folder is not None:
            add_search(predictor, folder, call_model)
    return blocks


def add_classification(predictor: Predictor, class_names: Sequence[str], call_model: Callable[..., None]) -> None:
    """Adds the part of the page that classifies an image; `call_model` is that of `build_page`."""
    explanation = SIGMOID if predictor.config.objective.name == "sigmoid" else SOFTMAX

    def classify(upload: str | None, text: str) -> tuple[Image.Image, str]:
        if not upload:
            refuse("Drop an image first.")
        try:
            image = decode_upload(read_bytes(Path(upload), MAX_UPLOAD))
        except UserError as error:
            refuse(f"This file can't be used: {error}.")
        if not (names := parse_class_names(text)):
            return figures.fit_image(image, SIDE), HINT
        (answer,) = predictor.classify(image, names, top_k=SHOWN_CLASSES, probabilities=True)
        return figures.fit_image(image, SIDE), format_bars(answer) + f'<div class="explained">{explanation}</div>'

    gr.Markdown(f"## Classify an image\nwith {predictor.config.name} at step {predictor.step:,}")
    with gr.Row():
        with gr.Column():
            upload = gr.File(label="Image", file_types=["image"], height=150, elem_id="upload")
            names = gr.Textbox(
                ", ".join(name for name in class_names if not re.search(r"[,\n]", name)),
                label="Class names, with commas between them",
                placeholder="red circle, blue fish, …",
                lines=3,
                max_lines=8,
                elem_id="names",
            )
            button = gr.Button("Classify", variant="primary", elem_id="classify")
        with gr.Column():
            shown = gr.Image(show_label=False, interactive=False, height=250, buttons=[], elem_id="shown")
            scores = gr.HTML(elem_id="scores")
    call_model([upload.upload, names.submit, button.click], classify, [upload, names], [shown, scores])
    upload.clear(lambda: (None, ""), None, [shown, scores])


def add_search(predictor: Predictor, folder: Path, call_model: Callable[..., None]) -> None:
    """Adds the part of the page that finds images; `call_model` is that of `build_page`."""
    root, (paths, image_emb) = folder.resolve(), embed_folder(predictor, folder)

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
                yield figures.fit_image(read_image(path), SIDE), f"{score:.3f}  {path.name}"
            except UserError as error:  # it was removed or replaced since the start
                log.warning("left out of the answer: %s", error)

    gr.Markdown(f"## Find images\namong the {len(paths):,} in {folder.name}")
    with gr.Row():
        example = "a red circle next to a blue fish"
        query = gr.Textbox(label="Sentence", placeholder=example, max_lines=1, scale=5, elem_id="query")
        start = gr.Button("Search", variant="primary", scale=1, elem_id="search")
    found = gr.Gallery(show_label=False, columns=6, height="auto", buttons=[], elem_id="found")
    gr.Markdown("On each image: the similarity of sentence and image, from −1 to 1, and the file's name.")
    call_model([query.submit, start.click], search, query, found)


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
    progress = Progress("embedding images", "images", len(candidates))

    def counted() -> Iterator[Path]:
        for path in candidates:
            yield path
            progress.update(1)

    paths, image_emb = embed_files(predictor, counted(), lambda error: log.warning("left out %s", error))
    if not paths:
        raise UserError(f"{folder} has no readable image ({', '.join(IMAGE_EXTENSIONS)})")
    log.info("%d of %d images in %s can be searched", len(paths), len(candidates), folder)
    return paths, image_emb


def parse_class_names(text: str) -> list[str]:
    """Splits class names at commas and line ends, and keeps each once; unlike `read_class_names` it never opens a file.

    >>> parse_class_names("a cat, a dog,\\na cat")
    ['a cat', 'a dog']
    """
    names = list(dict.fromkeys(name.strip() for name in re.split(r"[,\n]", text) if name.strip()))
    if len(names) > MAX_CLASS_NAMES or max(map(len, names), default=0) > MAX_CHARACTERS:
        refuse(f"At most {MAX_CLASS_NAMES:,} class names of {MAX_CHARACTERS} characters each.")
    return names


def format_bars(rows: Sequence[tuple[str, float, float]]) -> str:
    """Formats names with their similarities, as bars too, and their probabilities as HTML."""
    lengths = figures.bar_lengths([score for _, score, _ in rows])
    parts = [
        BAR.format(html.escape(name), probability, score, 100 * length)
        for (name, score, probability), length in zip(rows, lengths)
    ]
    return f'<div class="bars">{"".join(parts)}</div>'


def refuse(message: str) -> NoReturn:
    """Shows a message on the page; the server continues."""
    raise gr.Error(message, print_exception=False)
