"""A model with adapters is not pushed over a subspace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from share_hf import ShareConfig, SharedSubspace
from tests.format.test_old_trees import VERSION_1
from tests.hub_server.fixtures import Hub


REPO = "org/share-subspace"


@pytest.mark.parametrize("method", [ShareConfig, LoraConfig])
@pytest.mark.parametrize("native", [False, True])
def test_a_repository_that_holds_a_subspace_is_not_written_over(
    native: bool, method: type, hub: Hub, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    hub.api.create_repo(REPO)
    hub.api.upload_folder(repo_id=REPO, folder_path=VERSION_1)
    before = hub.api.repo_info(REPO).sha
    model, config = tiny_model("llama"), method(target_modules=["q_proj"])
    if native:
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
    with pytest.raises(ValueError, match=f"{REPO}: holds a shared subspace"):
        model.push_to_hub(REPO)
    with pytest.raises(ValueError, match=f"{REPO}: holds a shared subspace"):
        model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id=REPO)
    assert hub.api.repo_info(REPO).sha == before
    assert SharedSubspace.from_pretrained(REPO).tasks == ("mrpc", "rte")


def test_another_repository_is_pushed_to_as_ever(hub: Hub, tiny_model: Callable[[str], PreTrainedModel]) -> None:
    for _ in range(2):
        model = get_peft_model(tiny_model("llama"), ShareConfig(num_components=8, target_modules=["q_proj"]))
        model.push_to_hub("org/model")
    assert isinstance(PeftModel.from_pretrained(tiny_model("llama"), "org/model"), PeftModel)
