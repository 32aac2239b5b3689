"""A small classifier without labels: a zero-shot model names the images, and gives its reasons.

    python -m zslflax.main --config=configs/distil_prompts.py --config.data.train='images/{00000..00099}.tar' \
        --config.model.class_names=classes.txt --config.teacher.workdir=runs/photos
    zslflax export classifier --workdir=runs/distil_prompts

This trains the whole tower from scratch, for a GPU: on two cores it takes about 8 hours. A head on a frozen tower takes
minutes, with

    --config.model.image.pretrained=timm/mobilenetv2_100.ra_in1k --config.freeze="(('image/tower', -1),)" \
        --config.steps=300

The teacher is any model with a text tower that `Predictor.restore` takes. Its soft labels are the softmax of its
similarities to the class names in the templates of `eval.templates`. With
`--config.objective.sentences=sentences.json`, which has sentences about each class, the student also learns the
teacher's similarities to all sentences (Vöge, Gurgul and Lessmann 2024, arXiv 2403.15886, in text). With
`--config.objective.refine_weight=0.5`, the student's moving average refines the labels (MUST, arXiv 2206.02967).
`FILE:labels` trains the same student on true labels, for comparison.
"""

from ml_collections import ConfigDict

from zslflax.config import default_config, eval_set


def get_config(source: str = "") -> ConfigDict:
    c = default_config()
    c.name = "distil_prompts" + (f"_{source}" if source else "")
    c.batch_size = 128  # images
    c.steps = 5_000
    c.compute_dtype = "float32"  # CPUs have no fast bfloat16
    c.log_every = 50  # steps

    c.model.image.name = "mobilenet_v2"
    c.model.image.size = 112  # pixels
    c.features.folder = "~/.cache/zslflax/features"  # of the teacher

    if source == "labels":
        c.objective.name = "cross_entropy"
        c.teacher.kind = "none"
    else:
        c.objective.name = "prompt_distillation"
        c.objective.alpha = 0.5  # weight of the labels beside the reasons
        c.objective.fairness_weight = 0.1
        c.teacher.kind = "checkpoint"
        c.teacher.workdir = "runs/photos"

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup_steps = 200
    c.optimizer.weight_decay = 0.05
    c.optimizer.no_decay = (r".*/(bias|scale)$",)
    c.optimizer.clip_norm = 1.0

    c.data.train = ("images/{00000..00099}.tar",)
    c.data.crop_scale = (0.5, 1.0)  # share of the area
    c.eval.every = 1_000  # steps
    c.eval.sets = {"test": eval_set()}
    c.checkpoint.every = 1_000  # steps
    return c
