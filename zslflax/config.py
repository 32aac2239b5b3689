"""Every field of a config: its default, meaning, unit and source."""

import re
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from zslflax.compilation import COMPILATION_CACHE
from zslflax.errors import UserError
from zslflax.losses import classification


def default_config() -> ConfigDict:
    """A config with every field at its default. It is locked: setting a field that does not exist is an error.

    The comments give units and the source of a value. A value without a source is this project's choice. "OTTER's
    release" is the code published with arXiv 2112.09445, which has the paper's method (arXiv 2104.08945) as well.
    """
    c = ConfigDict()
    c.name = "unnamed"  # name of the run; the workdir is runs/<name> unless --workdir is given
    c.seed = 0  # seed of the initial parameters, the sample order, augmentation and dropout
    c.batch_size = 512  # pairs per step, over all devices and hosts
    # Pairs that a device embeds at a time, a divisor of its share of the batch; 0: its whole share. Fewer pairs need
    # less memory, but one more forward pass. The update stays that of the whole batch, except that batch normalisation
    # uses the statistics of a micro-batch (GradCache, arXiv 2101.06983).
    c.micro_batch = 0
    c.steps = 10_000  # steps in the run; the data repeats, `steps` alone ends the run
    c.compute_dtype = "bfloat16"  # dtype inside the towers: bfloat16 | float32; everything else is float32
    c.compilation_cache = COMPILATION_CACHE  # folder of compiled programs; "" for no cache
    c.log_every = 20  # steps between lines of metrics.jsonl
    c.wandb = ""  # project of Weights & Biases that gets metrics and predictions too; "" for none
    c.profile_steps = ""  # "100:105" writes a profiler trace of steps 100 to 105 into the workdir; "" for no trace
    # ((pattern, step), ...): parameters that are frozen until a step, or for the whole run with -1. Patterns are
    # regular expressions that are matched from the start of a parameter's path, such as "image/tower" or
    # "text/tower/layer_[0-5]". A tower that is frozen for the whole run is computed once per step, without gradient.
    c.freeze = ()
    # Workdir of a run, or exported folder, whose towers and heads the run starts with; "": as model.*.pretrained say.
    c.init_from = ""
    c.model = model_fields()
    c.objective = objective_fields()
    c.teacher = teacher_fields()
    c.features = features_fields()
    c.optimizer = optimizer_fields()
    c.data = data_fields()
    c.eval = eval_fields()
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 1_000  # steps between checkpoints; every evaluated step and the last one are saved as well
    return c.lock()


def get_config() -> ConfigDict:
    """This module as a config file, for an evaluation: all that differs from the defaults is in the workdir."""
    return default_config()


