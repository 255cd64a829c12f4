"""A folder of checkpoints measured after the training, by as many processes as there are."""

from nettrace.offline.analysis import Analysis, analyze

__all__ = ["Analysis", "analyze"]
