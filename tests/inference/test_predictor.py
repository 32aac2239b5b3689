"""Predictors: one model from a run, an export and the command line; every kind and number of images."""

import copy
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from zslflax.inference import export, predictor
from zslflax.inference.predictor import Predictor
from zslflax.predict import bars, main

NAMES = ["red circle", "blue square", "a cat"]
TEMPLATES = ["a photo of a {}."]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A place for an export, which all tests here share."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def predictor(tiny, finished):
    return Predictor.restore(finished)


@pytest.fixture
def exported(predictor, runs):
    if not (runs / "exported").is_dir():
        predictor.export(runs / "exported")
    return runs / "exported"


@pytest.fixture
def pictures():
    """Arrays of several sizes."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20 + 3 * i, 41 - 2 * i, 3), np.uint8) for i in range(11)]


def test_an_embedding_does_not_depend_on_its_batch(predictor, pictures):
    whole = predictor.encode_image(pictures)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1.0, atol=1e-6)
    assert whole.shape == (11, 8) and whole.dtype == np.float32
    for rows in ([4], [10, 0], [*range(11)] * 5):
        some = predictor.encode_image([pictures[i] for i in rows])
        np.testing.assert_allclose(some, whole[rows], atol=2e-6)
    np.testing.assert_array_equal(predictor.encode_image(pictures[::-1])[::-1], whole)  # in batches of one size
    texts = predictor.encode_text([f"{i} red circles" for i in range(40)])
    np.testing.assert_allclose(predictor.encode_text("7 red circles"), texts[7:8], atol=2e-6)


def test_none_and_one(predictor, pictures):
    for nothing in ([], np.empty((0, 16, 16, 3), np.uint8)):
        assert predictor.encode_image(nothing).shape == (0, 8)
        assert predictor.classify(nothing, NAMES) == [] and predictor.search("a cat", nothing) == []
    assert predictor.encode_text([]).shape == (0, 8)
    one = predictor.encode_image(pictures[0])
    assert one.shape == (1, 8)
    np.testing.assert_array_equal(one, predictor.encode_image([pictures[0]]))
    prepared = predictor.prepare(pictures[0])[None]
    np.testing.assert_array_equal(one, predictor.encode_image(prepared))


def test_every_kind_of_image_is_its_rgb(predictor, tmp_path):
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
    for kind, (images, rgb) in same.items():
        expected = predictor.prepare(np.array(rgb)).astype(int)
        for image in images:
            assert np.abs(predictor.prepare(image) - expected).max() <= 1, kind  # alpha's rounding
            assert predictor.encode_image(image).shape == (1, 8)


def test_what_is_no_image(predictor, tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"text.jpg: it is no image"):
        predictor.encode_image(tmp_path / "text.jpg")
    with pytest.raises(FileNotFoundError, match="nowhere.jpg"):
        predictor.encode_image([str(tmp_path / "nowhere.jpg")])
    for wrong in (np.zeros((9, 9, 3), np.float32), np.zeros((9, 9, 2), np.uint8), np.zeros(9, np.uint8)):
        with pytest.raises(ValueError, match=r"expected an image as uint8 \[h, w\]"):
            predictor.encode_image([wrong])
    with pytest.raises(ValueError, match=r"prepared images uint8 \[b, 16, 16, 3\], found uint8 \[2, 20, 20, 3\]"):
        predictor.encode_image(np.zeros((2, 20, 20, 3), np.uint8))


def test_classify_and_search_are_brute_force(predictor, pictures):
    templates = ["a {}", "two {}s"]
    classes = np.stack([predictor.encode_text([t.format(name) for t in templates]).mean(axis=0) for name in NAMES])
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    image_emb = predictor.encode_image(pictures)
    for row, answer in zip(image_emb @ classes.T, predictor.classify(pictures, NAMES, templates=templates, top_k=2)):
        assert [name for name, _ in answer] == [NAMES[i] for i in np.argsort(-row)[:2]]
        np.testing.assert_allclose([score for _, score in answer], np.sort(row)[:0:-1], atol=1e-5)
    assert len(predictor.classify(pictures[0], NAMES)[0]) == 3  # of three names

    fits = image_emb @ predictor.encode_text("a blue square")[0]
    found = predictor.search("a blue square", pictures, top_k=4)
    assert [i for i, _ in found] == np.argsort(-fits)[:4].tolist()
    np.testing.assert_allclose([score for _, score in found], -np.sort(-fits)[:4], atol=1e-5)
    assert predictor.search("a blue square", image_emb, top_k=4) == found
    assert len(predictor.search("a blue square", pictures, top_k=100)) == 11


def test_names_and_prompts_that_are_none(predictor, pictures):
    with pytest.raises(ValueError, match="empty: name 2 of 2"):
        predictor.classify(pictures, ["a cat", " "])
    with pytest.raises(ValueError, match="these have none.*a photo"):
        predictor.classify(pictures, NAMES, templates=["a photo"])
    with pytest.raises(ValueError, match="found k = 0"):
        predictor.classify(pictures, NAMES, top_k=0)


def test_embeddings_of_many_names_are_computed_once_for_a_run_and_its_export(
    workdir, exported, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(class_cache, "ENOUGH", len(NAMES))
    folder, computed = tmp_path / "classes", []

    def restore(source, **options):
        predictor, used = Predictor.restore(source, cache=str(folder), **options), []
        encode_text = predictor.encode_text
        monkeypatch.setattr(predictor, "encode_text", lambda texts: used.extend(texts) or encode_text(texts))
        computed.append(used)
        return predictor

    first = restore(workdir).class_embeddings(NAMES)
    assert len(computed[0]) == 3 and len(list(folder.iterdir())) == 1
    for source in (workdir, exported):
        np.testing.assert_array_equal(restore(source).class_embeddings(tuple(NAMES)), first)
        assert computed[-1] == []
    student = restore(workdir, use="student")
    assert np.abs(student.class_embeddings(NAMES) - first).max() > 1e-4
    earlier = restore(workdir, step=3)
    assert np.abs(earlier.class_embeddings(NAMES) - first).max() > 1e-4
    restore(workdir).class_embeddings(NAMES, ["the {}"])
    assert list(map(len, computed)) == [3, 0, 0, 3, 3, 3]
    assert len(list(folder.iterdir())) == 4

    (path,) = (path for path in folder.iterdir() if path == restore(workdir).class_cache.path(NAMES, TEMPLATES))
    path.write_bytes(path.read_bytes()[:-100])
    np.testing.assert_array_equal(restore(workdir).class_embeddings(NAMES), first)
    assert len(computed[-1]) == 3 and f"{path} cannot be used" in caplog.text
    restore(exported).class_embeddings(NAMES)
    assert computed[-1] == []


def test_what_is_trained_on_is_not_kept(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(class_cache, "ENOUGH", len(NAMES))
    predictor = Predictor.restore(workdir, cache=str(tmp_path / "classes"))
    predictor.with_variables(predictor.variables, 5).class_embeddings(NAMES)
    assert not (tmp_path / "classes").exists()


def test_the_identity_of_a_text_side(tiny, workdir, exported):
    """All that an embedding depends on tells two models apart, and nothing else does."""
    one, same = (Predictor.restore(source).identify_text() for source in (workdir, exported))
    assert one == same and json.loads(json.dumps(one)) == one
    predictor = Predictor.restore(workdir)
    params = jax.tree.map(np.array, predictor.variables["params"])
    params["text"]["projection"]["bias"] = np.nextafter(params["text"]["projection"]["bias"], 1)
    text = {"model.text.max_tokens": 10, "model.text.scratch.heads": 1, "compute_dtype": "bfloat16"}
    others = [Predictor(predictor.config, predictor.model, {"params": params}, predictor.tokenizer)]
    for field, value in text.items():
        config = copy.deepcopy(predictor.config)
        config.update_from_flattened_dict({field: value})
        model, tokenizer = predictor.build_model(config)
        others.append(Predictor(config, model, predictor.variables, tokenizer))
    for other in others:
        assert other.identify_text() != one


def test_an_exported_folder_gives_the_same_bits(predictor, exported, pictures):
    again = Predictor.restore(exported)
    assert again.step == 6 and again.tokenizer.identity == predictor.tokenizer.identity
    np.testing.assert_array_equal(again.encode_image(pictures), predictor.encode_image(pictures))
    np.testing.assert_array_equal(again.encode_text(NAMES), predictor.encode_text(NAMES))
    assert again.classify(pictures, NAMES) == predictor.classify(pictures, NAMES)  # with the run's prompts
    shapes = {name: x.shape for name, x in load_file(exported / export.WEIGHTS).items()}
    assert shapes["params/objective/log_logit_scale"] == () and shapes["params/text/projection/kernel"] == (
        16,
        8,
    )
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    tokenizer = {f"text_encoder/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "identity.json")}
    assert files == {"README.md", "config.json", "model.safetensors"} | tokenizer


def test_an_export_tells_nothing_of_the_machine_that_trained_it(finished, exported, scenes_root):
    assert str(scenes_root) in (finished / "config.json").read_text()
    for path in exported.rglob("*.*"):
        assert str(scenes_root) not in path.read_text(errors="replace")
        assert str(finished) not in path.read_text(errors="replace")


def test_an_export_can_be_exported_and_moved(predictor, exported, tmp_path):
    Predictor.restore(exported).export(tmp_path / "second")
    shutil.move(tmp_path / "second", tmp_path / "third")
    again = Predictor.restore(str(tmp_path / "third"))
    np.testing.assert_array_equal(again.encode_text(NAMES), predictor.encode_text(NAMES))
    with pytest.raises(FileExistsError, match="third is not empty"):
        again.export(tmp_path / "third")


def test_a_pretrained_encoders_sizes_are_exported_with_it(tiny, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"vocab_size": 30_522, "max_position_embeddings": 12, "type_vocab_size": 2, "model_type": "bert"}
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(sizes))
    tiny.model.text.pretrained = str(tmp_path / "encoder")
    tiny.model.image.pretrained = str(tmp_path / "tower")
    model, tokenizer = predictor.build_model(tiny)
    image, text = np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, 12), np.int32)
    variables = jax.jit(model.init)(jax.random.key(0), image, text, text == 0)
    predictor = Predictor(tiny, model, variables, tokenizer)
    predictor.export(tmp_path / "exported")
    assert str(tmp_path) not in (tmp_path / "exported" / "config.json").read_text()
    shutil.rmtree(tmp_path / "encoder")
    again = Predictor.restore(tmp_path / "exported")
    assert (16, 24) in {x.shape for x in jax.tree.leaves(again.variables["params"]["text"]["tower"])}
    np.testing.assert_array_equal(again.encode_text(NAMES), predictor.encode_text(NAMES))


def test_an_exported_folder_loads_without_orbax_torch_or_tensorflow(exported):
    program = (
        "import sys; from zslflax.models import vit; vit.VITS['vit_nano4'] = (8, 16, 1, 2)\n"
        "from zslflax.predict import Predictor\n"
        "Predictor.restore(sys.argv[1]).encode_text('a cat')\n"
        "print({name.partition('.')[0] for name in sys.modules} & "
        "{'orbax', 'torch', 'tensorflow', 'tensorflow_datasets', 'grain', 'transformers'})"
    )
    result = subprocess.run([sys.executable, "-c", program, exported], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("kind", ["run", "exported"])
def test_another_tokenizer_is_refused(finished, exported, tmp_path, kind):
    folder = shutil.copytree({"run": finished, "exported": exported}[kind], tmp_path / "copy")
    path = folder / "text_encoder" / "tokenizer.json"
    rules = json.loads(path.read_text())
    vocabulary = rules["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    path.write_text(json.dumps(rules))
    with pytest.raises(ValueError, match="not the one that the model was trained with"):
        Predictor.restore(folder)
    (folder / "text_encoder" / "identity.json").unlink()
    with pytest.raises(FileNotFoundError, match="identity.json is missing"):
        Predictor.restore(folder)


def test_what_is_no_model(exported, finished, tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json: expected the --workdir of a training run, or an exp"):
        Predictor.restore(tmp_path)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint of step 2; found steps 3, 6"):
        Predictor.restore(finished, step=2)
    for wrong in ({"step": 4}, {"use": "student"}):
        with pytest.raises(ValueError, match="no steps and no student"):
            Predictor.restore(exported, **wrong)
    folder = shutil.copytree(exported, tmp_path / "copy")
    weights = (folder / export.WEIGHTS).read_bytes()
    (folder / export.WEIGHTS).write_bytes(weights[:-10])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        Predictor.restore(folder)
    save_file({"x": np.zeros(1)}, folder / export.WEIGHTS)
    (folder / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(ValueError, match="no model that zslflax exported"):
        Predictor.restore(folder)


def run_program(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    main()
    return capsys.readouterr().out


def test_the_command_line(predictor, exported, pictures, tmp_path, monkeypatch, capsys):
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for path, picture in zip(paths, pictures):
        Image.fromarray(picture).save(path)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    expected = predictor.classify(paths, NAMES, top_k=2)
    command = *paths, f"--workdir={exported}", "--top=2"
    for names in (",".join(NAMES), tmp_path / "names.txt"):
        lines = run_program(monkeypatch, capsys, *command, f"--names={names}").splitlines()
        assert [lines[0], lines[3]] == list(map(str, paths)) and len(lines) == 6
        for line, (name, score) in zip(lines[1:3] + lines[4:], expected[0] + expected[1]):
            assert line.strip().startswith(name) and line.endswith(f" {score:.3f}")
    other = run_program(
        monkeypatch, capsys, *command, "--names=a cat,a dog", "--templates=the {}", f"--png={tmp_path}/p.png"
    )
    assert other == ""
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 600 and len(picture.getcolors(1 << 20)) > 100
    run_program(monkeypatch, capsys, f"--workdir={exported}", f"--export={tmp_path / 'copy'}")
    assert Predictor.restore(tmp_path / "copy").step == 6
    for incomplete in ([], [paths[0]], ["--names=a cat,a dog"], [paths[0], f"--export={tmp_path / 'other'}"]):
        with pytest.raises(SystemExit):
            run_program(monkeypatch, capsys, f"--workdir={exported}", *incomplete)
        assert "give images and --names" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_bars_have_their_scores_lengths():
    lines = bars([("cat", 0.5), ("a dog", 0.25), ("x", -0.5)], width=16)
    assert lines[0] == "  cat    " + "█" * 16 + "  0.500"
    assert lines[1] == "  a dog  " + "█" * 12 + " " * 4 + "  0.250"
    assert lines[2] == "  x      " + " " * 16 + "  -0.500"
    assert "█▌ " in bars([("a", 1.0), ("b", 0.15)], width=10)[1]
