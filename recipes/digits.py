"""Tasks made from scikit-learn's handwritten digits, which differ in their labels and their look; no download needed.

scikit-learn ships 1,797 images of 8 x 8 pixels, ordered by writer. The first 898 images are for pretraining a model.
Tasks are trained on the next 500 and tested on the last 399, most of which come from other writers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Images


try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise ImportError("the digits need scikit-learn: pip install share-hf[vision]") from error


PREFIX = "digits:"
SPLITS = {"pretrain": slice(0, 898), "train": slice(898, 1398), "test": slice(1398, None)}

# Ways to label a digit.
LABELS: dict[str, Callable[[int], str]] = {
    "ten": str,
    "even-odd": lambda digit: "odd" if digit % 2 else "even",
    "small-large": lambda digit: "large" if digit > 4 else "small",
    "prime": lambda digit: "prime" if digit in (2, 3, 5, 7) else "not prime",
}

# Ways to change how digits look: functions from images (n, 8, 8), with values from 0 to 255, to the same shape.
LOOKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "upright": lambda images: images,
    "rotated": lambda images: np.rot90(images, axes=(1, 2)),
    "mirrored": lambda images: images[:, :, ::-1],
    "inverted": lambda images: 255 - images,
}

# The six default tasks, in the order in which they are learned.
TASKS = [
    "even-odd=digits:even-odd",
    "rotated=digits:rotated",
    "small-large=digits:small-large",
    "inverted=digits:inverted",
    "prime=digits:prime",
    "mirrored=digits:mirrored",
]


def digits_of(place: str) -> DatasetDict:
    """Return the `train` and `test` splits of a task, with the columns `image` and `label`.

    Args:
        place: Labels of the digits, their look, or both: `digits:even-odd`, `digits:rotated`, `digits:prime,inverted`.
            By default, the labels are all ten digits and the look is upright.

    Raises:
        ValueError: If `place` names anything else.
    """
    named = place.removeprefix(PREFIX).split(",")
    labels, looks = ([name for name in named if name in known] for known in (LABELS, LOOKS))
    if len(labels) > 1 or len(looks) > 1 or len(labels) + len(looks) != len(named):
        raise ValueError(f"{place!r} is not a digits task, expected one of {[*LABELS]}, one of {[*LOOKS]}, or both")
    label, look = next(iter(labels), "ten"), next(iter(looks), "upright")
    return DatasetDict({split: digits(split, label, look) for split in ("train", "test")})


def digits(split: str, label: str = "ten", look: str = "upright") -> Dataset:
    """Return one split of the digits, with the columns `image` and `label`."""
    found = load_digits()
    images = LOOKS[look]((found.images[SPLITS[split]] * (255 / 16)).astype(np.uint8))
    names = list(dict.fromkeys(map(LABELS[label], range(10))))
    return Dataset.from_dict(
        {
            "image": [Images.fromarray(np.ascontiguousarray(image)) for image in images],
            "label": [names.index(LABELS[label](digit)) for digit in found.target[SPLITS[split]].tolist()],
        },
        features=Features({"image": Image(), "label": ClassLabel(names=names)}),
    )
