"""The list of towers against the towers that there are."""

import sys

import jax
import jax.numpy as jnp
import pytest

from zslflax.errors import UserError
from zslflax.models.__main__ import main
from zslflax.models.build import image_tower
from zslflax.models.known import IMAGE_TOWERS

QUICK = (
    *("resnet18d", "resnet_nano", "convnext_tiny", "mobilenet_v2", "fastvit_t8"),
    *("vit_nano4", "vit_b32", "dinov2_s14_reg"),
)


def test_every_image_tower_is_listed():
    with pytest.raises(UserError, match="expected one of (.*); nearest") as error:
        image_tower("nothing", jnp.float32, None, remat=False)
    there = str(error.value).partition("expected one of ")[2].partition(";")[0].split(", ")
    assert sorted(there) == sorted(row.name for row in IMAGE_TOWERS)


@pytest.mark.parametrize("row", [row for row in IMAGE_TOWERS if row.name in QUICK], ids=lambda row: row.name)
def test_the_numbers_of_parameters_are_right(row):
    side = {"resnet_nano": 32, "vit_nano4": 32, "dinov2_s14_reg": 518}.get(row.name, 224)
    tower = image_tower(row.name, jnp.float32, None, remat=False)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
    assert row.millions == round(sum(x.size for x in jax.tree.leaves(shapes)) / 1e6, 1)


def test_a_word_selects_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["models", "DINOv2"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert sum("facebook/dinov2" in line for line in lines) == 6 and not any("resnet" in line for line in lines)
    monkeypatch.setattr(sys, "argv", ["models", "nosuch"])
    with pytest.raises(UserError, match="nothing is called 'nosuch'"):
        main()
