"""The paper's recipe: ResNet-50 and DeCLUTR on CC3M with self-distillation (arXiv 2104.08945).

    python -m zslflax.main --config=configs/r50_declutr.py --config.data.train='cc3m/{00000..00331}.tar'
    python -m zslflax.main --config=configs/r50_declutr.py:otter …            # another objective
    python -m zslflax.main --config=configs/r50_declutr.py:release …          # as the authors' scripts set it
    python -m zslflax.main --config=configs/r50_declutr.py:release_otter …    # their script for that objective

The argument after the colon is an objective (info_nce, label_smoothing, self_distillation, otter, sigmoid), or
`release`, alone for self_distillation or followed by an objective. Values marked (release) are those of the training
scripts that the authors published with OTTER (arXiv 2112.09445).

Differs from the release in what `:release` sets:

    precision             bfloat16 in the towers; theirs is float32
    pixel statistics      ImageNet's; theirs are CLIP's
    image weights         microsoft/resnet-50; theirs are timm 0.3.4's resnet50, on the Hub as timm/resnet50.ram_in1k
    text projection       a learnt linear layer; theirs is the identity where the widths are equal, as here
    within-modality terms teacher similarity image-text alone, as in the paper; their self-distillation script leaves
                          image-image and text-text at weight 1. At a scale of 100 the soft label of the pair is then
                          1.0000, which is InfoNCE in all but name
    label smoothing       ε = 0.1; their script passes none, so it trains InfoNCE
    steps                 56,000; theirs are 10 epochs of 2,911,810 pairs, 56,870 steps
    prompt                "a photo of a {}."; theirs is "a photo of {}."
    evaluation size       shorter side 258 pixels before the centre crop of 224; theirs is 256

and in what no field sets:

    gradient              the mean of the two directions, with gradients through the gathered embeddings. Theirs is the
                          sum, and gathers without gradient. Ours has 0.71 to 0.91 of the norm of theirs in 8 processes
                          (its projection on theirs is 0.59 to 0.68 of it); only the logit scales have exactly half. At
                          equal learning rates the losses are close (0.280 and 0.301 at step 200), so the rate is kept
    OTTER's diagonal      removed for every pair; theirs is removed on one of 8 GPUs only. On the others the pair
                          itself keeps 0.7 to 0.95 of the soft label's mass
    teacher               no dropout; theirs has BERT's 0.1. Its average warms up one update later than theirs
    student's dropout     0.1 on embeddings and layer outputs; theirs also on attention weights
    crop                  random-resized-crop; theirs is a random 224-pixel crop after bicubic resizing to 256
    schedule              cosine per step; theirs changes the rate once an epoch
    shuffling             a new order each epoch; theirs repeats the first
    projection's start    LeCun normal, zero bias; theirs is PyTorch's uniform for weights and bias
    evaluation resizing   area averages; theirs is bicubic
    several prompts       averaged into one class embedding; theirs takes the nearest prompt's class
    reported model        the teacher, with the student beside it; theirs is the student

Flipping is off, as in the release: captions may say left and right.
"""

from ml_collections import ConfigDict

from zslflax.config import default_config, eval_set, set_objective


def get_config(argument: str = "") -> ConfigDict:
    release = argument.partition("_")[0] == "release"
    objective = argument.partition("_")[2] if release else argument

    c = default_config()
    c.name = "r50_declutr" + (f"_{argument}" if argument else "")
    c.batch_size = 512  # pairs: 8 GPUs × 64 (release)
    c.steps = 56_000  # 10 epochs (release) of the 2.9M pairs of CC3M that can still be downloaded, in batches of 512

    c.model.embed_dim = 768  # (release)
    c.model.image.name = "resnet50"
    c.model.image.pretrained = "microsoft/resnet-50"  # ImageNet-1k; the paper starts from ImageNet weights as well
    c.model.image.size = 224  # pixels (release)
    c.model.text.pretrained = "johngiorgi/declutr-sci-base"  # (release)
    c.model.text.max_tokens = 60  # (release)
    c.model.text.pack_length = 128  # tokens; captions of CC3M have 12 on average

    c.objective.log_logit_scale = 3.9  # (release)
    c.objective.alpha = 0.5  # (release)
    c.objective.teacher_temperature = 0.01  # a scale of 100 (release)
    set_objective(c, objective)  # after the scale: sigmoid has its own
    c.teacher.ema_decay = 0.999  # (release)
    c.teacher.batch_norm = "batch"  # (release): its teacher is in training mode

    c.optimizer.name = "sgd"  # (release)
    c.optimizer.learning_rate = 3e-3  # (release)
    c.optimizer.momentum = 0.9  # (release)
    c.optimizer.weight_decay = 0.0  # (release)

    c.data.train = ("cc3m/{00000..00331}.tar",)  # as launch/prepare_cc3m.sh or img2dataset write it
    c.data.crop_scale = (0.6, 1.0)  # share of the area; 0.57 is the release's 224 × 224 of an image of 256 × 341
    c.data.flip = False  # (release)
    c.eval.every = 2_000  # steps
    c.eval.templates = ("a photo of a {}.",)
    # Evaluated where data and class names are given: --config.eval.sets.open_images.data=… and .class_names=…
    c.eval.sets = {"open_images": eval_set(), "imagenet": eval_set()}
    c.checkpoint.every = 2_000  # steps
    if release:
        follow_release(c)
    return c


def follow_release(c: ConfigDict) -> None:
    """Sets what the authors' scripts set differently, as far as there is a field for it."""
    c.steps = 56_870  # 10 epochs of 2,911,810 pairs // 512
    c.compute_dtype = "float32"
    c.model.image.pretrained = "timm/resnet50.ram_in1k"
    c.model.image.mean = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    c.model.image.std = (0.26862954, 0.26130258, 0.27577711)
    c.model.image.allow_other_statistics = True  # the weights expect ImageNet's
    c.model.text.projection = "none"
    c.objective.image_image_weight = c.objective.text_text_weight = 1.0
    c.objective.smoothing = 0.0
    c.eval.templates = ("a photo of {}.",)
    c.eval.resize_factor = 256 / 224
