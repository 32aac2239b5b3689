"""ResNet-50 and a Sentence-BERT on CC3M: as r50_declutr.py, with a text tower that is on the Hub as safetensors.

python -m zslflax.main --config=configs/r50_sbert.py --config.data.train='cc3m/{00000..00331}.tar'
"""

from ml_collections import ConfigDict

from zslflax.config import default_config, eval_set, set_objective


def get_config(objective: str = "") -> ConfigDict:
    c = default_config()
    c.name = "r50_sbert" + (f"_{objective}" if objective else "")
    set_objective(c, objective)
    c.batch_size = 512  # pairs
    c.steps = 56_000  # 10 epochs of the 2.9M pairs of CC3M

    c.model.embed_dim = 768
    c.model.image.name = "resnet50"
    c.model.image.pretrained = "microsoft/resnet-50"
    c.model.image.size = 224  # pixels
    c.model.text.pretrained = "sentence-transformers/all-distilroberta-v1"  # RoBERTa, 6 layers, 768 wide, mean pooling
    c.model.text.max_tokens = 60
    c.model.text.pack_length = 128  # tokens; captions of CC3M have 12 on average

    c.objective.alpha = 0.5
    c.teacher.ema_decay = 0.999
    c.optimizer.name = "sgd"
    c.optimizer.learning_rate = 3e-3
    c.optimizer.momentum = 0.9

    c.data.train = ("cc3m/{00000..00331}.tar",)
    c.data.crop_scale = (0.6, 1.0)  # share of the area
    c.data.flip = False  # captions may say left and right
    c.eval.every = 2_000  # steps
    c.eval.sets = {"open_images": eval_set(), "imagenet": eval_set()}
    c.checkpoint.every = 2_000  # steps
    return c
