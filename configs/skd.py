"""Few-shot recognition of new classes by two generations of a classifier (SKD, Rajasegaran et al. 2020).

    python -m zslflax.main --config=configs/skd.py --config.data.train=folder:images \
        --config.model.class_names=base.txt --workdir=runs/skd
    python -m zslflax.main --config=configs/skd.py:1 --config.data.train=folder:images \
        --config.model.class_names=base.txt --config.teacher.workdir=runs/skd --config.init_from=runs/skd
    zslflax few-shot --workdir=runs/skd_1 --data=folder:images --classes=novel.txt

The folder has a subfolder for each class, and base.txt and novel.txt list some of them, one a line: the splits of
miniImageNet, tieredImageNet, CIFAR-FS and FC100. Generation 0 learns the label of every image in its four rotations,
and the rotation; generation 1 starts as its copy and learns its logits, the same for all rotations. The values are
those of the authors' code for miniImageNet (64 classes of 600 images; arXiv 2006.09785). It differs from the code in
the random crops, the colours, which are not changed here, and DropBlock, whose probability does not grow.
"""

from ml_collections import ConfigDict

from zslflax.config import default_config, eval_set


def get_config(generation: str = "0") -> ConfigDict:
    c = default_config()
    c.name = "skd" if generation in ("", "0") else f"skd_{generation}"
    c.batch_size = 64  # images, each in four rotations
    c.steps = 39_000  # 65 epochs of 600 steps
    c.compute_dtype = "float32"

    c.model.image.name = "resnet12"
    c.model.image.size = 84  # pixels; 32 for CIFAR-FS and FC100

    c.optimizer.name = "sgd"
    c.optimizer.momentum = 0.9
    c.optimizer.weight_decay = 5e-4
    c.optimizer.no_decay = ()
    if generation in ("", "0"):
        c.objective.name = "cross_entropy"
        c.objective.rotation_weight = 2.0
        c.teacher.kind = "none"
        c.optimizer.learning_rate = 0.05
        c.optimizer.drops = ((60 / 65, 0.1),)
    else:
        c.objective.name = "logit_distillation"
        c.objective.rotation_weight = 1.0
        c.objective.temperature = 2.0
        c.teacher.kind = "checkpoint"
        c.teacher.workdir = c.init_from = "runs/skd" if generation == "1" else f"runs/skd_{int(generation) - 1}"
        c.optimizer.learning_rate = 1e-3
        c.optimizer.drops = ((60 / 65, 0.1),)

    c.data.train = ("folder:images",)
    c.data.crop_scale = (0.6, 1.0)  # share of the area
    c.eval.every = 6_000  # steps
    c.eval.sets = {"test": eval_set()}  # held-out images of the base classes, if there are any
    c.checkpoint.every = 3_000  # steps
    return c
