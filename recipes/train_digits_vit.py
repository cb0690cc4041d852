"""Train a small ViT for `vision_stream.py` on half of scikit-learn's digits, in under a minute on two cores.

    python recipes/train_digits_vit.py digits-vit

The model is trained on the 898 images that no task of `digits.py` is trained or tested on. They are upright, and each
is shifted by up to a pixel at random. The folder receives the body of the model, without its head, and its image
processor.
"""

from __future__ import annotations

import quiet  # noqa: F401


# isort: split
import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from digits import digits
from PIL import Image
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed


try:
    from transformers import ViTImageProcessorPil as ViTImageProcessor  # does not need torchvision
except ImportError:  # earlier versions of transformers
    from transformers import ViTImageProcessor


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="Folder to write the model to.")
    parser.add_argument("--epochs", type=float, default=25.0, help="Number of training epochs.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights and batches.")
    parsed = parser.parse_args()
    set_seed(parsed.seed)
    torch.set_num_threads(1)  # a second thread costs more than it gains for such a small model

    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            num_labels=10,
        )
    )
    with TemporaryDirectory() as scratch:
        args = TrainingArguments(
            scratch,
            num_train_epochs=parsed.epochs,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            weight_decay=0.05,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            seed=parsed.seed,
        )
        trainer = Trainer(model, args, train_dataset=digits("pretrain").with_transform(moved_images(processor)))
        trainer.train()
    model.vit.save_pretrained(parsed.folder)
    processor.save_pretrained(parsed.folder)
    print(f"ViT of {model.num_parameters():,} parameters in {parsed.folder}")


def moved_images(processor: ViTImageProcessor) -> Any:
    """Make a transform that shifts each image by up to a pixel, horizontally and vertically."""
    random = np.random.default_rng(0)

    def read(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        images = []
        for image in batch["image"]:
            down, right = random.integers(0, 3, size=2)
            images.append(Image.fromarray(np.pad(image, 1)[down : down + 8, right : right + 8]).convert("RGB"))
        return {**processor(images, return_tensors="pt"), "labels": batch["label"]}

    return read


if __name__ == "__main__":
    sys.exit(main())
