"""Published test sets in the folders of their archives, made here with a few small images."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from tests.testing.images import jpeg, write
from tests.testing.shards import write_tar
from zslflax.config import default_config, eval_set
from zslflax.data import images
from zslflax.data.sources.opening import open_source
from zslflax.evaluation.test_sets import open_test_set, true_labels

DATA = default_config().data


def read(spec: str) -> tuple[list[str], list[str]]:
    """The class names that a test set is evaluated with, and the name of each image's true class."""
    test_set = open_test_set("test", eval_set(spec), DATA)
    source, space = test_set.source, test_set.label_space
    assert pickle.loads(pickle.dumps(source))[0]["name"] == source[0]["name"]
    labels, outside = space.relabel([source[i]["label"] for i in range(len(source))], source.classes)
    assert not outside
    return space.class_names, [space.class_names[label] for (label,) in labels]


def grey(source) -> list[int]:
    """The grey value of each image."""
    pixels = [record["image"] for record in (source[i] for i in range(len(source)))]
    decoded = [image if isinstance(image, np.ndarray) else images.decode(image) for image in pixels]
    return [int(image.mean().round()) for image in decoded]


def cifar_rows(count: int) -> np.ndarray:
    """Images of which the one of number i has 10 i, 10 i + 1 and 10 i + 2 as red, green and blue."""
    return np.array([[10 * i + channel] * 1024 for i in range(count) for channel in range(3)], np.uint8).reshape(
        count, -1
    )


@pytest.mark.parametrize("archive", ["python", "binary"])
def test_cifar10(tmp_path, archive):
    names, rows = ["airplane", "frog", "ship"], cifar_rows(4)
    if archive == "python":
        root = tmp_path / "cifar-10-batches-py"
        write(root / "test_batch", pickle.dumps({"data": rows, "labels": [2, 0, 1, 1]}, protocol=2))
        write(root / "batches.meta", pickle.dumps({"label_names": names}, protocol=2))
    else:
        root = tmp_path / "cifar-10-batches-bin"
        write(root / "test_batch.bin", np.insert(rows, 0, [2, 0, 1, 1], axis=1).tobytes())
        write(root / "batches.meta.txt", "\n".join(names) + "\n\n")
    for folder in (tmp_path, root):
        assert read(f"cifar10:{folder}") == (names, ["ship", "airplane", "frog", "frog"])
    image = open_source(f"cifar10:{tmp_path}", DATA, "test")[3]["image"]
    assert image.shape == (32, 32, 3) and image[5, 6].tolist() == [30, 31, 32]


@pytest.mark.parametrize("archive", ["python", "binary"])
def test_cifar100_has_fine_labels(tmp_path, archive):
    names, rows = ["apple", "maple_tree"], cifar_rows(2)
    if archive == "python":
        batch = {"data": rows, "fine_labels": [1, 0], "coarse_labels": [7, 8]}
        write(tmp_path / "cifar-100-python" / "test", pickle.dumps(batch, protocol=2))
        write(tmp_path / "cifar-100-python" / "meta", pickle.dumps({"fine_label_names": names}, protocol=2))
    else:
        labelled = np.insert(np.insert(rows, 0, [1, 0], axis=1), 0, [7, 8], axis=1)
        write(tmp_path / "cifar-100-binary" / "test.bin", labelled.tobytes())
        write(tmp_path / "cifar-100-binary" / "fine_label_names.txt", "\n".join(names))
    assert read(f"cifar100:{tmp_path}") == (["apple", "maple tree"], ["maple tree", "apple"])


def test_a_pickle_of_anything_else_is_refused(tmp_path):
    write(tmp_path / "batches.meta", pickle.dumps({"label_names": ["a"]}, protocol=2))
    write(tmp_path / "test_batch", pickle.dumps({"data": Path}, protocol=2))
    with pytest.raises(ValueError, match="test_batch is no pickle of CIFAR: it has pathlib"):
        open_source(f"cifar10:{tmp_path}", DATA, "test")


