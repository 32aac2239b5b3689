"""The names of config fields, of this version and of earlier ones."""

import pytest

from zslflax.config import default_config
from zslflax.config_names import RENAMED, check_field, current_name, field_names, get_field
from zslflax.errors import UserError


def test_the_current_names_exist_and_the_older_ones_do_not():
    known = set(field_names(default_config()))
    older = {name.replace("eval.sets.", "eval.sets.test.") for name in RENAMED}
    assert {current_name(name) for name in older} <= known and not older & known
    assert current_name("steps") is None


def test_every_field_is_found_by_its_name_and_another_name_is_refused_with_the_nearest():
    config = default_config()
    assert get_field(config, "model.image.name") == config.model.image.name
    for field in field_names(config):
        check_field(config, field)
        get_field(config, field)
    with pytest.raises(UserError, match="--config.optimizer.lerning_rate: .* nearest: optimizer.learning_rate"):
        check_field(config, "optimizer.lerning_rate")
    with pytest.raises(UserError, match="--config.teacher.decay: .* it is called teacher.ema_decay now"):
        check_field(config, "teacher.decay")
