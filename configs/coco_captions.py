"""COCO captions from TFDS on one GPU: a first run on photographs, with image-text retrieval on the validation images.

tfds build coco_captions --file_format=array_record  # downloads 25 GB once, and needs TensorFlow
python -m zslflax.main --config=configs/coco_captions.py
"""

from ml_collections import ConfigDict

from zslflax.config import default_config, eval_set, set_objective


def get_config(objective: str = "") -> ConfigDict:
    c = default_config()
    c.name = "coco_captions" + (f"_{objective}" if objective else "")
    set_objective(c, objective)
    c.batch_size = 256  # pairs; fits a GPU with 24 GB of memory
    c.steps = 6_400  # 20 epochs of 82,783 images, each time with one of their five captions

    c.model.embed_dim = 512
    c.model.image.name = "resnet50"
    c.model.image.pretrained = "microsoft/resnet-50"
    c.model.image.size = 224  # pixels
    c.model.text.pretrained = "sentence-transformers/all-MiniLM-L6-v2"
    c.model.text.max_tokens = 40
    c.model.text.pack_length = 128  # tokens in a row that several captions share

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 3e-4
    c.optimizer.warmup_steps = 300
    c.optimizer.weight_decay = 0.05
    c.optimizer.lr_multipliers = ((".*/tower", 0.2), (".*", 1.0))
    c.optimizer.clip_norm = 1.0

    c.data.train = ("tfds:coco_captions/train",)
    c.eval.every = 1_000  # steps
    c.eval.sets = {"coco": eval_set(data="tfds:coco_captions/val")}  # captions without labels: retrieval recall@k
    c.checkpoint.every = 1_000  # steps
    return c
