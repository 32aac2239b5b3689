"""How well image embeddings separate new classes: few-shot episodes, nearest neighbours and a linear probe.

Embeddings are normalised to unit vectors first, and every image has exactly one class.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

from zslflax.errors import UserError
from zslflax.evaluation.bootstrap import bootstrap, intervals
from zslflax.inference.class_embeddings import l2_normalize
from zslflax.inference.top_k import top_k

EPISODES_PER_BATCH = 50
MAX_ITERATIONS = 200  # of L-BFGS; unit vectors of 8 dimensions needed 20 to 110, with C from 1 to 10,000
TOLERANCE = 1e-6  # largest component of the gradient of the mean loss, at which L-BFGS ends
PROBE_C = tuple(10.0**i for i in range(-1, 6))


def draw_episodes(
    labels: ArrayLike, ways: int, shots: int, queries: int, num_episodes: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draws N-way K-shot episodes.

    An episode has `ways` different classes and `shots + queries` different images of each. Classes are drawn uniformly
    from those with enough images, and images uniformly from their class.

    >>> support, query = draw_episodes([0, 0, 1, 1, 2, 2], ways=2, shots=1, queries=1, num_episodes=10)
    >>> support.shape, query.shape
    ((10, 2, 1), (10, 2, 1))

    Args:
        labels: int [n], the class of each image.
        ways: classes per episode.
        shots: images of each class that the classifier learns from.
        queries: images of each class that it is tested on.
        num_episodes: how many episodes to draw.
        seed: of the draw.

    Returns:
        Indices of the images, int64 [num_episodes, ways, shots] and [num_episodes, ways, queries].

    Raises:
        UserError: fewer than `ways` classes have enough images, or a number is below 1.
    """
    labels, size = np.asarray(labels), shots + queries
    if min(ways, shots, queries, num_episodes) < 1:
        raise UserError(f"expected at least one of each, found {ways=}, {shots=}, {queries=}, {num_episodes=}")
    images = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    enough = [class_images for class_images in images if len(class_images) >= size]
    if len(enough) < ways:
        raise UserError(
            f"only {len(enough)} of {len(images)} classes have {shots} + {queries} images, but an episode has "
            f"{ways} classes; lower the ways, the shots or the queries, or give more images"
        )
    rng = np.random.default_rng(seed)
    drawn = np.array(
        [
            [rng.choice(enough[c], size, False) for c in rng.choice(len(enough), ways, False)]
            for _ in range(num_episodes)
        ]
    )
    return drawn[:, :, :shots], drawn[:, :, shots:]


