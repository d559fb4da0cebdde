"""Models for tests whose texts are to differ."""

from torch import nn


def sharpened(model: nn.Module) -> nn.Module:
    """The model in evaluation mode with matrices 8 times as large, so that it is surer than at initialisation."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return model.eval()
