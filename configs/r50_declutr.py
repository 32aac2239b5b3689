"""The paper's recipe: ResNet-50 and DeCLUTR on CC3M, self-distillation (arXiv 2104.08945, section 4.1).

    python -m zslflax.main --config=configs/r50_declutr.py \
        --config.data.train='cc3m/{00000..00331}.tar' --config.model.image.pretrained=microsoft/resnet-50

An argument after a colon selects the objective: info_nce, label_smoothing, self_distillation (default), otter, sigmoid.
Numbers marked (release) are those of the authors' own training scripts, published with OTTER (arXiv 2112.09445). That
code sums the two directions and gathers negatives without gradient; here the loss is their mean with exact gradients,
so the effective learning rate is half of theirs at equal numbers.
"""

from zslflax.config import default_config, eval_set, set_objective


def get_config(objective: str = ""):
    c = default_config()
    c.name = "r50_declutr" + (f"_{objective}" if objective else "")
    c.batch_size = 512  # 8 GPUs × 64 pairs (release)
    c.steps = 56_000  # 10 epochs (release) of the 2.9M pairs of CC3M that are still to be had, in batches of 512

    c.model.embed_dim = 768  # (release)
    c.model.image.name = "resnet50"
    c.model.image.pretrained = "microsoft/resnet-50"  # ImageNet-1k; the paper starts from ImageNet weights as well
    c.model.image.size = 224
    c.model.text.pretrained = "johngiorgi/declutr-sci-base"  # (release)
    c.model.text.max_tokens = 60  # (release)
    c.model.text.pack_length = 128  # tokens; CC3M's captions have about 12 of the 60

    c.objective.log_logit_scale = 3.9  # (release)
    c.objective.alpha = 0.5  # (release)
    c.objective.teacher_temperature = 0.01  # a scale of 100 (release)
    set_objective(c, objective)  # may have a log_scale of its own
    c.teacher.ema_decay = 0.999  # (release)
    c.teacher.batch_norm = "batch"  # (release): its teacher is in training mode

    c.optimizer.name = "sgd"  # (release)
    c.optimizer.learning_rate = 3e-3  # (release)
    c.optimizer.momentum = 0.9  # (release)
    c.optimizer.weight_decay = 0.0  # (release)

    c.data.train = ("cc3m/{00000..00331}.tar",)  # as launch/prepare_cc3m.sh or img2dataset write it
    c.data.crop_scale = (0.6, 1.0)  # near the release's random crop of 224 out of 256
    c.eval.every = 2_000
    c.eval.templates = ("a photo of a {}.",)
    c.eval.sets = {
        "open_images": eval_set(),  # --config.eval.sets.open_images.data=… --config.eval.sets.open_images.names=…
        "imagenet": eval_set(),
    }
    c.checkpoint.every = 2_000
    return c