def few_shot(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    support_views: ArrayLike | None = None,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    num_episodes: int = 600,
    C: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """Measures the accuracy of two classifiers on the queries of N-way K-shot episodes, as a mean over episodes.

    "centroid" assigns a query to the class whose mean over the shots is nearest (Snell et al. 2017), and "logistic" to
    the most probable class of the `logistic_regression` of the shots. The 95% interval "…/low", "…/high" is that of
    Student's t distribution over episodes, as usual. It says how well the mean over all episodes of this dataset is
    known, not how the mean on another dataset would differ.

    Args:
        embeddings: [n, d].
        labels: int [n].
        support_views: [n, v, d], embeddings of v augmented views of each image. The classifiers learn from all views
            of the shots, and not from the shots' own embeddings; None: from these.
        ways, shots, queries, num_episodes, seed: as in `draw_episodes`.
        C: as in `logistic_regression`.
    """
    embeddings, labels = check_images(embeddings, labels)
    views = embeddings[:, None] if support_views is None else l2_normalize(np.asarray(support_views, np.float32))
    if views.shape != (len(embeddings), views.shape[1], embeddings.shape[1]):
        raise ValueError(f"expected views of {embeddings.shape} embeddings, found {views.shape}")
    support, query = draw_episodes(labels, ways, shots, queries, num_episodes, seed)
    true = np.repeat(np.arange(ways), queries)
    targets = jnp.asarray(np.repeat(np.arange(ways), shots * views.shape[1]), jnp.int32)

    def episode_accuracies(views: jax.Array, embeddings: jax.Array, episode: tuple[jax.Array, jax.Array]) -> jax.Array:
        query_emb = embeddings[episode[1]]  # [ways · queries, d]
        shot_emb = views[episode[0]].reshape(ways, -1, query_emb.shape[1])  # [ways, shots · v, d]
        centroids = shot_emb.mean(axis=1)
        # |q − c|² without |q|², which is the same for all classes.
        distance = jnp.sum(centroids**2, axis=1) - 2 * matmul(query_emb, centroids.T)
        weights, bias = logistic_regression(shot_emb.reshape(-1, query_emb.shape[1]), targets, ways, C)
        answers = jnp.argmin(distance, axis=1), jnp.argmax(matmul(query_emb, weights) + bias, axis=1)
        return jnp.stack([jnp.mean((answer == true).astype(jnp.float32)) for answer in answers])

    @jax.jit
    def all_accuracies(views: jax.Array, embeddings: jax.Array, *episodes: jax.Array) -> jax.Array:
        batch_size = min(EPISODES_PER_BATCH, num_episodes)
        return jax.lax.map(functools.partial(episode_accuracies, views, embeddings), episodes, batch_size=batch_size)

    inputs = views, embeddings, support, query.reshape(num_episodes, -1)
    accuracies = np.asarray(all_accuracies(*map(jnp.asarray, inputs)), np.float64)
    metrics: dict[str, float] = {}
    for name, values in zip(("centroid", "logistic"), accuracies.T):
        half = t_interval(values)
        metrics |= {name: float(values.mean())}
        metrics |= {f"{name}/low": metrics[name] - half, f"{name}/high": metrics[name] + half}
    return metrics


def t_interval(values: np.ndarray) -> float:
    """Half the width of the 95% interval of a mean by Student's t distribution; NaN for one value.

    >>> round(t_interval(np.array([0.4, 0.6])), 3)  # 12.706 · 0.1414 / √2
    1.271
    """
    if len(values) < 2:
        return float("nan")
    return float(student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def logistic_regression(x: jax.Array, y: jax.Array, classes: int, C: float) -> tuple[jax.Array, jax.Array]:
    """Fits multinomial logistic regression by L-BFGS.

    It minimises, as scikit-learn does,

        Σ_i −log softmax(x_i W + b)_{y_i} + |W|² / (2 C)

    where the bias has no penalty. It can be mapped and compiled by `vmap` and `jit`.

    Args:
        x: fp32 [n, d].
        y: int32 [n], below `classes`.
        classes: c.
        C: the inverse of the penalty: a larger one fits the data more closely.

    Returns:
        W, fp32 [d, c], and b, fp32 [c].
    """

    def loss(params: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, bias = params
        losses = optax.softmax_cross_entropy_with_integer_labels(matmul(x, weights) + bias, y)
        return jnp.mean(losses) + jnp.sum(weights**2) / (2 * C * len(x))

    tx, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def step(carry: tuple) -> tuple:
        params, state, iteration, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        steepest = jnp.maximum(*(jnp.max(jnp.abs(g)) for g in grad))
        return optax.apply_updates(params, updates), state, iteration + 1, steepest

    def continues(carry: tuple) -> jax.Array:
        return (carry[2] < MAX_ITERATIONS) & (carry[3] > TOLERANCE)

    params = jnp.zeros((x.shape[1], classes), jnp.float32), jnp.zeros(classes, jnp.float32)
    return jax.lax.while_loop(continues, step, (params, tx.init(params), 0, jnp.float32(jnp.inf)))[0]


fit = jax.jit(logistic_regression, static_argnames="classes")


def matmul(a: jax.Array | np.ndarray, b: jax.Array | np.ndarray) -> jax.Array:
    """Matrix product in full fp32 precision."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def nearest_neighbours(
    train_emb: ArrayLike,
    train_labels: ArrayLike,
    test_emb: ArrayLike,
    test_labels: ArrayLike,
    *,
    k: int = 20,
    resamples: int = 0,
    seed: int = 0,
) -> dict[str, float]:
    """Measures the accuracy of a vote of the k nearest training images; of classes with equal votes the lowest wins.

    >>> nearest_neighbours(np.eye(2), [0, 1], [[0.9, 0.1]], [0], k=1)
    {'accuracy': 1.0}

    Args:
        train_emb: [n, d].
        train_labels: int [n].
        test_emb: [m, d].
        test_labels: int [m].
        k: at most n.
        resamples: above 0 adds the 95% interval of the bootstrap over test images.
        seed: of the resamples.
    """
    train_emb, train_labels = check_images(train_emb, train_labels)
    test_emb, test_labels = check_images(test_emb, test_labels, train_labels)
    if not 1 <= k <= len(train_emb):
        raise UserError(f"expected k between 1 and the {len(train_emb)} training images, found k = {k}")
    _, neighbours = top_k(test_emb, train_emb, k)
    answers = np.array([np.bincount(votes).argmax() for votes in train_labels[neighbours]])
    return accuracy(answers == test_labels, resamples, seed)


def linear_probe(
    train_emb: ArrayLike,
    train_labels: ArrayLike,
    test_emb: ArrayLike,
    test_labels: ArrayLike,
    *,
    Cs: Sequence[float] = PROBE_C,
    resamples: int = 0,
    seed: int = 0,
) -> dict[str, float]:
    """Measures the accuracy of logistic regression on the embeddings, with the C that is best on a held-out fifth.

    The fifth is of the training images. All of them are used for the final fit. Of equally good Cs the smallest is
    chosen.

    Args:
        train_emb: [n, d].
        train_labels: int [n].
        test_emb: [m, d].
        test_labels: int [m].
        Cs: as in `logistic_regression`.
        resamples: above 0 adds the 95% interval of the bootstrap over test images.
        seed: of the held-out fifth and of the resamples.

    Returns:
        {"accuracy": …, "C": the one chosen}.
    """
    train_emb, train_labels = check_images(train_emb, train_labels)
    test_emb, test_labels = check_images(test_emb, test_labels, train_labels)
    if len(train_labels) < 2:
        raise UserError("expected at least two training images, of which one is held out, found 1")
    classes, y = np.unique(train_labels, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(y))
    held_out, rest = np.split(order, [max(1, len(y) // 5)])

    def predict(C: float, fitted: np.ndarray, x: np.ndarray) -> np.ndarray:
        targets = jnp.asarray(y[fitted], jnp.int32)
        weights, bias = fit(jnp.asarray(train_emb[fitted]), targets, len(classes), C)
        return np.asarray(jnp.argmax(matmul(x, weights) + bias, axis=1))

    scores = [np.mean(predict(C, rest, train_emb[held_out]) == y[held_out]) for C in sorted(Cs)]
    C = sorted(Cs)[int(np.argmax(scores))]
    correct = classes[predict(C, np.arange(len(y)), test_emb)] == test_labels
    return accuracy(correct, resamples, seed) | {"C": C}


def accuracy(correct: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    """The share of the images that are classified correctly, with its 95% interval where there are resamples."""
    metrics, draws = bootstrap({"accuracy": (correct, np.ones(len(correct)))}, resamples, seed)
    for name, (low, high) in intervals(draws).items():
        metrics |= {f"{name}/low": low, f"{name}/high": high}
    return metrics


def check_images(
    embeddings: ArrayLike, labels: ArrayLike, known: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Checks embeddings and labels of images.

    Args:
        embeddings: [n, d].
        labels: int [n].
        known: the labels of the training images, among which those of test images must be.

    Returns:
        Unit embeddings fp32 [n, d] and labels int64 [n].

    Raises:
        UserError: there is not exactly one label per image, a label is below 0, or a class has no training image.
    """
    embeddings, labels = np.asarray(embeddings, np.float32), np.asarray(labels)
    if labels.shape != (len(embeddings),) or labels.dtype.kind not in "iu" or not len(labels):
        raise UserError(
            f"expected one class number for each of {len(embeddings)} images (≥ 1), found labels of shape "
            f"{labels.shape} and type {labels.dtype}; leave out images with several labels or none"
        )
    if labels.min() < 0:
        raise UserError(f"expected labels from 0 on, found {labels.min()}")
    if known is not None and len(unknown := np.setdiff1d(labels, known)):
        raise UserError(f"{len(unknown)} classes have test images and no training image; the first is {unknown[0]}")
    return l2_normalize(embeddings), labels.astype(np.int64)