def model_fields() -> ConfigDict:
    """`config.model`: the two towers and their joint space."""
    c = ConfigDict()
    c.embed_dim = 768  # d, width of the joint space (OTTER's release)
    # Classes of a classifier, which has an image tower and a linear head: names, or a file with one a line, in the
    # order of the labels. Images of other classes are left out where the data has class names. (): those of the data.
    c.class_names = ()
    c.image = ConfigDict()
    # Tower: resnet18|34|50|101|12|_nano, resnet18d|34d|50d|101d, convnext_tiny|_small|_base|_large, mobilenet_v2,
    # efficientnet_lite0 … 4, fastvit_t8|_t12|_s12|_sa12|_sa24|_sa36|_ma36|_mci0 … 4, vit_ti16|_s16|_b16|_b32|_nano4,
    # dinov2_s14|_b14|_l14, dinov2_s14_reg|…, dinov3_s16|_s16_plus|_b16|_l16|_h16_plus; "": the one that the
    # files of image.pretrained describe, CLIP's, SigLIP's or open_clip's.
    c.image.name = "resnet50"
    # Output of a ViT: cls (the class token) | mean (of the patches) | cls_mean (both, dino.txt) | map (SigLIP's
    # attention pool) | cls_map (PE-Core's, of the class token too); "": the tower's own.
    c.image.pool = ""
    # Weights in safetensors format: a folder, package:MODULE/FOLDER, or a Hugging Face Hub id; "" for random weights.
    c.image.pretrained = ""
    c.image.size = 224  # pixels, height and width
    # ((pixels, step), ...): smaller training images until a step, such as ((128, 8000),), and those of `size` after the
    # last of them. Evaluation uses `size`. Steps on smaller images are faster (EfficientNetV2, arXiv 2104.00298).
    c.image.schedule = ()
    # Mean and standard deviation of each colour channel, of values in [0, 1]. (): as the files of the pretrained
    # weights say, or else ImageNet's (EfficientNet-Lite: 0.5).
    c.image.mean = ()
    c.image.std = ()
    c.image.allow_other_statistics = False  # whether mean and std may contradict the files of the pretrained weights
    # Layers after the tower: linear | linear_no_bias | mlp | none (needs a tower as wide as embed_dim).
    c.image.projection = "linear"
    # Whether the backward pass recomputes the activations inside a block: less memory, a third more computation.
    c.image.remat = False
    # Share of a ViT's patches that training leaves out, at random: 0.5 halves the image tower's work in a step. Finish
    # with a short run at 0 (FLIP, arXiv 2212.00794).
    c.image.patch_drop = 0.0
    c.text = ConfigDict()
    # Text encoder, given like image.pretrained; its config.json says which: BERT, RoBERTa, XLM-R, CamemBERT, MPNet,
    # DistilBERT, ModernBERT, or the text tower of CLIP or SigLIP.
    c.text.pretrained = ""
    c.text.tokenizer = ""  # given like image.pretrained; "": the folder of text.pretrained
    c.text.max_tokens = 60  # tokens of a caption, with special tokens; longer ones are truncated (OTTER's release)
    # Tokens in a row that several training captions share, at least max_tokens; 0: each caption has its own row.
    c.text.pack_length = 0
    c.text.dropout = 0.1  # dropout probability of hidden states (BERT, arXiv 1810.04805)
    # Output: mean (over the tokens) | cls (the first token) | last (the last token, CLIP's); "": as the encoder's
    # 1_Pooling/config.json says, or the encoder's own.
    c.text.pool = ""
    c.text.projection = "linear"  # as image.projection; OTTER's release: none
    c.text.remat = False  # as image.remat
    # Captions whose features are kept in memory, where the text tower is always frozen and features.folder is "";
    # 0: features are not kept.
    c.text.cached_captions = 0
    # Sizes of a BERT with random weights; vocab_size must be at least the tokenizer's (BERT base, arXiv 1810.04805).
    c.text.scratch = ConfigDict({"layers": 12, "width": 768, "heads": 12, "vocab_size": 30_522})
    # Width and dropout probability between the two layers of a projection "mlp".
    c.projection = ConfigDict({"hidden": 2048, "dropout": 0.0})
    return c


