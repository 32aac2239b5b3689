"""What image embeddings are worth on a new dataset: few-shot episodes, nearest neighbours, a linear probe.

Embeddings are made unit vectors first, and every image has exactly one class.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zslflax.errors import UserError
from zslflax.evaluation.bootstrap import bootstrap, bounds
from zslflax.inference.class_embeddings import l2_normalize
from zslflax.inference.top_k import top_k

AT_ONCE = 50  # episodes
MAX_ITERATIONS = 200  # of L-BFGS; unit vectors of 8 dimensions needed 20 to 110, with C from 1 to 10,000
TOLERANCE = 1e-6  # largest component of the gradient of the mean loss, at which it ends
PROBE_C = tuple(10.0**i for i in range(-1, 6))


def episodes(labels, ways: int, shots: int, queries: int, number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draws N-way K-shot episodes: image numbers int64 [number, ways, shots] and [number, ways, queries].

    An episode has `ways` different classes and `shots + queries` different images of each; both uniformly,
    classes among those with enough images.

    Raises:
        ValueError: fewer than `ways` classes have enough images.
    """
    labels, size = np.asarray(labels), shots + queries
    if min(ways, shots, queries, number) < 1:
        raise UserError(f"expected at least one of each, found {ways=}, {shots=}, {queries=}, {number} episodes")
    images = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    enough = [of_class for of_class in images if len(of_class) >= size]
    if len(enough) < ways:
        raise UserError(
            f"only {len(enough)} of {len(images)} classes have {shots} + {queries} images, but an episode has "
            f"{ways} classes"
        )
    rng = np.random.default_rng(seed)
    drawn = np.array(
        [[rng.choice(enough[c], size, False) for c in rng.choice(len(enough), ways, False)] for _ in range(number)]
    )
    return drawn[:, :, :shots], drawn[:, :, shots:]


