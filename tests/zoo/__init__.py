"""Small but true members of model families, each with the feature that makes it hard."""

from zoo import layers, learning, physics, sequences
from zoo.member import ZOO, Member, N, build, call

__all__ = ["HOUSE", "ZOO", "Member", "N", "build", "call", "layers", "learning", "physics"]
__all__ += ["sequences"]

HOUSE = ("mlp", "cnn", "gpt", "vit")
