"""The `Predictor`: embeddings, classification and search of every kind and number of images."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.testing.range_server import serve
from zslflax.errors import UserError
from zslflax.inference import class_cache
from zslflax.inference.predictor import Predictor
from zslflax.inference.restore import build_model

CLASS_NAMES = ["red circle", "blue square", "a cat"]
TEMPLATES = ["a photo of a {}."]


def test_an_embedding_does_not_depend_on_its_batch(predictor, images):
    whole = predictor.encode_image(images)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1.0, atol=1e-6)
    assert whole.shape == (11, 8) and whole.dtype == np.float32
    for rows in ([4], [10, 0], [*range(11)] * 5):
        some = predictor.encode_image([images[i] for i in rows])
        np.testing.assert_allclose(some, whole[rows], atol=2e-6)
    np.testing.assert_array_equal(predictor.encode_image(images[::-1])[::-1], whole)  # in batches of one size
    texts = predictor.encode_text([f"{i} red circles" for i in range(40)])
    np.testing.assert_allclose(predictor.encode_text("7 red circles"), texts[7:8], atol=2e-6)


def test_no_image_and_one_image_are_accepted(predictor, images):
    for nothing in ([], np.empty((0, 16, 16, 3), np.uint8)):
        assert predictor.encode_image(nothing).shape == (0, 8)
        assert predictor.classify(nothing, CLASS_NAMES) == [] and predictor.search("a cat", nothing) == []
    assert predictor.encode_text([]).shape == (0, 8)
    one = predictor.encode_image(images[0])
    assert one.shape == (1, 8)
    np.testing.assert_array_equal(one, predictor.encode_image([images[0]]))
    preprocessed = predictor.preprocess(images[0])[None]
    np.testing.assert_array_equal(one, predictor.encode_image(preprocessed))


def test_every_kind_of_image_is_converted_to_rgb(predictor, tmp_path):
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 30), np.uint8))
    colour = Image.merge("RGB", [grey, grey.transpose(Image.Transpose.ROTATE_180), grey])
    see_through = colour.copy()
    see_through.putalpha(grey)
    on_white = Image.composite(colour, Image.new("RGB", colour.size, "white"), grey)
    colour.save(tmp_path / "colour.png")
    same = {
        "grey": ([grey, np.array(grey)], grey.convert("RGB")),
        "CMYK": ([colour.convert("CMYK")], colour),
        "RGBA": ([see_through, np.array(see_through)], on_white),
        "palette": ([colour.quantize(8)], colour.quantize(8).convert("RGB")),
        "16 bits": ([Image.fromarray(np.array(grey, np.uint16) * 257)], grey.convert("RGB")),
        "path": ([tmp_path / "colour.png", str(tmp_path / "colour.png")], colour),
    }
    for kind, (equal_images, rgb) in same.items():
        expected = predictor.preprocess(np.array(rgb)).astype(int)
        for image in equal_images:
            assert np.abs(predictor.preprocess(image) - expected).max() <= 1, kind  # rounding of the alpha channel
            assert predictor.encode_image(image).shape == (1, 8)


def test_inputs_that_are_no_images_are_refused(predictor, tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"text.jpg: the data is not an image"):
        predictor.encode_image(tmp_path / "text.jpg")
    with pytest.raises(FileNotFoundError, match="nowhere.jpg"):
        predictor.encode_image([str(tmp_path / "nowhere.jpg")])
    for wrong in (np.zeros((9, 9, 2), np.uint8), np.zeros(9, np.uint8)):
        with pytest.raises(ValueError, match=r"expected an image as uint8 \[h, w\]"):
            predictor.encode_image([wrong])
    with pytest.raises(ValueError, match=r"preprocessed images uint8 \[b, 16, 16, 3\], found uint8 \[2, 20, 20, 3\]"):
        predictor.encode_image(np.zeros((2, 20, 20, 3), np.uint8))


def test_arrays_of_jax_and_pytorch_are_one_image_each(require, predictor, images):
    torch = require("torch")
    (expected,) = predictor.classify(images[0], CLASS_NAMES)
    for image in (jnp.asarray(images[0]), torch.from_numpy(images[0]), images[0] / np.float32(255)):
        assert predictor.classify(image, CLASS_NAMES) == [expected]
    np.testing.assert_array_equal(predictor.encode_image(iter(images)), predictor.encode_image(images))
    preprocessed = np.stack([predictor.preprocess(image) for image in images])
    np.testing.assert_array_equal(
        predictor.encode_image(jnp.asarray(preprocessed)), predictor.encode_image(preprocessed)
    )


def test_a_string_of_class_names_is_a_file_or_a_list_and_never_letters(predictor, images, tmp_path):
    expected = predictor.classify(images[0], ["cat", "dog"])
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    for names in ("cat,dog", "cat, dog", str(tmp_path / "names.txt")):
        assert predictor.classify(images[0], names) == expected
    with pytest.raises(UserError, match="'cat' is neither a file that exists nor names with commas between them"):
        predictor.classify(images[0], "cat")
    assert predictor.classify(images[0], "cat,dog", templates="the {}") == predictor.classify(
        images[0], ["cat", "dog"], templates=["the {}"]
    )


def test_several_queries_give_several_answers(predictor, images):
    queries = ["a blue square", "a cat"]
    answers = predictor.search(queries, images, top_k=3)
    for query, answer in zip(queries, answers, strict=True):
        one = predictor.search(query, images, top_k=3)
        assert [i for i, _ in answer] == [i for i, _ in one]
        np.testing.assert_allclose([s for _, s in answer], [s for _, s in one], atol=1e-6)
    assert predictor.search(queries, []) == [[], []] and predictor.search([], images) == []
    image_emb = jnp.asarray(predictor.encode_image(images))
    assert predictor.search(queries, image_emb, top_k=3) == answers


def test_classify_and_search_equal_brute_force(predictor, images):
    templates = ["a {}", "two {}s"]
    classes = np.stack(
        [predictor.encode_text([t.format(name) for t in templates]).mean(axis=0) for name in CLASS_NAMES]
    )
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    image_emb = predictor.encode_image(images)
    for row, answer in zip(
        image_emb @ classes.T, predictor.classify(images, CLASS_NAMES, templates=templates, top_k=2)
    ):
        assert [name for name, _ in answer] == [CLASS_NAMES[i] for i in np.argsort(-row)[:2]]
        np.testing.assert_allclose([score for _, score in answer], np.sort(row)[:0:-1], atol=1e-5)
    assert len(predictor.classify(images[0], CLASS_NAMES)[0]) == 3  # there are three class names

    fits = image_emb @ predictor.encode_text("a blue square")[0]
    found = predictor.search("a blue square", images, top_k=4)
    assert [i for i, _ in found] == np.argsort(-fits)[:4].tolist()
    np.testing.assert_allclose([score for _, score in found], -np.sort(-fits)[:4], atol=1e-5)
    assert predictor.search("a blue square", image_emb, top_k=4) == found
    assert len(predictor.search("a blue square", images, top_k=100)) == 11


def test_blank_names_templates_without_a_place_and_k_of_0_are_refused(predictor, images):
    with pytest.raises(ValueError, match="empty: class name 2 of 2"):
        predictor.classify(images, ["a cat", " "])
    with pytest.raises(ValueError, match="these have none.*a photo"):
        predictor.classify(images, CLASS_NAMES, templates=["a photo"])
    with pytest.raises(ValueError, match="found k = 0"):
        predictor.classify(images, CLASS_NAMES, top_k=0)


def test_an_empty_query_is_refused(predictor, images):
    for query in ("", ["a cat", " "]):
        with pytest.raises(UserError, match="is empty; expected a sentence"):
            predictor.search(query, images)


def test_class_embeddings_are_computed_once_for_a_run_and_its_export(
    trained_workdir, exported, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(class_cache, "MIN_PROMPTS", len(CLASS_NAMES))
    folder, computed = tmp_path / "classes", []

    def restore(source, **options):
        predictor, used = Predictor.restore(source, cache=str(folder), **options), []
        encode_text = predictor.encode_text
        monkeypatch.setattr(predictor, "encode_text", lambda texts: used.extend(texts) or encode_text(texts))
        computed.append(used)
        return predictor

    first = restore(trained_workdir).class_embeddings(CLASS_NAMES)
    assert len(computed[0]) == 3 and len(list(folder.iterdir())) == 1
    for source in (trained_workdir, exported):
        np.testing.assert_array_equal(restore(source).class_embeddings(tuple(CLASS_NAMES)), first)
        assert computed[-1] == []
    student = restore(trained_workdir, use="student")
    assert np.abs(student.class_embeddings(CLASS_NAMES) - first).max() > 1e-4
    earlier = restore(trained_workdir, step=3)
    assert np.abs(earlier.class_embeddings(CLASS_NAMES) - first).max() > 1e-4
    restore(trained_workdir).class_embeddings(CLASS_NAMES, ["the {}"])
    assert list(map(len, computed)) == [3, 0, 0, 3, 3, 3]
    assert len(list(folder.iterdir())) == 4

    (path,) = (
        path for path in folder.iterdir() if path == restore(trained_workdir).class_cache.path(CLASS_NAMES, TEMPLATES)
    )
    path.write_bytes(path.read_bytes()[:-100])
    np.testing.assert_array_equal(restore(trained_workdir).class_embeddings(CLASS_NAMES), first)
    assert len(computed[-1]) == 3 and f"{path} cannot be used" in caplog.text
    restore(exported).class_embeddings(CLASS_NAMES)
    assert computed[-1] == []


def test_class_embeddings_of_a_model_in_training_are_not_cached(tiny_config, trained_workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(class_cache, "MIN_PROMPTS", len(CLASS_NAMES))
    predictor = Predictor.restore(trained_workdir, cache=str(tmp_path / "classes"))
    predictor.with_variables(predictor.variables, 5).class_embeddings(CLASS_NAMES)
    assert not (tmp_path / "classes").exists()


def test_the_identity_of_a_text_encoder_covers_weights_sizes_precision_and_tokenizer(
    tiny_config, trained_workdir, exported
):
    one, same = (Predictor.restore(source).text_encoder_identity() for source in (trained_workdir, exported))
    assert one == same and json.loads(json.dumps(one)) == one
    predictor = Predictor.restore(trained_workdir)
    params = jax.tree.map(np.array, predictor.variables["params"])
    params["text"]["projection"]["bias"] = np.nextafter(params["text"]["projection"]["bias"], 1)
    text = {"model.text.max_tokens": 10, "model.text.scratch.heads": 1, "compute_dtype": "bfloat16"}
    others = [Predictor(predictor.config, predictor.model, {"params": params}, predictor.tokenizer)]
    for field, value in text.items():
        config = copy.deepcopy(predictor.config)
        config.update_from_flattened_dict({field: value})
        model, tokenizer = build_model(config)
        others.append(Predictor(config, model, predictor.variables, tokenizer))
    for other in others:
        assert other.text_encoder_identity() != one


def test_folders_iterators_and_addresses_are_several_images(predictor, images, tmp_path):
    (tmp_path / "below").mkdir()
    paths = [tmp_path / name for name in ("a.png", "b.png", "below/c.png")]
    for path, image in zip(paths, images):
        Image.fromarray(image).save(path)
    (tmp_path / "notes.txt").write_text("no image")
    expected = predictor.encode_image(paths)
    np.testing.assert_array_equal(predictor.encode_image(tmp_path), expected)
    np.testing.assert_array_equal(predictor.encode_image(str(tmp_path)), expected)
    np.testing.assert_array_equal(predictor.encode_image(path for path in paths), expected)
    with serve(tmp_path) as server:
        addresses = [f"{server.url}/{path.relative_to(tmp_path)}" for path in paths]
        with pytest.raises(UserError, match="fetches nothing unless it is allowed: .*allow_urls=True"):
            predictor.encode_image(addresses)
        assert not server.requests
        allowed = copy.copy(predictor)
        allowed.allow_urls = True
        np.testing.assert_array_equal(allowed.encode_image(addresses), expected)
        with pytest.raises(UserError, match="nowhere.png cannot be read: HTTP Error 404"):
            allowed.encode_image(addresses[0].replace("a.png", "nowhere.png"))
        with pytest.raises(UserError, match="notes.txt: the data is not an image"):
            allowed.encode_image(addresses[0].replace("a.png", "notes.txt"))


def test_many_images_are_preprocessed_in_chunks(predictor, images, monkeypatch):
    expected = predictor.encode_image(images)
    monkeypatch.setattr("zslflax.inference.image_input.CHUNK", 4)
    np.testing.assert_allclose(predictor.encode_image(iter(images)), expected, atol=1e-6)
