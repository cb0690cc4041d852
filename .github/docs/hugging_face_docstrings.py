"""Docstrings in the Hugging Face variety of Google's style, as griffe reads Google's.

``name (`int` or `"auto"`, *optional*, defaults to `8`):`` becomes ``name (int | Literal["auto"]):``, since defaults
are in the signature too. ``[`~SharedSubspace.apply`]`` becomes a link to the reference. Types of what is returned are
those of the signature.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


# Names that docstrings shorten, and their full names in the reference.
PUBLIC = {
    "GgufBase": "share_hf.serving.GgufBase",
    "LoraCache": "share_hf.serving.LoraCache",
    "ShareCallback": "share_hf.ShareCallback",
    "ShareConfig": "share_hf.ShareConfig",
    "ShareModel": "share_hf.tuner.ShareModel",
    "ShareTrainer": "share_hf.ShareTrainer",
    "ShareTrainingArguments": "share_hf.ShareTrainingArguments",
    "SharedSubspace": "share_hf.SharedSubspace",
}
# The pages of other libraries, which have no inventory of their names.
FOREIGN = {
    "huggingface_hub.CommitInfo": "https://huggingface.co/docs/huggingface_hub/package_reference/hf_api",
    "peft.PeftModel": "https://huggingface.co/docs/peft/package_reference/peft_model",
    "transformers.PreTrainedModel": "https://huggingface.co/docs/transformers/main_classes/model",
    "transformers.Trainer": "https://huggingface.co/docs/transformers/main_classes/trainer",
    "transformers.TrainingArguments": "https://huggingface.co/docs/transformers/main_classes/trainer",
}

_LINK = re.compile(r"\[`(~?)([\w.]+)`\](?!\(|\[)")
# A parameter in its section: its name at the first indentation, its type in parentheses, then what it is.
_PARAMETER = re.compile(r"^(\s{4,})(\*{0,2}\w+) \(((?:`|\[`).*?)\):(?=\s|$)")
_TYPE = re.compile(r"`~?([^`]+)`")
_RETURNED = re.compile(r"^(\s+)(?:\[`~?([\w.]+)`\]|`([^`]+)`)(?:, \*optional\*)?: ")
_SECTION = re.compile(r"^(\s*)(Args|Attributes|Returns|Yields|Raises|Example|Examples):\s*$")


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_google(obj.docstring.value)


def as_google(text: str) -> str:
    """Return a docstring with types as the signature has them, and with links to the reference."""
    section, lines = "", []
    for line in text.split("\n"):
        if match := _SECTION.match(line):
            section = match[2]
        elif section in ("Args", "Attributes"):
            line = _PARAMETER.sub(lambda match: f"{match[1]}{match[2]} ({_annotation(match[3])}):", line)
        elif section in ("Returns", "Yields"):
            line = _RETURNED.sub(r"\1", line)  # the type is the signature's
        lines.append(line)
    return with_links("\n".join(lines))


def with_links(text: str) -> str:
    """Return a text in which links such as ``[`~module.Name`]`` lead to the reference, or to other libraries."""
    return _LINK.sub(lambda match: _link(match[2], is_short=bool(match[1])), text)


def _annotation(types: str) -> str:
    """Return types as an annotation, from text such as `int` or `"auto"`, *optional*."""
    found = _TYPE.findall(types.partition(", *optional*")[0])
    return " | ".join(f"Literal[{name}]" if name.startswith('"') else name for name in found)


def _link(name: str, *, is_short: bool) -> str:
    head, _, rest = name.partition(".")
    shown = name.rpartition(".")[2] if is_short else name
    if name in FOREIGN:
        return f"[`{shown}`]({FOREIGN[name]})"
    path = f"{PUBLIC[head]}{'.' if rest else ''}{rest}" if head in PUBLIC else name
    return f"[`{shown}`][{path}]"
