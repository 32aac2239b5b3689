"""CLIP_benchmark measures a model with its own code, and finds what this project's evaluation finds."""

import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from zslflax.errors import MissingLibraryError
from zslflax.inference.clip_benchmark import load_clip, main
from zslflax.inference.predictor import Predictor
from zslflax.training.evaluate import evaluate_model

CLASS_NAMES = ["red circle", "green square", "blue star", "yellow ring", "purple cross", "white heart"]


class Images(list):
    """A dataset as CLIP_benchmark knows them: pairs of an image and its target, and the names of the classes."""

    classes = CLASS_NAMES


@pytest.fixture
def labelled(colour_folder, tmp_path):
    """A folder with images, their labels and two captions of each; and the same as pairs of an image and a target."""
    folder, images = tmp_path / "labelled", []
    folder.mkdir()
    for i, path in enumerate(sorted(colour_folder.rglob("*.png"))):
        label = next(label for label, name in enumerate(CLASS_NAMES) if path.parent.name in name)
        captions = [f"a {path.parent.name} shape {i}", f"one of {i} {path.parent.name} things"]
        (folder / f"{i:02}.png").write_bytes(path.read_bytes())
        (folder / f"{i:02}.cls").write_text(str(label))
        (folder / f"{i:02}.txt").write_text("\n".join(captions))
        images.append((Image.open(path), label, captions))
    return folder, images


def test_a_missing_library_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    monkeypatch.setattr(sys, "argv", ["clip-benchmark", "--model=runs/demo", "--dataset=cifar10"])
    with pytest.raises(MissingLibraryError, match="pip install clip-benchmark"):
        main()


def test_both_measure_the_same(require, learned_workdir, labelled, tmp_path):
    """Its class vectors, logits, recalls and mean average precision; its accuracy does not run with NumPy 2.4."""
    classification = require("clip_benchmark.metrics.zeroshot_classification")
    retrieval, sklearn = require("clip_benchmark.metrics.zeroshot_retrieval"), require("sklearn.metrics")
    torch = require("torch")
    folder, images = labelled
    model, transform, tokenizer = load_clip(pretrained=learned_workdir, model_name="any", cache_dir=None, device="cpu")
    model.eval()

    def batches(targets):
        pairs = [(transform(image), target) for (image, *_), target in zip(images, targets)]
        return torch.utils.data.DataLoader(Images(pairs), batch_size=7, collate_fn=lambda rows: collate(torch, rows))

    labels = torch.tensor([label for _, label, _ in images])
    templates, options = ["a photo of a {c}.", "the {c}"], {"device": "cpu", "amp": False}
    classifier = classification.zero_shot_classifier(model, tokenizer, CLASS_NAMES, templates, **options)
    logits, target = classification.run_classification(model, classifier, batches(labels), **options)
    top_k = lambda k: sklearn.top_k_accuracy_score(target, logits, k=k, labels=range(len(CLASS_NAMES)))
    one_hot = batches(torch.nn.functional.one_hot(labels, len(CLASS_NAMES)))
    found = classification.evaluate(model, one_hot, tokenizer, CLASS_NAMES, templates, **options)
    mean = found["mean_average_precision"] * len(CLASS_NAMES) / len(set(labels.tolist()))  # of classes with images
    captions = batches([texts for *_, texts in images])
    found = retrieval.evaluate(model, captions, tokenizer, recall_k_list=[1, 5], **options)

    overrides = {
        "eval.sets.test.data": str(folder),
        "eval.sets.test.class_names": ",".join(CLASS_NAMES),
        "eval.templates": ("a photo of a {}.", "the {}"),
        "eval.bootstrap_resamples": 0,
        "data.captions_per_line": True,
    }
    own = evaluate_model(str(learned_workdir), tmp_path / "run", overrides)
    for ours, theirs in (
        ("hit@1", top_k(1)),
        ("hit@5", top_k(5)),
        ("mAP", mean),
        ("retrieval/text_to_image@1", found["image_retrieval_recall@1"]),
        ("retrieval/text_to_image@5", found["image_retrieval_recall@5"]),
        ("retrieval/image_to_text@1", found["text_retrieval_recall@1"]),
        ("retrieval/image_to_text@5", found["text_retrieval_recall@5"]),
    ):
        assert theirs == pytest.approx(own[f"eval/test/{ours}"], abs=1e-6), ours


def collate(torch, rows):
    """A batch of CLIP_benchmark's: images in a tensor; and labels in a tensor, or lists of texts."""
    images, targets = zip(*rows)
    return torch.stack(images), targets if isinstance(targets[0], list) else torch.stack(targets)


def test_images_are_prepared_as_for_the_predictor_in_worker_processes_too(require, learned_workdir):
    require("torch")
    predictor = Predictor.restore(learned_workdir, cache="")
    model, transform, tokenizer = load_clip(str(learned_workdir))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8))
    pixels = pickle.loads(pickle.dumps(transform))(image)
    np.testing.assert_array_equal(pixels.numpy(), predictor.preprocess(image))
    np.testing.assert_allclose(model.encode_image(pixels[None]).numpy(), predictor.encode_image(image), atol=1e-6)
    texts = tokenizer(["a red circle", "blue"]).to("cpu")
    np.testing.assert_allclose(model.encode_text(texts).numpy(), predictor.encode_text(list(texts)), atol=1e-6)
