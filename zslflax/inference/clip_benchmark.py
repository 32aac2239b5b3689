"""Models as CLIP_benchmark (github.com/LAION-AI/CLIP_benchmark) takes them, so that it measures a `Predictor`.

zslflax clip-benchmark --workdir=runs/demo --dataset=cifar10 --dataset_root=FOLDER

runs its command with a model of this project.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zslflax.cli import add_model_argument, exit_on_error
from zslflax.data.images import to_rgb
from zslflax.data.views import evaluation_view
from zslflax.errors import MissingLibraryError
from zslflax.inference.predictor import Predictor

MODEL_TYPE = "zslflax"  # the value of CLIP_benchmark's --model_type


def load_clip(pretrained: str, device: Any = "cpu", **_: Any) -> tuple["BenchmarkModel", "Preprocess", type["Texts"]]:
    """Loads a model in the form of CLIP_benchmark's `load_clip`.

    Args:
        pretrained: as `Predictor.restore` takes it.
        device: of PyTorch's tensors; the model runs on the devices of jax.

    Returns:
        model, transform and tokenizer, as `clip_benchmark.metrics` uses them.
    """
    predictor = Predictor.restore(pretrained)
    return BenchmarkModel(predictor, device), Preprocess(predictor), Texts


class BenchmarkModel:
    """A model with the methods that CLIP_benchmark calls. Its vectors have unit length.

    Args:
        predictor: the model.
        device: of the tensors that it returns.
    """

    def __init__(self, predictor: Predictor, device: Any = "cpu"):
        self.predictor, self.device = predictor, device

    def eval(self) -> "BenchmarkModel":
        """Returns the model, which has no other mode."""
        return self

    def encode_image(self, images: Any) -> Any:
        """Embeds images that `Preprocess` made, uint8 [b, s, s, 3], as a tensor fp32 [b, d]."""
        return self._to_torch(self.predictor.encode_image(images.cpu().numpy()))

    def encode_text(self, texts: "Texts") -> Any:
        """Embeds texts as a tensor fp32 [b, d]."""
        return self._to_torch(self.predictor.encode_text(list(texts)))

    def _to_torch(self, array: Any) -> Any:
        import torch  # CLIP_benchmark needs it, and this package does not

        return torch.tensor(array, device=self.device)


class Preprocess:
    """Prepares an image for a model: PIL image → uint8 [s, s, 3], a tensor. It can be pickled for worker processes.

    Args:
        predictor: the model.
    """

    def __init__(self, predictor: Predictor):
        self.view = evaluation_view(predictor.config)

    def __call__(self, image: Image.Image) -> Any:
        import torch

        # Without EXIF orientation, as other models see the images there, and as the evaluation of a run does.
        return torch.tensor(self.view(np.array(to_rgb(image)), index=0, view=0))


class Texts(list[str]):
    """Texts in place of the tokens that CLIP_benchmark expects: the model has a tokenizer of its own."""

    def to(self, device: Any) -> "Texts":
        """Returns the texts, which are on no device."""
        return self


def main() -> None:
    """Runs CLIP_benchmark's command on a model of this project."""
    parser = argparse.ArgumentParser(
        "zslflax clip-benchmark",
        description="Evaluates a model with CLIP_benchmark's own code.",
        epilog="All other arguments are those of `clip_benchmark eval`, such as --dataset=cifar10 --dataset_root=data "
        "--task=zeroshot_classification --output=FILE.json --batch_size=64 --num_workers=4.",
    )
    add_model_argument(parser)
    args, others = parser.parse_known_args()
    try:
        from clip_benchmark import cli, models
    except ImportError as error:
        raise MissingLibraryError(f"CLIP_benchmark cannot be imported ({error}): pip install clip-benchmark") from error
    models.TYPE2FUNC[MODEL_TYPE] = lambda device, **_: load_clip(args.workdir, device)
    models.MODEL_TYPES.append(MODEL_TYPE)
    # Both names become parts of the result's file name, in which there may be no slash. Mixed precision would round
    # similarities to 8 bits, which makes ties.
    names = [f"--model_type={MODEL_TYPE}", f"--model={MODEL_TYPE}", f"--pretrained={Path(args.workdir).name}"]
    sys.argv[1:] = ["eval", *names, "--no_amp", *others]
    cli.main()


if __name__ == "__main__":
    with exit_on_error():
        main()
