"""The PEFT tuner: configuration, layer, model, and its registration under the name SHARE."""

from .config import ShareConfig
from .layer import ShareLayer
from .model import ShareModel, share_layers
from .registration import register


__all__ = ["ShareConfig", "ShareLayer", "ShareModel", "register", "share_layers"]
