"""Writes the two towers as ONNX, for programs without jax, and checks that ONNX Runtime computes the same."""

import collections
import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.module import InterceptorContext
from ml_collections import ConfigDict

from zslflax.config import is_classifier
from zslflax.errors import MissingLibraryError, UserError
from zslflax.models.build import build_classifier, build_two_tower
from zslflax.models.depthwise import DepthwiseConv, grouped_convolution
from zslflax.models.resnet import ResNet
from zslflax.models.two_tower import TwoTower

log = logging.getLogger("zslflax")
IMAGE_TOWER, TEXT_TOWER = "image_tower.onnx", "text_tower.onnx"
MAX_WEIGHTS = 2**31 - 2**24  # bytes beside the graph in a protocol buffer of 2 GiB; more are in a second file
TOLERANCE = 1e-4  # largest difference of an element of a unit vector
CHECKED_BATCHES = (3, 1)  # batch sizes that are checked


def export_onnx(config: ConfigDict, variables: Any, folder: Path) -> None:
    """Writes image_tower.onnx and text_tower.onnx, with the projections; both compute in float32.

    Of a classifier, there is only image_tower.onnx, which gives `probabilities` float32 [batch, c].

    `image` uint8 [batch, s, s, 3] → `image_emb`, and `text` int32 [batch, t] with `text_mask` bool [batch, t] →
    `text_emb`; the outputs are unit vectors float32 [batch, d].

    Args:
        config: the whole config.
        variables: {"params", "batch_stats"}.
        folder: exists.

    Raises:
        MissingLibraryError: jax2onnx is not installed.
        UserError: ONNX Runtime computes something else.
    """
    model = (build_classifier if is_classifier(config) else build_two_tower)(config.model, dtype=jnp.float32)
    rng, size, tokens = np.random.default_rng(0), config.model.image.size, config.model.text.max_tokens
    batch = max(CHECKED_BATCHES)
    image = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
    variables = jax.device_get(variables)
    if model.text is None:
        export_function(
            lambda image: model.apply(variables, image, method=class_probabilities),
            {"image": image},
            "probabilities",
            folder / IMAGE_TOWER,
        )
        return
    text = rng.integers(0, model.text.tower.config.vocab_size, (batch, tokens)).astype(np.int32)
    mask = np.arange(tokens) < rng.integers(1, tokens + 1, (batch, 1))
    export_function(
        lambda image: model.apply(variables, image, method=encode_image),
        {"image": image},
        "image_emb",
        folder / IMAGE_TOWER,
    )
    export_function(
        lambda text, text_mask: model.apply(variables, text, text_mask, method="encode_text"),
        {"text": text, "text_mask": mask},
        "text_emb",
        folder / TEXT_TOWER,
    )


def encode_image(model: TwoTower, image: jax.Array) -> jax.Array:
    """The same as `TwoTower.encode_image`, all images at a time on every kind of device."""
    return model.project_image(model.image.features(model.normalise(image), train=False))


def class_probabilities(model: TwoTower, image: jax.Array) -> jax.Array:
    """Maps uint8 [b, s, s, 3] → the probabilities of a classifier's classes, fp32 [b, c]."""
    return jax.nn.softmax(encode_image(model, image))


def export_function(function: Callable[..., Any], example: dict[str, np.ndarray], output: str, path: Path) -> None:
    """Writes a function of arrays [batch, …] as ONNX, for batches of any size, and checks it on examples.

    Args:
        function: maps the arrays of `example`, in this order, to [batch, d].
        example: an array for each input, by name.
        output: name of the output.
        path: of the file.
    """
    to_onnx, inference_session = import_onnx_libraries()
    import onnx

    inputs = [jax.ShapeDtypeStruct(("batch", *x.shape[1:]), x.dtype) for x in example.values()]
    with quiet_libraries(), nn.intercept_methods(compute_for_onnx):
        model = to_onnx(
            function,
            inputs=inputs,
            model_name=path.stem,
            input_names=list(example),
            output_names=[output],
        )
    clip_between_constants(model.graph)
    del model.graph.value_info[:]  # some shapes that jax2onnx notes are wrong; ONNX Runtime infers them
    weights = path.with_name(f"{path.name}.data")
    weights.unlink(missing_ok=True)  # `onnx.save` would add to it
    size = sum(len(constant.raw_data) for constant in model.graph.initializer)  # `ByteSize` fails beyond the limit
    onnx.save(model, path, save_as_external_data=size > MAX_WEIGHTS, location=weights.name)
    check_session(inference_session(path), function, example, path)
    written = sum(file.stat().st_size for file in (path, weights) if file.exists())
    log.info("wrote %s (%.1f MB)", path, written / 1e6)


def compute_for_onnx(call: Callable[..., Any], arguments: Any, keywords: Any, context: InterceptorContext) -> Any:
    """Computes two operations of towers in the form that ONNX needs, for `nn.intercept_methods`."""
    module, method = context.module, context.method_name
    if isinstance(module, DepthwiseConv) and method == "convolve":
        # ONNX Runtime is many times faster at it than at the sum of shifted inputs that a CPU computes under jax.
        return grouped_convolution(arguments[0], arguments[1], module.stride, module.padding)
    if isinstance(module, ResNet) and method == "max_pool":
        # jax2onnx does not convert the padding of a pool. Zeros are as good as −∞ after a ReLU.
        padded = jnp.pad(arguments[0], ((0, 0), (1, 1), (1, 1), (0, 0)))
        return nn.max_pool(padded, window_shape=(3, 3), strides=(2, 2), padding="VALID")
    return call(*arguments, **keywords)


def clip_between_constants(graph: Any) -> None:
    """Replaces each Min(Max(x, low), high) by Clip(x, low, high), which ONNX Runtime joins to the convolution before.

    Args:
        graph: onnx.GraphProto, whose nodes are changed.
    """
    scalars = {constant.name for constant in graph.initializer if not constant.dims}
    uses = collections.Counter(name for node in graph.node for name in node.input)
    makers = {node.output[0]: node for node in graph.node if node.op_type == "Max" and uses[node.output[0]] == 1}
    for node in list(graph.node):
        inner = makers.get(node.input[0]) if node.op_type == "Min" else None
        if inner is not None and {inner.input[1], node.input[1]} <= scalars:
            node.op_type, node.input[:] = "Clip", [inner.input[0], inner.input[1], node.input[1]]
            graph.node.remove(inner)


def check_session(
    session: Any, function: Callable[..., Any], example: dict[str, np.ndarray], path: Path, atol: float = TOLERANCE
) -> None:
    """Raises a UserError where ONNX Runtime and jax differ by more than `atol`, for each of `CHECKED_BATCHES`."""
    for batch in CHECKED_BATCHES:
        rows = {name: x[:batch] for name, x in example.items()}
        (found,) = session.run(None, rows)
        expected = np.asarray(jax.jit(function)(*rows.values()))
        difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf
        if not difference <= atol:
            raise UserError(
                f"{path.name} computes something else than the model: the largest difference is {difference:g}, at "
                f"most {atol:g} is allowed; export without --onnx"
            )


def import_onnx_libraries() -> tuple[Any, Any]:
    """Imports jax2onnx and ONNX Runtime: the function that converts, and one that opens a file.

    Raises:
        MissingLibraryError: one of them is not installed.
    """
    try:
        import onnxruntime
        from jax2onnx import to_onnx
    except ImportError as error:
        raise MissingLibraryError(f'{error}; pip install "zslflax[onnx]"') from error
    open_session = lambda path: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return to_onnx, open_session


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences warnings about shapes and unused converters, and what jax2onnx prints of each convolution."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "jax2onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
