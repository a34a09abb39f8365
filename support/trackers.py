"""Logging to TensorBoard or Weights & Biases, in addition to `log.txt`."""

import html
import importlib.util
import uuid
from pathlib import Path

from support import run_log
from support.errors import SettingError


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

    A resumed run purges the earlier values of the steps that it repeats, but not their texts.
    """

    def __init__(self, log_dir: Path, settings: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(log_dir / "tensorboard"), purge_step=step)

    def log(self, step, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_text(self, step, name, text):
        self.writer.add_text(name, f"```\n{text}\n```", step)

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


class WeightsAndBiases(Tracker):
    """A run of wandb, resumed under the id in `log_dir/wandb_id.txt`.

    wandb collects the values of a step in one row, and writes it when the step changes. Steps that
    the server has are not sent again: if a resumed run repeats them, they keep their first values.
    """

    def __init__(self, log_dir: Path, settings: dict, step: int):
        import wandb

        id_file = log_dir / "wandb_id.txt"
        if not id_file.exists():
            run_log.replace(id_file, uuid.uuid4().hex[:12] + "\n")
        try:
            self.run = wandb.init(
                project="gpt2", name=log_dir.resolve().name, dir=str(log_dir), config=settings,
                id=id_file.read_text(encoding="ascii").strip(), resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(f"{id_file}: cannot be read ({error}); remove it") from None
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


# By the names of their packages; made with (log_dir, settings, first step) of a run.
TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def validate(tracker: str) -> None:
    """Raises SettingError if there is no such tracker, or if its package is not installed."""
    if tracker and tracker not in TRACKERS:
        raise SettingError(f"tracker={tracker!r}: must be '', tensorboard or wandb")
    if tracker and importlib.util.find_spec(tracker) is None:
        raise SettingError(
            f"tracker={tracker!r}: not installed; pip install {tracker}, or leave it out"
        )