def objective_fields() -> ConfigDict:
    """`config.objective`: what the loss compares, see `zslflax.losses.contrastive` and `.classification`."""
    c = ConfigDict()
    # Loss of two towers: info_nce | label_smoothing | self_distillation | otter | sigmoid; of a classifier:
    # cross_entropy | logit_distillation | prompt_distillation.
    c.name = "self_distillation"
    c.log_logit_scale = 3.9  # initial log of each learnt logit scale; kept in [log 1, log 100] (OTTER's release)
    c.smoothing = 0.1  # ε of label_smoothing, the probability of all other pairs together
    # What another pair with the same image or the same caption is to a pair: negative | positive | ignored.
    c.duplicates = "negative"
    # α, weight of the hard term, or of prompt_distillation's labels; soft term or reasons have 1 − α (OTTER's release)
    c.alpha = 0.5
    c.soft_ramp_steps = 0  # steps in which the weight of the soft term grows linearly from 0 to 1 − α
    # τ of self_distillation's soft labels. OTTER's release has 0.01, for pretrained towers. A run from random weights
    # collapses there, and learns at 0.05 to 0.1 (docs/study.md).
    c.teacher_temperature = 0.01
    # Weights of image-image and text-text similarity in the teacher's similarity of two pairs. The paper
    # (arXiv 2104.08945) uses image-text similarity alone; OTTER's release sets both to 1.
    c.image_image_weight = 0.0
    c.text_text_weight = 0.0
    # Whether a pair's soft label on itself, and on what else is a positive, is 0; OTTER's release: True.
    c.remove_diagonal = False
    c.sinkhorn_regulariser = 0.15  # λ of otter, in units of similarity (OTTER's release)
    c.sinkhorn_iterations = 5  # Sinkhorn iterations of otter (OTTER's release)
    c.logit_bias = -10.0  # initial bias of sigmoid (SigLIP, arXiv 2303.15343)
    # Weight of the squared distance to the embeddings of a fixed teacher, beside any loss of two towers; 0: none
    # (CLIP-KD, arXiv 2307.12732: 2000, beside info_nce).
    c.feature_weight = 0.0
    # γ of cross_entropy and logit_distillation (SKD, arXiv 2006.09785: 2 and 1); 0: images are not rotated.
    c.rotation_weight = 0.0
    c.temperature = 2.0  # T of logit_distillation (SKD's release)
    # Number of eval.templates in which prompt_distillation's teacher gets the class names, chosen without labels
    # (`zslflax.training.templates`); 0: all.
    c.choose_templates = 0
    c.teacher_scale = 100.0  # s of prompt_distillation, of the teacher's cosine similarities (CLIP's largest)
    c.hard_labels = False  # whether prompt_distillation takes the teacher's best class for its probabilities
    c.min_confidence = 0.0  # smallest highest probability with which prompt_distillation uses a label of the teacher
    # JSON file of sentences that describe each class, {"cat": ["A cat has …"]}: the reasons of prompt_distillation.
    c.sentences = ""
    c.reasons_share = 1.0  # share of the images that have reasons
    # Share that the student's own labels have in those of prompt_distillation, from step `refine_from` on: the labels
    # that its moving average gives to the centre crop, where they have min_confidence (MUST, arXiv 2206.02967); 0: none
    c.refine_weight = 0.0
    c.refine_from = 1_000
    # λ of prompt_distillation, against the collapse of classes (MUST, arXiv 2206.02967, adds a term like this).
    c.fairness_weight = 0.0
    # Similarities that a device holds at a time. A larger matrix is computed in chunks of rows; 0: never in chunks.
    c.max_similarities = 2**22
    return c


def teacher_fields() -> ConfigDict:
    """`config.teacher`: the model that gives the soft labels."""
    c = ConfigDict()
    c.kind = "ema"  # teacher: ema, the student's moving average | checkpoint, the model of another run | none
    c.ema_decay = 0.999  # decay of the average: min(ema_decay, (1 + k) / (10 + k)) at the k-th update (OTTER's release)
    # Statistics of the EMA teacher's batch normalisation in the train step. batch: of the current batch (OTTER's
    # release) | ema: the average of the student's running statistics | student: the student's running statistics.
    c.batch_norm = "batch"
    # For kind "checkpoint": workdir of a finished run, whose newest checkpoint is the teacher, or a model as
    # Predictor.restore takes it: exported, or a CLIP as a folder or Hub id. The student takes its tokenizer.
    c.workdir = ""
    return c


def features_fields() -> ConfigDict:
    """`config.features`: outputs of frozen towers, computed once and kept on disk."""
    c = ConfigDict()
    # Folder that runs share. Steps then read no images: an always frozen image tower sees one crop of each image, or
    # `views` random ones. "": towers run in each step, on a new random crop of each image.
    c.folder = ""
    c.dtype = "float16"  # in which features are kept: float16 | bfloat16 | float32
    # Inputs that are computed of each training image. 1: the crop of evaluation. More: random crops by
    # data.crop_scale and data.flip, of which each visit draws one.
    c.views = 1
    c.seed = 0  # of the random crops; runs with other values of `seed` then share their features
    return c


