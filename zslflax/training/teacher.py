"""The fixed teacher of a run: another run's model, and what the step needs of it."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from zslflax.data.image_features import ImageFeatures, log_size
from zslflax.data.sources.base import Source
from zslflax.data.text import Tokenizer
from zslflax.data.views import evaluation_view
from zslflax.errors import UserError
from zslflax.inference.predictor import Predictor
from zslflax.losses import classification
from zslflax.models.partition import Tree, partition
from zslflax.models.two_tower import TwoTower
from zslflax.training.classes import read_sentences
from zslflax.training.frozen_features import open_image_tower
from zslflax.training.templates import choose_templates
from zslflax.training.train_state import towers

log = logging.getLogger("zslflax")


class FixedTeacher(NamedTuple):
    """A teacher that does not change during the run.

    Attributes:
        model: its `TwoTower`, or the student's for another kind of teacher.
        variables: what the step needs of its variables, on the host; {} for another kind of teacher.
        width: of its embeddings.
        features: of each source's training images by its image tower, where it is the zero-shot teacher of a
            classifier.
    """

    model: TwoTower
    variables: Tree
    width: int
    features: list[ImageFeatures]


def load_fixed_teacher(
    config: ConfigDict, model: TwoTower, tokenizer: Tokenizer | None, sources: Sequence[Source]
) -> FixedTeacher:
    """Loads the teacher of teacher.kind "checkpoint".

    Args:
        config: the whole config.
        model: the student's.
        tokenizer: the student's; None for a classifier.
        sources: of the training images.

    Raises:
        UserError: the teacher takes other tokens or images than the student.
    """
    if config.teacher.kind != "checkpoint":
        return FixedTeacher(model, {}, config.model.embed_dim, [])
    teacher = Predictor.restore(config.teacher.workdir)
    check_kind(config, teacher)
    if tokenizer is not None:
        check_same_tokens(config, teacher, tokenizer)
    needs_centre_crop = tokenizer is None and teacher.model.text is not None
    if not needs_centre_crop and teacher.config.model.image.size != config.model.image.size:
        raise UserError(
            f"the teacher in {config.teacher.workdir} takes images of {teacher.config.model.image.size} pixels, the "
            f"student of {config.model.image.size}; set model.image.size to the teacher's"
        )
    log.info("teacher: step %d of %s, fixed", teacher.step, config.teacher.workdir)
    width = teacher.config.model.embed_dim
    if needs_centre_crop:
        variables, features = prompt_teacher(config, teacher, sources)
        return FixedTeacher(teacher.model, variables, width, features)
    variables = jax.device_get(teacher.variables)
    return FixedTeacher(teacher.model, {**variables, "params": towers(variables["params"])}, width, [])


def check_kind(config: ConfigDict, teacher: Predictor) -> None:
    """Raises a UserError where a teacher is a classifier and should have a text tower, or the other way round."""
    name, workdir = config.objective.name, config.teacher.workdir
    needs_classes = name in classification.OBJECTIVES and classification.OBJECTIVES[name].needs_teacher == "logits"
    kinds = {True: "a classifier", False: "a model with a text tower"}
    if (teacher.model.text is None) != needs_classes:
        raise UserError(
            f"the teacher in {workdir} is {kinds[not needs_classes]}, but objective.name {name} needs "
            f"{kinds[needs_classes]}"
        )
    if needs_classes:
        check_same_classes(config, teacher, workdir)


def check_same_tokens(config: ConfigDict, teacher: Predictor, tokenizer: Tokenizer) -> None:
    """Raises a UserError where the teacher of two towers takes other tokens than the student."""
    assert teacher.tokenizer is not None
    if teacher.tokenizer.identity != tokenizer.identity:
        raise UserError(
            f"the teacher in {config.teacher.workdir} uses the tokenizer {teacher.tokenizer.identity}, the student "
            f"{tokenizer.identity}; both see the same tokens, so give the student the teacher's tokenizer "
            "(model.text.tokenizer, model.text.max_tokens)"
        )


def check_same_classes(config: ConfigDict, other: Predictor, workdir: str) -> None:
    """Raises a UserError where the logits of the model in a workdir are of other classes than the config's."""
    own, others = config.model.class_names, other.config.model.class_names
    if tuple(own) != tuple(others):
        differing = sorted(set(own) ^ set(others))[:3] or ["the same names in another order"]
        raise UserError(
            f"the model in {workdir} has {len(others)} classes and the student {len(own)}, which differ in "
            f"{', '.join(differing)}; give model.class_names as that model has them"
        )


def prompt_teacher(
    config: ConfigDict, teacher: Predictor, sources: Sequence[Source]
) -> tuple[Tree, list[ImageFeatures]]:
    """What the step needs of a classifier's zero-shot teacher, on the host, and the training images' features by it.

    The step needs its projection and its embeddings of the class names and sentences. Its image tower sees the centre
    crop of each image once.

    Raises:
        UserError: a class has no sentence, or there are too few templates to choose from.
    """
    variables = jax.device_get(teacher.variables)
    params, class_names = variables["params"]["image"], config.model.class_names
    sentences = read_sentences(config.objective.sentences, class_names) if config.objective.sentences else []
    teacher_config = teacher.config.copy_and_resolve_references()
    teacher_config.features, teacher_config.data.threads = config.features, config.data.threads
    tower = open_image_tower(teacher_config, teacher.model, params["tower"], variables["batch_stats"])
    features = [tower.features_of(source, evaluation_view(teacher_config)) for source in sources]
    log_size(features)
    fixed = {
        "params": {"image": {name: x for name, x in params.items() if name != "tower"}},
        "class_emb": teacher.class_embeddings(class_names, choose_templates(config, teacher, features)),
    }
    if sentences:
        fixed["sentence_emb"] = teacher.encode_text(sentences)
    return fixed, features


def without_shared_towers(fixed_teacher: Tree, frozen_params: Tree) -> Tree:
    """A teacher's variables without the towers that equal the student's frozen ones bit for bit."""
    if not fixed_teacher:
        return {}
    params = fixed_teacher["params"]
    equal = lambda m, frozen: "tower" in params[m] and trees_equal(params[m]["tower"], frozen["tower"])
    shared = tuple(m for m, frozen in frozen_params.items() if equal(m, frozen))
    return {**fixed_teacher, "params": partition(params, shared)[0]}


def trees_equal(a: Tree, b: Tree) -> bool:
    """Whether two trees have the same structure and equal arrays."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (a, b)]
    return structures[0] == structures[1] and all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
