"""Checks of a config: values that are out of range or contradict each other are refused, with the field's name."""

import pytest

from tests.testing.configs import ROOT, load_config
from zslflax.config_checks import check_devices, validate
from zslflax.errors import UserError


@pytest.fixture
def demo():
    return load_config(ROOT / "configs" / "demo.py")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("objective.alpha", 1.5, "objective.alpha is 1.5"),
        ("objective.duplicates", "ignore", "objective.duplicates is 'ignore'.*nearest: ignored"),
        ("objective.name", "info_nse", "objective.name is 'info_nse'.*nearest: info_nce"),
        ("objective.feature_weight", -1.0, "objective.feature_weight is -1.0, expected 0 or a positive weight"),
        (
            "objective.feature_weight",
            5.0,
            "embeddings .* of a fixed teacher, but .* teacher.kind ema; set teacher.kind",
        ),
        (
            "objective.refine_weight",
            0.5,
            "refine_weight is 0.5, which only prompt_distillation has, .* self_distillation",
        ),
        ("objective.choose_templates", 2, "choose_templates is 2, which only prompt_distillation has"),
        ("objective.choose_templates", -1, "objective.choose_templates is -1, expected 0 or a positive number"),
        ("objective.max_similarities", -1, "objective.max_similarities is -1"),
        ("micro_batch", -1, "micro_batch is -1"),
        ("profile_steps", "100-105", "profile_steps is '100-105', expected FIRST:LAST, two of the steps 1 to 1000"),
        ("profile_steps", "105:100", "profile_steps is '105:100', expected FIRST:LAST"),
        ("profile_steps", "999:1001", "profile_steps is '999:1001', expected FIRST:LAST"),
        ("profile_steps", "0:5", "profile_steps is '0:5', expected FIRST:LAST"),
        ("teacher.kind", "none", "self_distillation learns from a teacher"),
        ("teacher.kind", "checkpoint", "a workdir goes with kind checkpoint"),
        ("steps", 0, "steps is 0"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate is nan, expected finite numbers"),
        ("objective.logit_bias", float("inf"), "objective.logit_bias is inf, expected finite numbers"),
        ("model.image.mean", (float("nan"),) * 3, "model.image.mean is .nan, nan, nan., expected finite numbers"),
        ("optimizer.learning_rate", -1.0, "optimizer.learning_rate is -1.0, expected a positive number"),
        ("optimizer.clip_norm", -1.0, "optimizer.clip_norm is -1.0, expected 0 or a positive number"),
        ("model.text.dropout", 1.0, "model.text.dropout is 1.0, expected a number from 0 to below 1"),
        ("model.image.size", 0, "model.image.size is 0, expected a positive number"),
        ("model.image.std", (0.2, 0.0, 0.2), r"model.image.std is \(0.2, 0.0, 0.2\), expected numbers above 0"),
        ("seed", -1, "seed is -1, expected a number from 0 to 2³² − 1"),
        ("data.train", ("",), "data.train is .*, expected no empty names of sources"),
        ("features.folder", "gs://bucket/features", "config: features.folder is 'gs://bucket/features', an address"),
        ("eval.every", -3, "eval.every is -3"),
        ("eval.first", -1, "eval.first is -1, expected 0 or a positive number"),
        ("data.weights", (1.0, 2.0), "data.weights has 2 values for the 1 sources"),
        ("data.weights", (0.0,), r"data.weights are \(0.0,\), expected each to be above 0"),
        ("data.crop_scale", (0.0, 1.0), r"data.crop_scale is \(0.0, 1.0\), expected 0 < smallest"),
        ("model.image.schedule", ((16, 100), (24, 50)), "model.image.schedule is .*ascending steps"),
        ("model.image.schedule", ((64, 100),), "model.image.schedule is .*at most model.image.size, 32"),
        ("model.image.schedule", (16, 100), "model.image.schedule is .*expected pairs of pixels and a step"),
        ("model.image.patch_drop", 1.0, "model.image.patch_drop is 1.0, expected a number from 0 to below 1"),
        ("data.train", (1, 2), r"data.train is \(1, 2\), expected text in quotation marks"),
        ("eval.templates", (1,), "eval.templates is .*, expected text"),
        ("data.weights", ("a",), r"data.weights is \('a',\), expected numbers"),
        ("model.image.std", ("a", "b", "c"), "model.image.std is .*, expected numbers"),
        ("data.workers", 100_000, "data.workers is 100000, expected a number up to 1024"),
        ("data.threads", 100_000, "data.threads is 100000, expected a number up to 1024"),
        ("data.workers", -2, "data.workers is -2, expected a number up to 1024, 0 .automatic. or -1 .none."),
        ("data.threads", -1, "data.threads is -1, expected a number up to 1024, or 0"),
        ("data.max_bad_fraction", 5.0, "data.max_bad_fraction is 5.0, expected a share"),
        (
            "eval.best_metric",
            "eval/tset/hit@1",
            "eval.best_metric is 'eval/tset/hit@1', expected eval/SET/METRIC.*: test$",
        ),
        ("eval.resize_factor", 0.9, "eval.resize_factor is 0.9, expected at least 1"),
        ("optimizer.warmup_steps", -1, "optimizer.warmup_steps is -1, expected 0 or a positive number"),
        ("model.image.name", "resnet5", "model.image.name is 'resnet5'; expected one of .*nearest: resnet50"),
        ("optimizer.max_nonfinite_steps", -1, "optimizer.max_nonfinite_steps is -1"),
        (
            "freeze",
            (("image", -1),),
            "freeze has 'image' for the whole run, but model.image.pretrained is empty.*nearest that works",
        ),
        ("freeze", ("text/tower", -1), r"freeze is \('text/tower', -1\), expected pairs of a pattern and a number"),
        ("freeze", (("text/tower", -2),), "expected steps, or -1 for the whole run"),
        (
            "optimizer.lr_multipliers",
            ("image",),
            r"optimizer.lr_multipliers is \('image',\), expected pairs of a pattern",
        ),
        ("optimizer.lr_multipliers", (("image(", 0.1),), r"lr_multipliers: 'image\(' is not a regular expression"),
        ("data.crop_scale", (0.5,), "expected two shares of the area"),
        ("freeze", (("image/tower[", 3),), r"freeze: 'image/tower\[' is not a regular expression"),
    ],
)
def test_a_wrong_value_is_named(demo, field, value, message):
    *path, leaf = field.split(".")
    section = demo
    for part in path:
        section = section[part]
    section[leaf] = value
    with pytest.raises(UserError, match=message):
        validate(demo)


def test_a_batch_that_the_devices_cannot_share(demo):
    demo.batch_size = 256
    with pytest.raises(
        UserError, match="batch_size is 256, which 3 devices cannot share evenly; nearest that works: 255"
    ):
        check_devices(demo, 3)
    demo.micro_batch = 48
    with pytest.raises(UserError, match="micro_batch is 48, .* the 64 pairs of a device; nearest that works: 32"):
        check_devices(demo, 4)
    demo.micro_batch = 16
    check_devices(demo, 4)
