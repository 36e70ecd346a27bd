"""What a run leaves to look at: lines, `validation.jsonl`, its picture `curves.png`, and TensorBoard's events."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.files import atomic_write, finite
from utils.training.curves import draw_curves
from utils.training.validation import log_validation

SECONDS_PER_LINE = 60  # between lines of progress, where there is no terminal for a bar
STEPS_PER_EVENT = 10  # of TensorBoard


class RunLog:
    """The log of a run in its folder; processes other than the main one leave nothing."""

    def __init__(self, folder: Path, is_main: bool) -> None:
        self.validations = folder / "validation.jsonl"
        self.curves = folder / "curves.png"
        self.is_main = is_main
        self.writer: SummaryWriter | None = None
        self.bar: tqdm | None = None
        self.next_line = 0.0  # when the next line of progress is due

    def open(self, step: int, percent: float) -> None:
        """Begin TensorBoard's events, anew after this step, and a bar of the budget."""
        if self.is_main:
            self.writer = SummaryWriter(str(self.validations.parent), purge_step=step + 1)
        bar_format = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        hidden = None if self.is_main else True
        self.bar = tqdm(desc="training", total=100, initial=percent, bar_format=bar_format, disable=hidden)

    def close(self) -> None:
        """End the bar and TensorBoard's events."""
        self.bar.close()
        self._write(SummaryWriter.close)

    def print(self, text: str) -> None:
        """A line, above the bar."""
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()  # a log file shows it at once

    def step(self, number: int, values: dict[str, float], percent: float, at_once: bool = False) -> None:
        """Values of a step: in the bar, or where there is no terminal in a line now and then; and TensorBoard's, every
        STEPS_PER_EVENT steps or at once."""
        told = {"step": number, **{k: f"{values[k]:.4g}" for k in ("loss", "bpp") if k in values}}
        if not self.bar.disable:
            self.bar.n = percent
            self.bar.set_postfix(told)
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + SECONDS_PER_LINE
            self.print(f"{percent} %, " + ", ".join(f"{name} {value}" for name, value in told.items()))
        if at_once or number % STEPS_PER_EVENT == 0:
            for name, value in values.items():
                self._write(SummaryWriter.add_scalar, f"training/{name}", value, number)

    def validation(self, result: dict, pictures: dict[str, Tensor]) -> None:
        """A result of `validate` with its step, and the pictures that it returned."""
        line = json.dumps(finite(result), allow_nan=False)
        self.print(line)
        self._write(log_validation, result, pictures, result["step"])
        with self.validations.open("a") as file:
            file.write(line + "\n")

    def draw_curves(self) -> None:
        """Draw `curves.png` of all validations, as long as that works: a run goes on without its picture."""
        try:
            draw_curves(self.validations, self.curves)
        except OSError as error:
            self.print(f"note: the curves cannot be drawn ({error})")

    def keep_until(self, step: int) -> None:
        """Forget validations of later steps, which will be made again."""
        if self.is_main and self.validations.exists():
            lines = [line for line in self.validations.read_text().splitlines() if _step_of(line) <= step]
            with atomic_write(self.validations) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())

    def _write(self, write: Callable[..., None], *values) -> None:
        """Call `write` with TensorBoard's writer, as long as that works: a run goes on without its curves."""
        if self.writer:
            try:
                write(self.writer, *values)
            except OSError as error:
                self.writer = None  # not closed, as closing would wait for its thread, which has ended
                self.print(f"note: TensorBoard's events cannot be written any more ({error})")


def _step_of(line: str) -> float:
    """Step of a line of validation.jsonl; infinite for a line that a full disk or a power cut has torn."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
