"""Tokens are in no file, log or error. Paths of a machine are in nothing that is pushed, and in no card."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from share_hf import SharedSubspace, ShareTrainer
from tests.continual.cases import classification_tasks, classifier_trainer
from tests.hub_server import Answer, DropUpload, LoseAnswer, WebPage, is_commit
from tests.hub_server.faults import Fault
from tests.hub_server.fixtures import Hub
from tests.trees import named


REPO = "org/share-subspace"


def traces(content: Iterable[bytes], hub: Hub, folder: Path) -> list[bytes]:
    """Return what names the token or the folder of a user in some texts."""
    secrets = [hub.user.token.encode(), str(folder).encode()]
    return [secret for text in content for secret in secrets if secret in text]


def everything_in(hub: Hub) -> list[bytes]:
    """Return every file of every branch and tag of the repository, and the title of every commit."""
    repository = hub.repository(REPO)
    commits = [*repository.branches.values(), *repository.tags.values()]
    titles = [commit.title.encode() for commit in hub.api.list_repo_commits(REPO)]
    return titles + [file.content for commit in commits for file in commit.files.values()]


@pytest.fixture
def with_all_logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    for name in ("share_hf", "huggingface_hub", "httpx"):
        caplog.set_level(logging.DEBUG, logger=name)
    return caplog


@pytest.fixture
def trainer(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> ShareTrainer:
    """A trainer with a base model from a folder of the user, and with everything else that may name one."""
    home = tmp_path / "home"
    model = named(tiny_model("bert"), str(home / "models" / "bert"))
    model.config._name_or_path = model.name_or_path
    return classifier_trainer(
        model,
        home / "runs",
        classification_tasks("colors", "shapes"),
        push_to_hub=True,
        hub_model_id=REPO,
        hub_strategy="every_save",
        run_name=str(home / "runs" / "first"),
    )


def test_a_stream_leaves_no_trace_of_its_machine_in_what_it_saves_and_pushes(
    hub: Hub, trainer: ShareTrainer, tmp_path: Path, with_figures: None
) -> None:
    trainer.train()
    trainer.push_to_hub()
    assert len(hub.repository(REPO).branches) == 3
    assert not traces(everything_in(hub), hub, tmp_path)
    saved = tmp_path / "home" / "runs" / "subspace"
    assert not traces([(saved / "README.md").read_bytes()], hub, tmp_path)


def test_adapters_that_name_folders_leave_no_trace_of_them(
    hub: Hub, save_lora: Callable[..., Path], tmp_path: Path
) -> None:
    base = str(tmp_path / "models" / "llama")
    subspace = SharedSubspace.from_adapters(
        {name: save_lora(name, seed=seed, base=base) for seed, name in enumerate(("mrpc", "sst2"))}, progress=False
    )
    subspace.save_pretrained(tmp_path / "tree")
    subspace.push_to_hub(REPO)
    assert not traces([*everything_in(hub), (tmp_path / "tree" / "README.md").read_bytes()], hub, tmp_path)


@pytest.mark.parametrize(
    "fault",
    [Answer(401), Answer(403), Answer(404), Answer(500), WebPage(), LoseAnswer(), DropUpload()],
    ids=lambda fault: f"{type(fault).__name__}-{getattr(fault, 'status', '')}",
)
def test_no_error_and_no_log_names_a_token(
    fault: Fault,
    hub: Hub,
    subspace: SharedSubspace,
    with_all_logs: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hub.server.faults.add(is_commit, fault, times=99)
    with pytest.raises(Exception) as caught:
        subspace.push_to_hub(REPO, token=hub.user.token, max_attempts=2)
    texts = []
    error: BaseException | None = caught.value
    while error is not None:
        texts.append(f"{error} {error!r}")
        error = error.__cause__ or error.__context__
    printed = capfd.readouterr()
    texts += [with_all_logs.text, printed.out, printed.err]
    assert len("".join(texts)) > 50
    assert not [text for text in texts if hub.user.token in text]


@pytest.fixture(autouse=True)
def propagated() -> Iterable[None]:
    """Pass the logs of transformers and related libraries to pytest."""
    transformers_logging.enable_propagation()
    yield
    transformers_logging.disable_propagation()
