"""The linear head that the aesthetic predictor and ImageReward both use."""

from torch import nn

HIDDEN = (1024, 128, 64, 16)


def linear_head(width: int) -> nn.ModuleDict:
    """Return linear layers from `width` features to one score, without activations.

    The published files also number their dropout layers, so the linear layers are `layers.{0,2,4,6,7}`.
    """
    sizes = (width, *HIDDEN, 1)
    layers = nn.Sequential()
    for index, (size, next_size) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers.append(nn.Linear(size, next_size))
        if index < 3:
            layers.append(nn.Identity())
    return nn.ModuleDict({"layers": layers})
