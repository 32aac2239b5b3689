"""Images in every form that users have them, and the forms that are refused with what to do."""

import io
import os

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image

from zslflax.data.images import BadSample
from zslflax.errors import MissingFileError, UserError
from zslflax.inference.image_input import expand_folders, find_images, is_one_image, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_every_form_of_an_image_gives_the_same_pixels(require, tmp_path):
    torch = require("torch")
    path = tmp_path / "a.png"
    path.write_bytes(png(Image.fromarray(PIXELS)))
    with open(path, "rb") as file:
        forms = [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), file]
        forms += [PIXELS, jnp.asarray(PIXELS), torch.from_numpy(PIXELS), Image.fromarray(PIXELS)]
        forms += [PIXELS / 255, np.float16(PIXELS / 255), jnp.asarray(PIXELS / 255), torch.from_numpy(PIXELS / 255)]
        for form in forms:
            assert is_one_image(form)
            np.testing.assert_array_equal(read_image(form), PIXELS)
    grey = PIXELS[:, :, :1]
    np.testing.assert_array_equal(read_image(grey), np.repeat(grey, 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_exif_orientation_is_applied(orientation, kind, tmp_path):
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 16, 16))  # top left
    stored_as = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that undoes each orientation
    stored = upright.transpose(Image.Transpose(stored_as[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "a"
    stored.save(path, kind, exif=exif)
    with Image.open(path) as opened:
        for form in (path, path.read_bytes(), opened):
            image = read_image(form)
            assert image.shape == (32, 48, 3)
            np.testing.assert_allclose(image[4:12, 4:12].mean((0, 1)), (255, 0, 0), atol=8)
            np.testing.assert_allclose(image[20:, 24:].mean((0, 1)), 255, atol=8)


@pytest.mark.parametrize(
    "image, message",
    [
        (PIXELS.transpose(2, 0, 1), r"found uint8 \[3, 20, 30\], with the channels first; pass image.transpose\(1, 2"),
        (PIXELS.astype(np.float32), r"expected floating-point pixels in \[0, 1\], found values from 0 to 255; pass"),
        (PIXELS / np.float32("nan"), r"found values from nan to nan"),
        (PIXELS.astype(np.int64), r"expected an image as uint8, or as floating-point .* found int64 \[20, 30, 3\]"),
        (PIXELS[:0], r"found uint8 \[0, 30, 3\], which has no pixels"),
        (Image.new("RGB", (0, 5)), r"found one of 0 × 5 pixels"),
        (5, r"expected an image as a path, .* found a value of type int"),
        ("gs://bucket/a.png", r"the image is 'gs://bucket/a.png', an address; expected a path on this machine"),
    ],
)
def test_what_is_no_image_is_refused_with_what_to_do(image, message):
    with pytest.raises(UserError, match=message):
        read_image(image)


def test_a_tensor_with_a_gradient_is_refused_with_what_to_do(require):
    tensor = require("torch").zeros(4, 4, 3, requires_grad=True)
    with pytest.raises(UserError, match=r"the tensor cannot be read: .*pass tensor.detach\(\).cpu\(\)"):
        read_image(tensor)


def test_pipes_devices_endless_files_and_pointers_are_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "device.jpg", "folder.jpg"):
        with pytest.raises(UserError, match=f"{name} is (no regular file|a folder)"):
            read_image(tmp_path / name)
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(30 << 30)  # a sparse file
    monkeypatch.setattr("zslflax.data.images.MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(UserError, match="huge.jpg is larger than the 1,048,576 bytes allowed"):
        read_image(tmp_path / "huge.jpg")
    (tmp_path / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="pointer.jpg is a Git LFS pointer and not the file itself; run `git lfs pull`"):
        read_image(tmp_path / "pointer.jpg")
    with pytest.raises(MissingFileError, match="there is no file .*nowhere.jpg"):
        read_image(tmp_path / "nowhere.jpg")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(BadSample, match="text.jpg: the data is not an image"):
        read_image(tmp_path / "text.jpg")


def test_a_folder_stands_for_its_images_and_never_for_others(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside.png"
    (folder / "b" / ".hidden").mkdir(parents=True)
    names = ["c.png", "b/a.JPG", "b/.hidden/x.png", ".d.png", "notes.txt"]
    for path in (outside, *(folder / name for name in names)):
        path.write_bytes(b"")
    (folder / "link.png").symlink_to(outside)
    (folder / "inside.png").symlink_to(folder / "c.png")
    (folder / "way_out").symlink_to(tmp_path)
    found = [str(path.relative_to(folder)) for path in find_images(folder)]
    assert found == ["b/a.JPG", "c.png", "inside.png"]
    assert list(expand_folders([outside, folder]))[0] == outside
    assert len(list(expand_folders([outside, folder]))) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no image \(jpg, "):
        list(expand_folders([tmp_path / "empty"]))