def optimizer_fields() -> ConfigDict:
    """`config.optimizer`: the update of the parameters, see `zslflax.training.optimizer`."""
    c = ConfigDict()
    c.name = "sgd"  # update rule: sgd (OTTER's release) | adamw | lamb
    c.learning_rate = 3e-3  # peak, after a linear warm-up from 0; a cosine leads from it to 0 (OTTER's release)
    c.warmup_steps = 0  # steps in the warm-up; at most half of the run
    # ((share, factor), ...): after the warm-up the rate is constant, and multiplied by each factor from that share of
    # the run's steps on, such as ((0.9, 0.1),); (): the cosine.
    c.drops = ()
    c.momentum = 0.9  # momentum of sgd (OTTER's release)
    c.b1, c.b2, c.eps = 0.9, 0.98, 1e-6  # moments of adamw and lamb (CLIP's ViTs, arXiv 2103.00020)
    c.weight_decay = 0.0  # weight decay: decoupled for adamw and lamb, added to the gradient for sgd
    c.no_decay = (r".*/(bias|scale)$", "objective/")  # patterns of parameters without weight decay, as in `freeze`
    c.lr_multipliers = ()  # ((pattern, factor), ...): factors of the learning rate; the first match counts
    c.clip_norm = 0.0  # largest norm of the gradient, which is scaled down to it; 0: no clipping
    c.max_nonfinite_steps = 0  # non-finite steps to skip before the run stops
    return c


def data_fields() -> ConfigDict:
    """`config.data`: training data, and how it is read and augmented."""
    c = ConfigDict()
    # Sources: "shapes" (built in), a folder of images with captions or of tar shards, tar shards
    # "path/{00000..00331}.tar" (or a glob), "pairs.csv", "pairs.tsv", "*.parquet", "hf_dataset:NAME:SPLIT",
    # "tfds:NAME/SPLIT". For classifiers also labelled images, such as a folder with a subfolder for each class; without
    # labels, a folder of images alone.
    c.train = ("shapes",)
    c.exclude = ""  # CSV file whose column `name` lists training samples to leave out, as zslflax.noise writes it
    c.weights = ()  # relative weight of each source in the mixture; (): the number of its samples
    c.crop_scale = (0.2, 1.0)  # smallest and largest share of the image's area in a random crop
    c.flip = True  # whether half of the images are mirrored, left to right
    # Worker processes that read and decode; -1: none, threads of the main process do; 0: automatic, by the cores that
    # the process may use: none below 8, else all but an eighth, at most 64. Batches are the same for all values.
    c.workers = 0
    # Threads that read and decode, in each worker; 0: automatic, one in each worker, or one more than cores without
    # workers. Remote shards may need more.
    c.threads = 0
    c.captions_per_line = False  # whether each line of KEY.txt, in shards and folders, is a caption of its own
    c.request_timeout = 60.0  # seconds until one request for a part of a remote shard must be complete
    c.read_timeout = 300.0  # seconds after which a read of a remote shard that failed is not tried again
    c.max_bad_fraction = 0.05  # the run stops when more than this share of the samples read so far is unreadable
    c.tfds_dir = ""  # folder of TFDS datasets; "": the default of tfds
    c.shapes = ConfigDict()  # the built-in images of coloured shapes
    c.shapes.root = "~/.cache/zslflax"  # folder in which they are written once
    c.shapes.train, c.shapes.test = 20_000, 2_000  # images in each split
    c.shapes.size = 32  # pixels, height and width
    c.shapes.noise = 0.0  # share of the training captions that belong to another image
    c.shapes.seed = 0  # seed of the images and captions
    return c