def test_food101(tmp_path):
    for i, name in enumerate(("apple_pie/1", "apple_pie/2", "waffles/3")):
        write(tmp_path / f"food-101/images/{name}.jpg", jpeg(50 * i))
    listed = {"waffles": ["waffles/3", "waffles/9"], "apple_pie": ["apple_pie/2"]}
    write(tmp_path / "food-101/meta/test.json", json.dumps(listed))
    assert read(f"food101:{tmp_path}") == (["apple pie", "waffles"], ["apple pie", "waffles"])
    source = open_source(f"food101:{tmp_path}/food-101", DATA, "test")
    assert grey(source) == [50, 100] and source.excluded == {"missing_images": 1}


def test_pets(tmp_path):
    for name in ("american_bulldog_10", "Abyssinian_201"):
        write(tmp_path / f"oxford-iiit-pet/images/{name}.jpg", jpeg(0))
    write(tmp_path / "oxford-iiit-pet/annotations/test.txt", "Abyssinian_201 1 1 1\namerican_bulldog_10 2 2 1\n")
    assert read(f"pets:{tmp_path}") == (["Abyssinian", "American Bulldog"], ["Abyssinian", "American Bulldog"])


def test_flowers102(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    for i in range(1, 5):
        write(tmp_path / f"flowers-102/jpg/image_{i:05}.jpg", jpeg(20 * i))
    savemat(tmp_path / "flowers-102/imagelabels.mat", {"labels": np.array([[2, 1, 2, 3]], np.uint8)})
    savemat(tmp_path / "flowers-102/setid.mat", {"trnid": [[2]], "valid": [[3]], "tstid": [[4, 1]]})
    spec = f"flowers102:{tmp_path}"
    with pytest.raises(ValueError, match="3 of 3 classes have no name"):
        open_test_set("test", eval_set(spec), DATA)
    write(tmp_path / "flowers-102/cat_to_name.json", json.dumps({"1": "rose", "2": "tulip", "3": "iris"}))
    assert read(spec) == (["rose", "tulip", "iris"], ["iris", "tulip"])
    assert grey(open_source(spec, DATA, "test")) == [80, 20]


def test_caltech101(tmp_path):
    for name in ("accordion", "water_lilly", "BACKGROUND_Google"):
        write(tmp_path / f"caltech101/101_ObjectCategories/{name}/image_0001.jpg", jpeg(0))
    for folder in (tmp_path, tmp_path / "caltech101/101_ObjectCategories"):
        assert read(f"caltech101:{folder}") == (["accordion", "water lilly"], ["accordion", "water lilly"])


def test_sun397(tmp_path):
    for path in ("a/abbey/sun_a", "a/abbey/sun_b", "c/church/indoor/sun_c"):
        write(tmp_path / f"SUN397/{path}.jpg", jpeg(0))
    write(tmp_path / "SUN397/ClassName.txt", "/a/abbey\n/c/church/indoor\n")
    assert read(f"sun397:{tmp_path}") == (["abbey", "church indoor"], ["abbey", "abbey", "church indoor"])
    write(tmp_path / "Testing_01.txt", "/c/church/indoor/sun_c.jpg\n/a/abbey/sun_b.jpg\n")
    assert read(f"sun397:{tmp_path}")[1] == ["church indoor", "abbey"]


NAMES = "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn02012849 crane\nn03126707 crane\n"


def test_imagenet_in_class_folders(tmp_path):
    for i, name in enumerate(("n01440764", "n01443537", "n02012849", "n03126707")):
        write(tmp_path / f"val/{name}/ILSVRC2012_val_{i}.JPEG", jpeg(0))
    with pytest.raises(ValueError, match="4 of 4 classes have no name"):
        open_test_set("test", eval_set(f"imagenet:{tmp_path}"), DATA)
    write(tmp_path / "LOC_synset_mapping.txt", NAMES)
    names = ["tench", "goldfish", "crane", "crane"]
    assert read(f"imagenet:{tmp_path}") == (names, names)
    assert read(f"imagenet:{tmp_path}/val") == (names, names)
    assert open_test_set("test", eval_set(f"imagenet:{tmp_path}"), DATA).label_space.ids[3] == "n03126707"


def test_imagenet_as_kaggle_ships_it(tmp_path):
    for i in (1, 2):
        write(tmp_path / f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_{i:08}.JPEG", jpeg(0))
    write(tmp_path / "LOC_synset_mapping.txt", NAMES)
    rows = ["ImageId,PredictionString", "ILSVRC2012_val_00000002,n02012849 85 1 499 272 "]
    write(tmp_path / "LOC_val_solution.csv", "\n".join([*rows, "ILSVRC2012_val_00000001,n01440764 1 2 3 4"]))
    assert read(f"imagenet:{tmp_path}")[1] == ["crane", "tench"]
    with pytest.raises(FileNotFoundError, match="has no class folders, such as val/n01440764"):
        open_source(f"imagenet:{tmp_path}/ILSVRC", DATA, "test")


def test_variants_of_imagenet(tmp_path):
    write(tmp_path / "LOC_synset_mapping.txt", NAMES)
    for name in ("n01443537", "n03126707"):
        write(tmp_path / f"imagenet-r/{name}/art_0.jpg", jpeg(0))
    for prefix in ("imagenet_r", "imagenet_a", "imagenet_sketch"):  # classified among their own classes
        assert read(f"{prefix}:{tmp_path}/imagenet-r") == (["goldfish", "crane"], ["goldfish", "crane"])
    folder = tmp_path / "v2/imagenetv2-matched-frequency-format-val"
    for number in (3, 1, 0):
        write(folder / str(number) / "a.jpeg", jpeg(0))
    assert read(f"imagenet_v2:{folder}") == (["tench", "goldfish", "crane", "crane"], ["tench", "goldfish", "crane"])
    (tmp_path / "LOC_synset_mapping.txt").unlink()
    with pytest.raises(ValueError, match="numbers of ImageNet's classes: put LOC_synset_mapping.txt"):
        open_source(f"imagenet_v2:{folder}", DATA, "test")


@pytest.mark.parametrize("kept_as", ["folders", "tars", "val"])
def test_imagenet21k_has_a_class_for_each_id_whatever_its_name(tmp_path, kept_as):
    for i, name in enumerate(("n02012849", "n03126707", "n01440764")):
        if kept_as == "tars":
            write_tar(tmp_path / f"winter21_whole/{name}.tar", [(f"{name}_{i}.JPEG", jpeg(50 * i))])
        else:
            folder = tmp_path / {"folders": "", "val": "imagenet21k_val"}[kept_as]
            write(folder / name / f"{name}_{i}.JPEG", jpeg(50 * i))
            write(tmp_path / "imagenet21k_train" / name / "x.JPEG", jpeg(0))  # of another split
    spec = f"imagenet21k:{tmp_path}"
    with pytest.raises(ValueError, match="3 of 3 classes have no name"):
        open_test_set("test", eval_set(spec), DATA)
    write(tmp_path / "words.txt", re.sub(r"(?m)^(\w+) ", r"\1\t", NAMES + "n00001740 entity\n"))
    names = ["tench, Tinca tinca", "crane", "crane"]  # the bird and the machine
    assert read(spec) == (names, ["tench, Tinca tinca", "crane", "crane"])
    assert grey(open_source(spec, DATA, "test")) == [100, 0, 50]
    test_set = open_test_set("test", eval_set(spec), DATA)
    assert test_set.label_space.ids == ["n01440764", "n02012849", "n03126707"]


def test_a_union_with_imagenet1k_has_each_id_once(tmp_path):
    """A list of all classes to which those of ImageNet-1k are added by name has its twins twice: a right answer in the
    other slot would be a miss."""
    for name in ("n02012849", "n03126707"):
        write(tmp_path / f"{name}/{name}_1.JPEG", jpeg(0))
    write(tmp_path / "imagenet21k_wordnet_ids.txt", "n02012849\nn03126707\nn00001740\n")
    write(tmp_path / "imagenet21k_wordnet_lemmas.txt", "crane\ncrane, lifting_device\nentity\n")
    thousand = write(tmp_path / "1k.txt", "n01440764\nn02012849\n")
    thousand_names = write(tmp_path / "LOC.txt", NAMES)
    spec = f"imagenet21k:{tmp_path}"
    assert read(spec)[0] == ["crane", "crane, lifting device"]
    space = open_test_set("test", eval_set(spec, classes=f"{thousand_names},{thousand}"), DATA).label_space
    assert space.ids == ["n01440764", "n01443537", "n02012849", "n03126707"]
    some = write(tmp_path / "some.txt", "n03126707\nn02012849\n")  # ids alone take the source's names
    space = open_test_set("test", eval_set(spec, classes=str(some)), DATA).label_space
    assert space.class_names == ["crane, lifting device", "crane"]
    with pytest.raises(FileNotFoundError, match="no folder or tar for each class, such as n01440764"):
        open_source(f"imagenet21k:{tmp_path}/n02012849", DATA, "test")
    write(tmp_path / "imagenet21k_wordnet_lemmas.txt", "crane\n")
    with pytest.raises(ValueError, match="lemmas.txt has 1 lines and .*ids.txt has 3"):
        open_source(spec, DATA, "test")


VERDICTS = (
    "ImageID,Source,LabelName,Confidence\n"
    "00000000000000a1,verification,/m/01yrx,1\n00000000000000a1,verification,/m/0bt9lr,0\n"
    "00000000000000b2,verification,/m/0bt9lr,1\n00000000000000b2,verification,/m/unnamed,1\n"
    "00000000000000c3,verification,/m/01yrx,1\n"
)
DESCRIPTIONS = "/m/0bt9lr,Dog\n/m/01yrx,Cat\n/m/0c9ph5,Flower\n"


@pytest.mark.parametrize("version", ["4", "7", "FiftyOne"])
def test_open_images_in_its_own_files(tmp_path, version, caplog):
    images, labels, names = {
        "4": ("test", "test-annotations-human-imagelabels.csv", "class-descriptions.csv"),
        "7": ("test", "csv/oidv7-test-annotations-human-imagelabels.csv", "csv/oidv7-class-descriptions.csv"),
        "FiftyOne": ("test/data", "test/labels/classifications.csv", "test/metadata/classes.csv"),
    }[version]
    for i, name in enumerate(("00000000000000a1", "00000000000000b2")):
        write(tmp_path / images / f"{name}.jpg", jpeg(50 * i))
    write(tmp_path / "train/00000000000000a1.jpg", jpeg(200))
    write(tmp_path / "validation-annotations-human-imagelabels.csv", VERDICTS)
    write(tmp_path / "class-descriptions-boxable.csv", "/m/01yrx,Cat\n")
    write(tmp_path / labels, VERDICTS)
    spec = f"open_images:{tmp_path}"
    with pytest.raises(ValueError, match="classes have no name, the first is '/m/01yrx'"):
        open_test_set("test", eval_set(spec), DATA)
    write(tmp_path / names, ("LabelName,DisplayName\n" if version == "7" else "") + DESCRIPTIONS)
    assert read(spec) == (["Dog", "Cat", "Flower"], ["Cat", "Dog"])
    source = open_source(spec, DATA, "test")
    assert source.negatives == [(0,), ()] and grey(source) == [0, 50]
    assert source.excluded == {"missing_images": 1, "disputed_labels": 0, "unnamed_labels": 1}
    assert "1 of 3 annotated images are not in" in caplog.text
    write(tmp_path / "oidv7-classes-trainable.txt", "/m/0c9ph5\n/m/0bt9lr\n")  # ids, which the source names
    few = open_test_set("test", eval_set(spec, classes=str(tmp_path / "oidv7-classes-trainable.txt")), DATA)
    assert few.label_space.class_names == ["Flower", "Dog"]
    assert true_labels(few, range(2), source.labels).labels == [(), (1,)]


def test_open_images_in_files_of_two_versions_or_none(tmp_path):
    write(tmp_path / "test/00000000000000a1.jpg", jpeg(0))
    with pytest.raises(FileNotFoundError, match=r"has no \*test-annotations-human-imagelabels.csv.*found: test"):
        open_source(f"open_images:{tmp_path}", DATA, "test")
    for name in ("test-annotations-human-imagelabels.csv", "oidv7-test-annotations-human-imagelabels.csv"):
        write(tmp_path / name, VERDICTS)
    with pytest.raises(ValueError, match="several files .*: oidv7-test-.*, test-.*; leave the one that is meant"):
        open_source(f"open_images:{tmp_path}", DATA, "test")


def karpathy(name: str, folder: str | None) -> str:
    """The contents of a file of Karpathy's splits, with an image of each split and seven captions of each."""
    found = [
        {"filename": f"{split}.jpg", "split": split, "sentences": [{"raw": f"{split} {i}"} for i in range(7)]}
        | ({"filepath": folder} if folder else {})
        for split in ("train", "val", "test")
    ]
    return json.dumps({"dataset": name, "images": found})


def test_karpathys_test_images(tmp_path):
    expected = tuple(f"test {i}" for i in range(5))
    write(tmp_path / "coco/karpathy/dataset_coco.json", karpathy("coco", "val2014"))
    write(tmp_path / "coco/val2014/test.jpg", jpeg(50))
    write(tmp_path / "flickr/dataset_flickr30k.json", karpathy("flickr30k", None))
    write(tmp_path / "flickr/flickr30k-images/test.jpg", jpeg(50))
    for spec in (f"coco:{tmp_path}/coco", f"flickr30k:{tmp_path}/flickr"):
        source = open_source(spec, DATA, "test")
        assert [record["text"] for record in (source[0],)] == [expected] and len(source) == 1 and grey(source) == [50]
        assert source.classes is None and source[0]["label"] == ()
        with pytest.raises(ValueError, match="is a test set, and training needs pairs"):
            open_source(spec, DATA, "train")


def test_cocos_validation_images(tmp_path):
    listed = {
        "images": [{"id": 7, "file_name": "000000000007.jpg"}, {"id": 9, "file_name": "000000000009.jpg"}],
        "annotations": [{"image_id": 9, "caption": "a dog"}, {"image_id": 7, "caption": "a cat"}]
        + [{"image_id": 7, "caption": "a pet"}],
    }
    write(tmp_path / "annotations/captions_val2017.json", json.dumps(listed))
    for number, value in ((7, 50), (9, 100)):
        write(tmp_path / f"val2017/{number:012}.jpg", jpeg(value))
    source = open_source(f"coco:{tmp_path}", DATA, "test")
    assert [source[i]["text"] for i in range(2)] == [("a cat", "a pet"), ("a dog",)] and grey(source) == [50, 100]


def test_a_folder_of_something_else_is_named_with_what_is_expected(tmp_path):
    write(tmp_path / "notes.txt", "")
    for prefix, expected in (("food101", "meta/test.json"), ("sun397", "ClassName.txt"), ("coco", "dataset_coco.json")):
        with pytest.raises(FileNotFoundError, match=f"has no {expected}.*found: notes.txt"):
            open_source(f"{prefix}:{tmp_path}", DATA, "test")
        with pytest.raises(FileNotFoundError, match="found: no folder"):
            open_source(f"{prefix}:{tmp_path}/none", DATA, "test")
