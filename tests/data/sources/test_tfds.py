"""Datasets written by tensorflow_datasets, for which it does not need TensorFlow, are read as records."""

import concurrent.futures
import io
import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from zslflax.data import images, pipeline
from zslflax.data.sources.tfds import TfdsSource


def jpeg(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8 + i, 9, 3), 40 * i % 256, np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write(folder, features, examples, *, file_format="array_record", config=None, version="1.0.0"):
    """Writes a dataset of the given examples of each split with a tfds builder."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features(tfds.features)))

        def _split_generators(self, _):
            return {split: self._generate_examples(rows) for split, rows in examples.items()}

        def _generate_examples(self, rows):
            yield from enumerate(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tqdm.auto.tqdm.display", lambda *_, **__: None)
        Tiny(data_dir=str(folder), file_format=file_format).download_and_prepare()


def coco(f):
    return {
        "image": f.Image(encoding_format="jpeg"),
        "captions": f.Sequence({"id": np.int64, "text": f.Text()}),
        "objects": f.Sequence({"label": f.ClassLabel(num_classes=40), "area": np.int64}),
        "image/filename": f.Text(),
    }


def coco_example(i):
    return {
        "image": io.BytesIO(jpeg(i)),
        "captions": [{"id": k, "text": f"é {i} {k}"} for k in range(i)],
        "objects": [{"label": c, "area": 5} for c in (i, 8, i)],
        "image/filename": f"{i}.jpg",
    }


def flat(f):
    return {
        "photo": f.Image(),
        "caption": f.Text(),
        "label": f.ClassLabel(names=["a", "b"]),
        "coarse": f.ClassLabel(num_classes=1),
    }


def by_caption(source):
    return {record["text"]: record for record in (source[i] for i in range(len(source)))}


def test_nested_captions_and_labels_are_found_as_in_coco_captions(tmp_path):
    write(tmp_path, coco, {"train": map(coco_example, range(5)), "test": map(coco_example, range(2))})
    source = TfdsSource("tiny", "train", tmp_path)
    assert len(source) == 5 and len(TfdsSource("tiny", "test", tmp_path)) == 2
    assert source.classes is None
    records = by_caption(source)
    for i in range(5):
        record = records[tuple(f"é {i} {k}" for k in range(i))]
        assert record["image"] == jpeg(i)  # the very bytes that were written
        assert record["label"] == (i, 8)
        assert all(type(c) is int for c in record["label"]) and all(type(t) is str for t in record["text"])
    assert [source[i]["name"].rpartition(":") for i in (0, 4)] == [
        ("tfds:tiny/train", ":", "0"),
        ("tfds:tiny/train", ":", "4"),
    ]


def test_flat_features_are_found_under_other_names(tmp_path):
    rows = [{"photo": io.BytesIO(jpeg(i)), "caption": f"c{i}", "label": i % 2, "coarse": 0} for i in range(4)]
    write(tmp_path, flat, {"train": rows})
    source = TfdsSource("tiny", "train[:50%]", tmp_path)
    records = by_caption(source)
    assert len(records) == 2
    for (caption,), record in records.items():
        i = int(caption[1:])
        assert record["image"] == jpeg(i) and record["label"] == (i % 2,)
    assert source.classes == ["a", "b"]


def test_images_and_captions_reach_the_batches(tmp_path):
    write(tmp_path, coco, {"test": map(coco_example, range(5))})
    source = TfdsSource("tiny", "test", tmp_path)
    batches = list(pipeline.eval_batches(source, batch_size=3, image_size=8, resize=8, threads=2))
    seen = {len(t): image for b in batches for t, image, ok in zip(b["captions"], b["image"], b["valid"]) if ok}
    assert sorted(seen) == [0, 1, 2, 3, 4]
    for i, image in seen.items():
        np.testing.assert_allclose(image, 40 * i, atol=2)


def test_the_newest_version_is_read_unless_another_is_named(tmp_path):
    for version in ("1.0.0", "1.10.0", "1.9.0"):
        rows = [{"photo": io.BytesIO(jpeg(1)), "caption": version, "label": 0, "coarse": 0}]
        write(tmp_path, flat, {"train": rows}, version=version)
    assert TfdsSource("tiny", "train", tmp_path)[0]["text"] == ("1.10.0",)
    assert TfdsSource("tiny:1.9.0", "train", tmp_path)[0]["text"] == ("1.9.0",)


def test_a_config_must_be_named_where_there_are_several(tmp_path):
    for config in ("small", "large"):
        rows = [{"photo": io.BytesIO(jpeg(1)), "caption": config, "label": 0, "coarse": 0}]
        write(tmp_path, flat, {"train": rows}, config=config)
    assert TfdsSource("tiny/small", "train", tmp_path)[0]["text"] == ("small",)
    with pytest.raises(ValueError, match="several configs.*tiny/large, tiny/small"):
        TfdsSource("tiny", "train", tmp_path)


def test_the_error_for_tfrecords_has_the_command_that_converts_them(tmp_path):
    """The dataset is written as ArrayRecord and then renamed, because tfds needs TensorFlow to write TFRecord."""
    write(tmp_path, flat, {"train": [{"photo": io.BytesIO(jpeg(1)), "caption": "x", "label": 0, "coarse": 0}]})
    folder = tmp_path / "tiny" / "1.0.0"
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for file in folder.glob("*.array_record*"):
        file.rename(folder / file.name.replace("array_record", "tfrecord"))
    command = f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record"
    with pytest.raises(ValueError, match="only tfrecord") as caught:
        TfdsSource("tiny", "train", tmp_path)
    assert command in str(caught.value)


def test_array_records_beside_tfrecords_are_read(tmp_path):
    """The state in which tfds convert_format leaves a dataset that was prepared as TFRecord."""
    rows = [{"photo": io.BytesIO(jpeg(1)), "caption": "x", "label": 0, "coarse": 0}]
    write(tmp_path, flat, {"train": rows})
    info = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    fields = json.loads(info.read_text())
    fields |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    info.write_text(json.dumps(fields))
    assert TfdsSource("tiny", "train", tmp_path)[0]["text"] == ("x",)


def test_a_pickled_source_is_read_by_several_threads(tmp_path):
    write(tmp_path, coco, {"test": map(coco_example, range(1, 40))})
    source = pickle.loads(pickle.dumps(TfdsSource("tiny", "test", tmp_path)))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        records = list(pool.map(source.__getitem__, range(39)))
    assert sorted(len(record["text"]) for record in records) == list(range(1, 40))


def test_errors_name_what_is_missing_and_what_exists(tmp_path):
    with pytest.raises(ValueError, match="only: none(.|\n)*tfds build tiny .*--file_format=array_record"):
        TfdsSource("tiny", "train", tmp_path)
    write(tmp_path, lambda f: {"caption": f.Text()}, {"train": [{"caption": "x"}]})
    with pytest.raises(ValueError, match="no prepared dataset 'other'.*only: tiny"):
        TfdsSource("other", "train", tmp_path)
    with pytest.raises(ValueError, match="no split 'validation'; it has train"):
        TfdsSource("tiny", "validation", tmp_path)
    with pytest.raises(ValueError, match="no image among its features caption"):
        TfdsSource("tiny", "train", tmp_path)


def test_training_needs_captions(tmp_path):
    write(tmp_path, lambda f: {"image": f.Image()}, {"train": [{"image": io.BytesIO(jpeg(1))}]})
    assert TfdsSource("tiny", "train", tmp_path)[0]["text"] == ()
    with pytest.raises(ValueError, match="no captions among its features image; expected text"):
        TfdsSource("tiny", "train", tmp_path, require_captions=True)


def test_reading_does_not_import_tensorflow(tmp_path):
    write(tmp_path, flat, {"train": [{"photo": io.BytesIO(jpeg(1)), "caption": "x", "label": 0, "coarse": 0}]})
    assert images.decode(TfdsSource("tiny", "train", tmp_path)[0]["image"]).shape == (9, 9, 3)
    assert "tensorflow" not in sys.modules
