"""Progress output of a stream: one progress bar for the current phase, and one line for each finished task."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..state import ContinualMetrics, mean_score, row_names


class StreamProgressCallback(TrainerCallback):
    """Shows the task, its phase and the loss on a temporary bar, and prints a line for each finished task."""

    def __init__(self) -> None:
        self.title = ""
        self._bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, desc=self.title, leave=False, dynamic_ncols=True, unit="step")
            self._bar.update(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def task_line(self, metrics: ContinualMetrics, learned_by: str, seconds: float) -> None:
        """Print the scores of the newest task, or of several that were learned together, and the stream's summary."""
        name, row = row_names(metrics.as_dict())[-1], metrics.matrix[-1]
        first, done = metrics.learned - (metrics.row_sizes or [1])[-1], metrics.learned
        before, score = (mean_score(scores[first:done]) for scores in (metrics.baseline, row))
        parts = [f"{done:3d} {name:<16s} {learned_by:<12s}"]
        if score is not None:
            was = f"{before:.3f} -> " if before is not None else ""
            parts.append(f"{metrics.score_of(metrics.tasks[first])} {was}{score:.3f}")
        if first and metrics.average is not None:
            parts.append(f"average {metrics.average:.3f}  forgetting {metrics.forgetting or 0.0:+.3f}")
        parts.append(f"drift {max(metrics.drift.values(), default=0.0):.3f}")
        parts.append(f"{seconds:.0f} s")
        tqdm.write("  ".join(parts))