def eval_fields() -> ConfigDict:
    """`config.eval`: test sets, and when and how they are evaluated."""
    c = ConfigDict()
    c.every = 1_000  # steps between evaluations; the last step is always evaluated
    c.first = 0  # step of one more evaluation, for an early look at a run; 0: none
    c.batch_size = 512  # images, over all devices and hosts
    # Shorter side before the centre crop, in units of the image size (about 256 / 224); 0: the whole image is resized
    # to a square (SigLIP).
    c.resize_factor = 1.15
    c.interpolation = "area"  # resizing of test images: area | bilinear | bicubic (Pillow's, and slower)
    # Prompts with {} for the class name, or a file with one prompt a line. A class embedding is their average.
    c.templates = ("a photo of a {}.",)
    c.bootstrap_resamples = 1_000  # resamples for the 95% intervals of --mode=evaluate; 0: no intervals
    c.best_metric = ""  # metric whose best checkpoint is kept, such as "eval/test/hit@1"; "": only the newest are kept
    c.class_cache = "~/.cache/zslflax/classes"  # folder of class embeddings, at most 1 GB; "" for no cache
    c.sets = ConfigDict({"test": eval_set()})  # test sets by name
    return c


def eval_set(
    data: str = "",
    class_names: str = "",
    unseen: str = "",
    synonyms: str = "",
    classes: str = "",
    wordnet: str = "",
) -> ConfigDict:
    """One test set. It is evaluated where `data` is given.

    Images with labels are classified among the classes. Images with captions are also retrieved by them.

    Args:
        data: a source as in `data.train`, or labelled images: "FOLDER" with a subfolder for each class, "FILE.csv",
            or a published test set, such as "open_images:FOLDER" or "food101:FOLDER"
            (`zslflax.data.sources.ready_sets`). Labels are class ids where the source has ids, and otherwise indices
            into the class names.
        class_names: a file with one class name a line, or "cat,dog,…"; "" where the source, `classes` or `wordnet`
            gives the names.
        unseen: classes that are also reported separately, as names or ids in the form of `class_names`.
        synonyms: a second name of each class, in the form and order of `class_names`; evaluated separately.
        classes: files of class ids, separated by commas and merged by id, such as Open Images'
            class-descriptions.csv (`zslflax.data.sources.class_lists`); "": the source's own classes.
        wordnet: folder of the WordNet database, such as /usr/share/wordnet. It gives names to WordNet ids, and the
            hierarchy for hierarchical precision; "" for neither.
    """
    return ConfigDict(
        {
            "data": data,
            "class_names": class_names,
            "unseen": unseen,
            "synonyms": synonyms,
            "classes": classes,
            "wordnet": wordnet,
        }
    )


def is_classifier(c: ConfigDict) -> bool:
    """Whether the model is a classifier: an image tower with a linear head, and no text tower."""
    return c.objective.name in classification.OBJECTIVES


def keeps_average(c: ConfigDict) -> bool:
    """Whether a run keeps the moving average of its student: as its teacher, or to refine its teacher's labels."""
    return c.teacher.kind == "ema" or classification.refines_labels(c.objective)


def set_objective(c: ConfigDict, name: str) -> None:
    """Selects an objective, with the fields that its source sets: the argument of `--config=FILE:NAME`."""
    c.objective.name = name or "self_distillation"
    if name == "otter":  # OTTER's release, train_OTTER.sh
        c.objective.image_image_weight = c.objective.text_text_weight = 1.0
        c.objective.remove_diagonal = True
    if name == "sigmoid":
        c.objective.log_logit_scale = 2.302585  # log 10 (SigLIP, arXiv 2303.15343)


def compute_dtype(c: ConfigDict) -> Any:
    """The towers' dtype."""
    return {"bfloat16": jnp.bfloat16, "float32": jnp.float32}[c.compute_dtype]


def profiled_steps(c: ConfigDict) -> tuple[int, int] | None:
    """The first and the last step of `profile_steps`; None for "".

    Raises:
        UserError: it is not of the form FIRST:LAST, or not within the run.
    """
    if not c.profile_steps:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", c.profile_steps)
    if not found or not 1 <= int(found[1]) <= int(found[2]) <= c.steps:
        raise UserError(
            f"config: profile_steps is {c.profile_steps!r}, expected FIRST:LAST, two of the steps 1 to {c.steps} in "
            'order, such as 100:105, or "" for no trace'
        )
    return int(found[1]), int(found[2])
