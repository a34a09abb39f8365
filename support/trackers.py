"""TensorBoard or Weights & Biases beside `log.txt`; each is imported only when it is asked for.

Both hold each value once, whatever is killed: a run that starts again from step N does the steps
after N anew, and its values must not stand twice.
"""

import html
import importlib.util
import json
import shutil
import uuid
from pathlib import Path

from support import run_log
from support.errors import SettingError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # tracker: what has to be installed


def check(tracker: str) -> None:
    """Raises SettingError for a tracker that there is not, or whose package is missing."""
    if tracker and tracker not in PACKAGES:
        raise SettingError(f"tracker={tracker!r}: must be '', tensorboard or wandb")
    if tracker and importlib.util.find_spec(PACKAGES[tracker]) is None:
        raise SettingError(
            f"tracker={tracker!r}: not installed; pip install {PACKAGES[tracker]}, or leave it out"
        )


def start(tracker: str, log_dir: Path, settings: dict, step: int, told: set[int]):
    """The tracker of a run that goes on at `step`; it has the methods of `Nothing`.

    told: the steps whose values were logged before the run was killed, those from `step` on, too
    """
    if tracker == "tensorboard":
        return TensorBoard(log_dir, step, told)
    if tracker == "wandb":
        return WeightsAndBiases(log_dir, settings, step)
    return Nothing()


class Nothing:
    """What a run without a tracker tells."""

    def step(self, step: int, **values: float) -> None:
        """Takes the values of a step of training, the last ones of that step."""

    def evaluation(self, step: int, **values: float) -> None:
        """Takes values that were measured before that step."""

    def text(self, step: int, name: str, text: str) -> None:
        """Takes a sample."""

    def flush(self) -> None:
        """Returns when all that was told is safe: before a checkpoint after which it is not told
        again."""

    def close(self) -> None:
        """The end of the run, or of this part of it."""


class TensorBoard(Nothing):
    """Event files in `log_dir/tensorboard`. A START event has readers drop the values that they
    read of the steps from there on; texts they do not drop, so these are told once only."""

    def __init__(self, log_dir: Path, step: int, told: set[int]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.told = SummaryWriter(str(log_dir / "tensorboard"), purge_step=step), told

    def step(self, step, **values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    evaluation = step

    def text(self, step, name, text):
        if step not in self.told:
            self.writer.add_text(name, f"```\n{text}\n```", step)
            self.flush()

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


class WeightsAndBiases(Nothing):
    """A run of wandb, continued under the id in `log_dir/wandb_id.txt`; a row is all that is known
    of a step.

    wandb takes nothing back, and of an offline run that is killed it loses what it had not yet
    written. So the rows stand in `log_dir/wandb_rows.jsonl`, too, and are told again at each start:
    offline all, in place of the directory before; online those that the server has not.
    """

    def __init__(self, log_dir: Path, settings: dict, step: int):
        import wandb

        id_file, self.file = log_dir / "wandb_id.txt", log_dir / "wandb_rows.jsonl"
        if not id_file.exists():
            run_log.replace(id_file, uuid.uuid4().hex[:12] + "\n")
        ident = id_file.read_text(encoding="utf-8").strip()
        try:
            self.run = wandb.init(
                project="gpt2", name=log_dir.resolve().name, dir=str(log_dir), config=settings,
                id=ident, resume="allow", settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except wandb.Error as error:
            raise SettingError(
                f"tracker='wandb': {error}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from None
        for earlier in log_dir.glob(f"wandb/offline-run-*-{ident}"):
            if str(earlier.resolve()) not in str(Path(self.run.dir).resolve()):
                shutil.rmtree(earlier, ignore_errors=True)
        self.first, self.row, self.row_step = self.run.step, {}, 0
        rows = [row for row in self.read() if row["step"] < step]
        run_log.replace(self.file, "".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            self.tell(**row)

    def read(self) -> list[dict]:
        """The rows so far; a kill may have left the last one without its end."""
        if not self.file.exists():
            return []
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def step(self, step, **values):
        self.send(step, self.row | values)

    def evaluation(self, step, **values):
        self.row, self.row_step = self.row | values, step

    def text(self, step, name, text):
        self.evaluation(step, **{name: text})

    def send(self, step: int, values: dict) -> None:
        """Keeps a row and tells it."""
        self.row = {}
        run_log.append(self.file, json.dumps(dict(step=step, values=values)) + "\n")
        self.tell(step, values)

    def tell(self, step: int, values: dict) -> None:
        """Tells a row that wandb does not have; texts go as HTML."""
        import wandb

        for name, value in values.items():
            if isinstance(value, str):
                values = values | {name: wandb.Html(f"<pre>{html.escape(value)}</pre>")}
        if step >= self.first:
            self.run.log(values, step=step, commit=True)

    def close(self):
        if self.row:
            self.send(self.row_step, self.row)
        self.run.finish()