def few_shot(
    embeddings,
    labels,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    number: int = 600,
    C: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy on the queries of N-way K-shot episodes, mean over episodes, of two classifiers.

    "centroid": a query is of the class whose mean over the shots is nearest (Snell et al. 2017); "logistic":
    of the class most probable by the `logistic_regression` of the shots. The 95% interval "…/low", "…/high"
    is mean ± 1.96 · standard deviation / √number, as is usual; it says how well the mean over all episodes
    of this dataset is known, not how another dataset's would differ.

    Args:
        embeddings: [n, d]; labels: int [n].
        ways, shots, queries, number, seed: see `episodes`.
        C: see `logistic_regression`.
    """
    embeddings, labels = check(embeddings, labels)
    shown, asked = episodes(labels, ways, shots, queries, number, seed)
    true = np.repeat(np.arange(ways), queries)
    targets = jnp.asarray(np.repeat(np.arange(ways), shots), jnp.int32)

    def of_episode(table, chosen):
        support, query = table[chosen[0]], table[chosen[1]]  # [ways, shots, d] and [ways · queries, d]
        centroids = support.mean(axis=1)
        # |q − c|² without |q|², which is the same for all classes.
        distance = jnp.sum(centroids**2, axis=1) - 2 * matmul(query, centroids.T)
        weights, bias = logistic_regression(support.reshape(-1, query.shape[1]), targets, ways, C)
        answers = jnp.argmin(distance, axis=1), jnp.argmax(matmul(query, weights) + bias, axis=1)
        return jnp.stack([jnp.mean((answer == true).astype(jnp.float32)) for answer in answers])

    @jax.jit
    def accuracies(table, *chosen):
        each = functools.partial(of_episode, table)
        return jax.lax.map(each, chosen, batch_size=min(AT_ONCE, number))

    found = accuracies(jnp.asarray(embeddings), jnp.asarray(shown), jnp.asarray(asked.reshape(number, -1)))
    metrics = {}
    for name, values in zip(("centroid", "logistic"), np.asarray(found, np.float64).T):
        mean, half = values.mean(), 1.96 * values.std(ddof=1) / np.sqrt(number) if number > 1 else np.nan
        metrics |= {name: float(mean), f"{name}/low": float(mean - half), f"{name}/high": float(mean + half)}
    return metrics


def logistic_regression(x, y, classes: int, C: float):
    """The minimum of multinomial logistic regression, by L-BFGS: weights [d, classes] and bias [classes].

        Σ_i −log softmax(x_i W + b)_{y_i} + |W|² / (2 C)

    as scikit-learn has it; the bias has no penalty. Fit for jit and vmap.

    Args:
        x: fp32 [n, d]; y: int32 [n], below `classes`.
        C: a larger one fits the data more closely.
    """

    def loss(params):
        weights, bias = params
        losses = optax.softmax_cross_entropy_with_integer_labels(matmul(x, weights) + bias, y)
        return jnp.mean(losses) + jnp.sum(weights**2) / (2 * C * len(x))

    tx, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def step(carry):
        params, state, iteration, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        steepest = jnp.maximum(*(jnp.max(jnp.abs(g)) for g in grad))
        return optax.apply_updates(params, updates), state, iteration + 1, steepest

    def goes_on(carry):
        return (carry[2] < MAX_ITERATIONS) & (carry[3] > TOLERANCE)

    params = jnp.zeros((x.shape[1], classes), jnp.float32), jnp.zeros(classes, jnp.float32)
    return jax.lax.while_loop(goes_on, step, (params, tx.init(params), 0, jnp.float32(jnp.inf)))[0]


fit = jax.jit(logistic_regression, static_argnames="classes")


def matmul(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def nearest_neighbours(
    train_emb, train_labels, test_emb, test_labels, *, k: int = 20, resamples: int = 0, seed: int = 0
) -> dict[str, float]:
    """Accuracy of the vote of the k nearest training images; of classes with equal votes, the lowest.

    Args:
        train_emb: [n, d]; train_labels: int [n]; test_emb: [m, d]; test_labels: int [m].
        k: at most n.
        resamples: above 0 adds a 95% interval of the bootstrap over test images.
    """
    train_emb, train_labels = check(train_emb, train_labels)
    test_emb, test_labels = check(test_emb, test_labels, among=train_labels)
    if not 1 <= k <= len(train_emb):
        raise UserError(f"expected k between 1 and the {len(train_emb)} training images, found k = {k}")
    _, neighbours = top_k(test_emb, train_emb, k)
    answers = np.array([np.bincount(votes).argmax() for votes in train_labels[neighbours]])
    return accuracy(answers == test_labels, resamples, seed)


def linear_probe(
    train_emb,
    train_labels,
    test_emb,
    test_labels,
    *,
    Cs=PROBE_C,
    resamples: int = 0,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy of logistic regression on the embeddings, with the C that is best on a held-out fifth.

    The fifth is of the training images, which are all used for the final fit; of equally good Cs the smallest
    counts.

    Args:
        train_emb: [n, d]; train_labels: int [n]; test_emb: [m, d]; test_labels: int [m].
        Cs: see `logistic_regression`.
        resamples: above 0 adds a 95% interval of the bootstrap over test images.
        seed: of the held-out fifth and of the resamples.

    Returns {"accuracy": …, "C": the one chosen}.
    """
    train_emb, train_labels = check(train_emb, train_labels)
    test_emb, test_labels = check(test_emb, test_labels, among=train_labels)
    if len(train_labels) < 2:
        raise UserError("expected at least two training images, of which one is held out, found 1")
    known, y = np.unique(train_labels, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(y))
    held, rest = np.split(order, [max(1, len(y) // 5)])

    def answers(C, shown, asked):
        weights, bias = fit(jnp.asarray(train_emb[shown]), jnp.asarray(y[shown], jnp.int32), len(known), C)
        return np.asarray(jnp.argmax(matmul(asked, weights) + bias, axis=1))

    scores = [np.mean(answers(C, rest, train_emb[held]) == y[held]) for C in sorted(Cs)]
    C = sorted(Cs)[int(np.argmax(scores))]
    correct = known[answers(C, np.arange(len(y)), test_emb)] == test_labels
    return accuracy(correct, resamples, seed) | {"C": C}


def accuracy(correct: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    means, draws = bootstrap({"accuracy": (correct, np.ones(len(correct)))}, resamples, seed)
    return means | bounds(draws)


def check(embeddings, labels, among=None) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings fp32 [n, d] and labels int64 [n]; test images' have to be `among` the training images'."""
    embeddings, labels = np.asarray(embeddings, np.float32), np.asarray(labels)
    if labels.shape != (len(embeddings),) or labels.dtype.kind not in "iu" or not len(labels):
        raise UserError(
            f"expected one class number for each of {len(embeddings)} images (≥ 1), found labels of shape "
            f"{labels.shape} and type {labels.dtype}; leave out images with several labels or none"
        )
    if labels.min() < 0:
        raise UserError(f"expected labels from 0 on, found {labels.min()}")
    if among is not None and len(unknown := np.setdiff1d(labels, among)):
        raise UserError(f"{len(unknown)} classes have test images and no training image; the first is {unknown[0]}")
    return l2_normalize(embeddings), labels.astype(np.int64)
