"""ViT-B/16 and DeCLUTR on CC3M with AdamW: the method with a Vision Transformer.

python -m zslflax.main --config=configs/vit_b16_declutr.py --config.data.train='cc3m/{00000..00331}.tar'
"""

from ml_collections import ConfigDict

from zslflax.config import default_config, eval_set, set_objective


def get_config(objective: str = "") -> ConfigDict:
    c = default_config()
    c.name = "vit_b16_declutr" + (f"_{objective}" if objective else "")
    set_objective(c, objective)
    c.batch_size = 1_024  # pairs
    c.steps = 28_000  # 10 epochs of the 2.9M pairs of CC3M

    c.model.embed_dim = 768
    c.model.image.name = "vit_b16"
    c.model.image.pretrained = "google/vit-base-patch16-224"  # pretrained on ImageNet-21k, fine-tuned on ImageNet-1k
    c.model.image.size = 224  # pixels
    c.model.image.mean = c.model.image.std = (0.5, 0.5, 0.5)  # as these weights expect
    c.model.text.pretrained = "johngiorgi/declutr-base"
    c.model.text.max_tokens = 60
    c.model.text.pack_length = 128  # tokens; captions of CC3M have 12 on average

    c.objective.alpha = 0.5
    c.teacher.ema_decay = 0.999
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup_steps = 1_000
    c.optimizer.weight_decay = 0.05
    # A lower rate for the pretrained towers than for the new projections.
    c.optimizer.lr_multipliers = ((".*/tower", 0.2), (".*", 1.0))
    c.optimizer.clip_norm = 1.0

    c.data.train = ("cc3m/{00000..00331}.tar",)
    c.data.crop_scale = (0.5, 1.0)  # share of the area
    c.eval.every = 1_000  # steps
    c.eval.sets = {"open_images": eval_set(), "imagenet": eval_set()}
    c.checkpoint.every = 1_000  # steps
    return c
