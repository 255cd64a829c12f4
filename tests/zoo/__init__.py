"""Small but true members of model families, each with the feature that makes it hard."""

from zoo import layers, learning, physics, sequences
from zoo.member import ZOO, Member, N, build, call, losses

__all__ = ["HOUSE", "ZOO", "Member", "N", "build", "call", "layers", "learning", "losses"]
__all__ += ["physics", "sequences"]

HOUSE = ("mlp", "cnn", "resnet", "gpt", "vit")
