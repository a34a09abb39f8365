"""Everything that a run shows and records, in one place: console, log files, tracker, curves."""

import contextlib
import math
from pathlib import Path

from support import checkpoint, devices, run_log, trackers
from support.after_checkpoint import AfterCheckpoint
from support.device_clock import Instant
from support.distributed import naming_lost_ranks
from support.errors import UserError
from support.launch import print0
from support.step_log import StepLog
from support.stop_signals import StopSignals


class RunOutput:
    """Console, `log.txt`, `progress.txt`, `run.json`, `curves.png` and tracker of a run.

    Every rank calls it; only the master process writes.
    """

    def __init__(
        self,
        log_dir: Path,
        master_process: bool,
        console: StepLog,
        record: dict,
        background: bool = False,
    ):
        """record: what `run.json` holds: at least `settings`; background: of the `Writer`"""
        self.log_dir, self.master_process = log_dir, master_process
        self.console, self.record = console, record
        self.log, self.curves = run_log.RunLog(log_dir), run_log.Curves(log_dir)
        self.after_checkpoint = AfterCheckpoint(record["settings"]["after_checkpoint"], log_dir)
        self.tracker, self.writer = trackers.Tracker(), checkpoint.Writer(background)
        # The last ones, in this order.
        self.results = dict(val_loss=None, val_bpb=None, val_perplexity=None, hellaswag=None)

    def print_system(self) -> None:
        """Prints the software and the device."""
        r, s = self.record, self.record["settings"]
        shape = s["n_head"], s["n_embd"], s["T"]
        print0(devices.describe_system(r["device"], r["dtype"], *shape))

    def print_setup(
        self, B: int, epochs: float, lengths: dict[str, int], newest: Path | None, earlier: dict
    ) -> None:
        """Prints the software and the device, what is trained, on what, and where it starts.

        lengths: tokens of each validation set; newest: checkpoint to continue; earlier: `run.json`
        of the run that is continued, or {}
        """
        r, s = self.record, self.record["settings"]
        self.print_system()
        rows = s["total_batch_size"] // s["T"]
        micro_steps = math.ceil(math.ceil(rows / r["world_size"]) / B)
        print0(
            f"{r['parameters']:,} parameters | {r['world_size']} x {r['device']} in {r['dtype']} | "
            f"B={B}, {micro_steps} micro-steps, {s['total_batch_size']:,} tokens per step"
        )
        others = "".join(f", {length:,} for {name}" for name, length in lengths.items())
        print0(
            f"{s['data']}: {r['train_tokens']:,} tokens for training "
            f"({epochs:.2f} epochs in {s['max_steps']} steps){others}"
        )
        before, now = earlier.get("settings", s)["max_steps"], s["max_steps"]
        if before != now:
            print0(f"max_steps was {before} and is {now}: the schedule has the new length")
        if newest:
            print0(f"continuing from {newest}")

    def start(self, step: int) -> None:
        """Writes `run.json`, removes what a killed run logged from `step` on, opens the tracker."""
        if self.master_process:
            checkpoint.try_directory(self.log_dir)
            settings = self.record["settings"]
            self.record |= run_log.describe_software()  # of the code that runs, also at its end
            run_log.write_run_json(self.log_dir, self.record)
            self.log.remove_steps(step)
            if name := settings["tracker"]:
                self.tracker = trackers.TRACKERS[name](self.log_dir, settings, step)

    @contextlib.contextmanager
    def steps(self, step: int, signals: StopSignals):
        """A context for the steps from `step` on: it ends the progress bar and the tracker, and
        waits for a checkpoint that is being written and for `after_checkpoint`."""
        self.console.start(step)
        with self.after_checkpoint.until_end(signals), naming_lost_ranks():  # before it waits
            try:
                yield
            except Exception:
                with contextlib.suppress(UserError):
                    self.writer.wait()
                raise
            finally:
                self.console.close()
                self.tracker.close()

    def log_step(
        self,
        step: int,
        lr: float,
        tokens: int,
        total_tokens: int,
        figures: dict[str, float],
        end: Instant,
    ) -> None:
        """Logs a training step.

        tokens: of this step; total_tokens: trained on so far; end: of the step
        figures: loss, norm and any others. `log.txt` gets the loss as `train`, the others but norm
            by their names.
        """
        self.writer.check()
        rates = self.console.log(step, lr, tokens, figures, end)
        self.record["last_step"] = figures
        if self.master_process:
            for name, value in figures.items():
                if name != "norm":
                    self.log.write(step, "train" if name == "loss" else name, value)
            self.log.write_progress(step, total_tokens, rates.pop("dt_s"))
            self.tracker.log(step, figures | dict(lr=lr) | rates)

    def log_evaluation(self, step: int, stream: str, values: dict[str, float], text: str) -> None:
        """Logs the results of an evaluation after `step` steps.

        values: by name; `log.txt` gets the first one as `stream`; text: for the console
        """
        print0(f"step {step:5d} | {text}", bold=True)
        self.results |= values
        if self.master_process:
            self.log.write(step, stream, next(iter(values.values())))
            self.tracker.log(step, values)

    def log_validation(self, step: int, name: str, loss: float, bpb: float) -> None:
        """Logs the loss on a validation set, in nats per token and in bits per byte of text."""
        perplexity, title = math.exp(min(loss, 99)), "validation" if name == "val" else name
        text = f"{title} loss: {loss:.4f} | perplexity: {perplexity:.2f} | bits per byte: {bpb:.4f}"
        values = {f"{name}_loss": loss, f"{name}_bpb": bpb, f"{name}_perplexity": perplexity}
        self.log_evaluation(step, name, values, text)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Prints a text after `step` steps and gives it to the tracker."""
        print0(f"--- {name.replace('_', ' ')} at step {step}\n{text}\n---")
        self.tracker.log_text(step, name, text)

    def draw_curves(self, last: bool) -> None:
        """Draws `curves.png` in the background; if `last`, waits for it."""
        if self.master_process and self.record["settings"]["curves"]:
            self.curves.draw(wait=last)

    def save_checkpoint(self, step: int, write_files) -> None:
        """Writes the checkpoint after `step` steps, and removes those that are no longer kept.

        write_files(directory): called in the background on a GPU, when the last one is written
        Raises UserError if the disk is full: here, in `log_step` or in `wait_for_checkpoint`.
        """

        def save() -> None:
            checkpoint.save(self.log_dir, step, write_files)
            at_end = step == self.record["settings"]["max_steps"]
            self.after_checkpoint.start(step, at_end)
            self.prune_checkpoints(step)

        self.tracker.flush()
        self.writer.start(save)

    def wait_for_checkpoint(self) -> None:
        """Returns when the last checkpoint is written."""
        self.writer.wait()

    def prune_checkpoints(self, step: int) -> None:
        """Removes the checkpoints that are no longer kept, nor in use by `after_checkpoint`.

        step: of the newest one
        """
        keep, in_use = self.record["settings"]["keep_checkpoints"], self.after_checkpoint.step
        checkpoint.prune(self.log_dir, step, keep, self.find_best(), in_use)

    def find_best(self) -> int | None:
        """The step of the checkpoint with the lowest validation loss so far."""
        found, find_problem = checkpoint.list_checkpoints(self.log_dir), checkpoint.find_problem
        valid = [step for step, path in found.items() if not find_problem(path, hashes=False)]
        return self.log.best(valid)

    def finish(self, step: int, tokens: int, peak_memory_mib: int | None) -> None:
        """Adds the results of a finished run to `run.json`, and prints them.

        tokens: trained on, like the time since the first step, over all starts of the run
        """
        seconds = self.log.seconds
        rate = tokens / seconds if seconds else None
        self.results |= dict(
            tokens=tokens, steps=step, seconds=seconds, tokens_per_second=rate,
            peak_memory_mib=peak_memory_mib, mfu=rate and self.console.mfu(rate),
        )  # fmt: skip
        if self.master_process:
            self.wait_for_checkpoint()
            log_bytes = self.log.path.stat().st_size
            end = dict(finished_step=step, log_bytes=log_bytes, result=self.results)
            run_log.write_run_json(self.log_dir, self.record | end)
            self.after_checkpoint.start(step, at_end=True)
        self.print_results()

    def print_results(self) -> None:
        """Prints a line `name: value` for each result that there is."""
        for name, value in self.results.items():
            if value is not None:
                print0(f"{name}: {value if isinstance(value, int) else format(value, '.6g')}")
