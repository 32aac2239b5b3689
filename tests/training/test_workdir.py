"""The workdir is locked, knows the data that its checkpoints were trained on, and refuses other data."""

import errno
import fcntl
import json
import logging
import os
import shutil
import tarfile

import pytest
from PIL import Image

from tests.testing.runs import read_metrics
from tests.testing.shards import write_tar
from zslflax.data.sources.shapes import ensure_shards
from zslflax.data.sources.shard_patterns import expand_patterns
from zslflax.errors import StorageError, UserError
from zslflax.training.loop import train
from zslflax.training.workdir import check_config, check_data, lock_workdir


@pytest.fixture
def sharded_config(tiny_config, shapes_root, tmp_path):
    """A short run on four shards of 24 samples."""
    (path,) = expand_patterns(ensure_shards(shapes_root, train=96, test=24, size=24).train)
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    for shard in range(4):
        write_tar(tmp_path / "shards" / f"{shard}.tar", members[72 * shard : 72 * shard + 72])
    c = tiny_config
    c.data.train, c.eval.sets.test.data = (f"{tmp_path}/shards/*.tar",), ""
    c.steps = c.eval.every = c.checkpoint.every = 2
    return c


def test_a_run_resumes_on_the_same_data_alone_unless_told(sharded_config, tmp_path, caplog):
    workdir, shards = tmp_path / "run", tmp_path / "shards"
    assert train(sharded_config, workdir)
    described = json.loads((workdir / "data.json").read_text())
    assert [(entry["samples"], len(entry["files"])) for entry in described] == [(96, 4)]
    for path in shards.glob("*.tar"):
        path.touch()  # a copy has other times
    assert train(sharded_config, workdir)

    (shards / "3.tar").rename(tmp_path / "3.tar")  # the glob fits three shards now
    expected = (
        r"holds a run of another data; .* --changed .*\n.*: 96 samples there, 72 now; missing: 1 shards \(3.tar\)"
    )
    with pytest.raises(UserError, match=expected):
        train(sharded_config, workdir)
    assert json.loads((workdir / "data.json").read_text()) == described

    write_tar(shards / "3.tar", [("x.jpg", b"x"), ("x.txt", b"a red circle")])
    with pytest.raises(UserError, match=r"73 now; other content: 1 shards \(3.tar\)"):
        train(sharded_config, workdir)
    with caplog.at_level(logging.WARNING):
        assert train(sharded_config, workdir, changed=True)
    assert "resumes with another data" in caplog.text
    assert json.loads((workdir / "data.json").read_text())[0]["samples"] == 73
    assert train(sharded_config, workdir)

    (workdir / "data.json").write_text("[1")
    with pytest.raises(UserError, match="data.json is not valid JSON"):
        train(sharded_config, workdir)


def test_other_data_of_as_many_samples_is_told_apart(tiny_config, tmp_path):
    for folder, caption in (("cats", "a cat"), ("dogs", "a dog")):
        (tmp_path / folder).mkdir()
        for i in range(16):
            Image.new("RGB", (24, 24), (i, 0, 0)).save(tmp_path / folder / f"{i}.png")
            (tmp_path / folder / f"{i}.txt").write_text(caption)
    tiny_config.eval.sets.test.data = ""
    tiny_config.steps = tiny_config.eval.every = tiny_config.checkpoint.every = 1
    tiny_config.data.train = (str(tmp_path / "cats"),)
    assert train(tiny_config, tmp_path / "run")
    tiny_config.data.train = (str(tmp_path / "dogs"),)
    expected = r"/cats there, .*/dogs now: 16 samples there, 16 now, with other contents"
    with pytest.raises(UserError, match=expected):
        train(tiny_config, tmp_path / "run")


def test_a_run_resumes_for_more_steps_and_from_another_path_to_the_same_data(sharded_config, tmp_path, caplog):
    workdir = tmp_path / "run"
    assert train(sharded_config, workdir)
    (tmp_path / "shards").rename(tmp_path / "moved")
    sharded_config.data.train = (f"{tmp_path}/moved/*.tar",)
    sharded_config.steps, sharded_config.eval.every = 4, 4
    with caplog.at_level(logging.INFO):
        assert train(sharded_config, workdir)
    assert "the run is now 4 steps long instead of 2" in caplog.text and "another" not in caplog.text
    assert read_metrics(workdir)[-1]["step"] == 4
    sharded_config.steps = 3
    with pytest.raises(UserError, match="steps: 4 there, 3 now"):
        check_config(sharded_config, workdir)
    sharded_config.steps = 4
    (workdir / "data.json").unlink()  # without it nothing tells that the data is the same
    sharded_config.data.train = (f"{tmp_path}/shards/*.tar",)
    with pytest.raises(UserError, match="data.train: "):
        check_config(sharded_config, workdir)


def test_messages_about_the_config_hide_passwords(tiny_config, trained_workdir):
    tiny_config.model.image.pretrained = "https://me:pa55@example.org/0.tar?signature=pa55"
    with pytest.raises(UserError, match="model.image.pretrained: .*https://example.org/0.tar") as caught:
        check_config(tiny_config, trained_workdir)
    assert "pa55" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_workdir(tmp_path / "run"):
        assert (tmp_path / "run" / "lock").is_file()
    assert f"the file system of {tmp_path}/run has no locks ([Errno {number}]" in caplog.text


def test_other_errors_of_a_lock_name_the_workdir(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StorageError, match=f"{tmp_path} cannot be written: Input/output error"), lock_workdir(tmp_path):
        pass


SHAPES = [
    b"",
    b'[{"source"',
    b"\xff\xfe{}",
    b"null",
    b"3",
    b"[3]",
    b'[{"files": 3}]',
    b'[{"files": [[]]}]',
    b"[" * 99_999,
]


@pytest.mark.parametrize("content", SHAPES)
def test_a_data_json_that_cannot_be_read_is_named(finished_workdir, tmp_path, content):
    shutil.copytree(finished_workdir / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/data.json"):
        check_data(["shapes"], [NoSource()], tmp_path)


@pytest.mark.parametrize("content", [content for content in SHAPES if not content.startswith(b"[{")])
def test_a_config_json_that_cannot_be_read_is_named(tiny_config, finished_workdir, tmp_path, content):
    shutil.copytree(finished_workdir / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/config.json"):
        check_config(tiny_config, tmp_path)


class NoSource:
    """A source without samples."""

    def __len__(self):
        return 0

    def fingerprint(self):
        return "none"
