"""Logging to TensorBoard or Weights & Biases, in addition to `log.txt`."""

import html
import importlib.util
import uuid
from pathlib import Path

from support import run_log
from support.errors import SettingError

TRACKERS = ("tensorboard", "wandb")  # also the names of the packages


def validate(tracker: str) -> None:
    """Raises SettingError if there is no such tracker, or if its package is not installed."""
    if tracker and tracker not in TRACKERS:
        raise SettingError(f"tracker={tracker!r}: must be '', tensorboard or wandb")
    if tracker and importlib.util.find_spec(tracker) is None:
        raise SettingError(
            f"tracker={tracker!r}: not installed; pip install {tracker}, or leave it out"
        )


def start(tracker: str, log_dir: Path, settings: dict, step: int, logged_steps: set[int]):
    """The Tracker of a run that starts or continues at `step`.

    settings: the run's settings by name, shown by wandb
    logged_steps: training steps in log.txt, including those from `step` on that a kill undid
    """
    if tracker == "tensorboard":
        return TensorBoard(log_dir, step, logged_steps)
    if tracker == "wandb":
        return WeightsAndBiases(log_dir, settings)
    return Tracker()


class Tracker:
    """Receives the values and texts of a run; this base class ignores them."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Logs values of a step, by name; a step may be logged in several calls."""

    def log_text(self, step: int, name: str, text: str) -> None:
        """Logs a text of a step."""

    def flush(self) -> None:
        """Returns when all that was logged so far is written."""

    def close(self) -> None:
        """Ends the logging of this process."""


class TensorBoard(Tracker):
    """Event files in `log_dir/tensorboard`.

    `purge_step` makes readers drop earlier values of the steps that a resumed run repeats. They do
    not drop texts, so a text of a step that was logged before is not written again.
    """

    def __init__(self, log_dir: Path, step: int, logged_steps: set[int]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(log_dir / "tensorboard"), purge_step=step)
        self.logged_steps = logged_steps

    def log(self, step, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_text(self, step, name, text):
        if step not in self.logged_steps:
            self.writer.add_text(name, f"```\n{text}\n```", step)
            self.flush()

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


class WeightsAndBiases(Tracker):
    """A run of wandb, resumed under the id in `log_dir/wandb_id.txt`.

    wandb collects the values of a step in one row, and writes it when the step changes. Steps that
    the server has are not sent again: if a resumed run repeats them, they keep their first values.
    """

    def __init__(self, log_dir: Path, settings: dict):
        import wandb

        id_file = log_dir / "wandb_id.txt"
        if not id_file.exists():
            run_log.replace(id_file, uuid.uuid4().hex[:12] + "\n")
        try:
            self.run = wandb.init(
                project="gpt2", name=log_dir.resolve().name, dir=str(log_dir), config=settings,
                id=id_file.read_text(encoding="utf-8").strip(), resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except wandb.Error as error:
            raise SettingError(
                f"tracker='wandb': {error}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from None

    def log(self, step, values):
        if step >= self.run.starting_step:
            self.run.log(values, step=step)

    def log_text(self, step, name, text):
        import wandb

        self.log(step, {name: wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def close(self):
        self.run.finish()
