"""Continual learning in a Trainer: phases, the stream and its state, metrics, and a callback for other Trainers."""

from ..state import ContinualMetrics
from .arguments import ShareTrainingArguments
from .callback import ShareCallback
from .trainer import ShareTrainer


__all__ = ["ContinualMetrics", "ShareCallback", "ShareTrainer", "ShareTrainingArguments"]
