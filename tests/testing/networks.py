"""Networks of PyTorch whose every weight and statistic matters to their output."""

from typing import Any


def randomise_batch_norm(module: Any, weight: tuple[float, float] = (0.5, 1.5), bias: float = 0.1) -> None:
    """Draws the statistics and the parameters of a batch normalisation.

    Args:
        module: a torch.nn.BatchNorm2d.
        weight: bounds of its scales, which are uniform.
        bias: standard deviation of its biases.
    """
    module.running_mean.normal_(0, 0.2)
    module.running_var.uniform_(0.5, 2)
    module.weight.data.uniform_(*weight)
    module.bias.data.normal_(0, bias)
