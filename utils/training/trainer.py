"""The training loop: one step, the run, saving and resuming.

The folder of a run has `last.pth.tar` to resume from, `model.pth.tar` to use (EMA weights, float16,
coding tables), `validation.jsonl`, its picture `curves.png`, and TensorBoard's events.
"""

import contextlib
import functools
import math
import sys
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from compressai.layers import GDN
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from models import Codec
from models.large.bands import scaled_height
from models.large.memory import send
from models.layers import Float32GDN
from models.state_dict import digest, without_tables
from utils.checkpoint import describe, export_model, read_checkpoint, write_checkpoint
from utils.device import is_out_of_memory, out_of_memory_as_value_error, processor
from utils.distributed import DistContext, is_lost_peer
from utils.errors import UserError
from utils.files import finite, remove_left_over
from utils.pictures import ImageError
from utils.training.ema import ExponentialMovingAverage
from utils.training.fit_tables import first_batches, fit_tables
from utils.training.log import RunLog
from utils.training.objectives import Objective
from utils.training.optimizers import make_optimizers
from utils.training.patches import Batch, PatchDataset, ReadersGone, StoppedWaiting, batches, usable
from utils.training.schedule import Progress, budget_used, in_last_part, learning_rate
from utils.training.signals import answered_signals
from utils.training.validation import validate

LONG_WAIT = 0.2  # share of the time in which patches were waited for, from which on it is told
MAX_SKIPPED_STEPS = 10  # in a row; then the run ends
Inputs = tuple[Batch, Tensor, tuple[Tensor, Tensor]]  # patches `[B, 3, h, w]` in [0, 1], and noise of y and of z


class Trainer:
    """Trains the model of an objective.

    Args:
        objective: on its device, with the settings of the run.
        folder: where the run is kept.
        validation: photographs, uint8 `[3, H, W]`, sides multiples of 128, for `validate`; the same in every process.
        workers: processes that read photographs which are not cached.
        history: training records of the weights at the start.

    Raises:
        ValueError: a layer has running statistics, which are neither averaged nor shared by the processes.
        TypeError: a layer of a network has no footprint (models/large/bands.py).
    """

    def __init__(
        self, objective: Objective, dataset: PatchDataset, folder: Path, context: DistContext,
        validation: Sequence[Tensor], workers: int = 0, history: Sequence[dict] = (),
    ) -> None:
        self.objective = objective
        self.model = objective.model
        self.settings = settings = objective.settings
        self.dataset = dataset
        self.validation = validation
        self.workers = workers
        self.folder = folder
        self.log = RunLog(folder, context.is_main)
        self.context = context
        self.history = [_without_folder(record) for record in history]
        self.device = context.device
        self.progress = Progress()
        modules = self.model.named_modules()
        if running := [name for name, module in modules if getattr(module, "track_running_stats", False)]:
            raise ValueError(f"running statistics are not averaged: {', '.join(running)} (GroupNorm has none)")
        for network in self.model.networks:
            scaled_height(network, 1)  # asks every layer for its footprint, as files of large pictures do, later
        if settings.amp == "fp16":
            for module in objective.modules():  # teachers too
                if type(module) is GDN:
                    module.__class__ = Float32GDN
        self.finished = False  # whether the weights for use are those of the last step
        self.optimizers = make_optimizers(self.model, settings)
        groups = self.optimizers["net"].param_groups
        self.parameters = [p for group in groups for p in group["params"]]  # whose gradients are clipped
        self.batch_size = settings.batch_size
        self.last_part = False  # whether it has begun
        self.compiled = False  # whether a first step of a size compiles, which counts as no training
        self.sizes: set[torch.Size] = set()  # of the batches so far
        # fp16's small gradients would vanish; PyTorch's start at 2^16 costs more skipped steps than one at 2^10.
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**10, enabled=settings.amp == "fp16")
        self.ddp_objective: nn.Module = _distributed(objective) if context.world_size > 1 else objective
        self.ema = ExponentialMovingAverage(self.model)  # of weights that are the main process's in all of them by now
        self.prefetched: Inputs | None = None
        self.data_seconds = 0.0
        self.lap = time.monotonic()  # when the processes last told each other how long they have trained
        known = (usable(dataset.paths[number], dataset.size, image) for number, image in dataset.cache.items())
        self.unusable = {told for told in known if isinstance(told, str)}  # and were named when they were read
        self.stop = self.all_stop = False  # whether this process, or any, was asked to stop
        self.signal = 0  # by which it was asked
        objective.train()

    # One step ---------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One step of the optimizers, unless a loss or gradient is not finite; returns values to log."""
        if not self.last_part and in_last_part(self.progress, self.settings):
            self._begin_last_part()
        rate = learning_rate(self.progress, self.settings)
        for group in self.optimizers["net"].param_groups:
            group["lr"] = rate * group["factor"]
        batch, x, noise = self.prefetched or self.next_inputs()
        # Drop-path draws from PyTorch's generator, whose seed depends on the step and the process.
        seeds = np.random.SeedSequence((self.settings.seed, self.progress.step, self.context.rank))
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        keys = [batch.keys] if self.objective.repeat else []
        out = self.ddp_objective(x, batch.rate_uniform, noise, *keys)
        self.scaler.scale(out.pop("total")).backward()
        if self.context.world_size > 1 and not self.sizes:
            self._check_gradients()
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_max_norm or math.inf)
        self.prefetched = self.next_inputs()  # while a GPU is still busy with the step
        logged = {**out, "gradient norm": norm}
        seconds = time.monotonic() - self.lap
        self.lap = time.monotonic()
        means = torch.stack([value.detach().float() for value in logged.values()])
        numbers, (seconds, waiting, stop) = self.context.exchange(means, seconds, self.data_seconds, float(self.stop))
        finite = bool(np.isfinite(numbers).all())
        for optimizer in self.optimizers.values():
            if finite:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        if finite:
            self.ema.update(self.ema_decay())
        self.progress.skipped += not finite
        self.progress.skipped_in_a_row = 0 if finite else self.progress.skipped_in_a_row + 1
        self.progress.step += 1
        self.progress.patches += self.batch_size
        if not self.compiled or x.shape in self.sizes:
            self.progress.seconds += seconds
            self.progress.waiting += min(waiting, seconds)  # a run may have been suspended while it waited
        self.sizes.add(x.shape)
        self.all_stop = bool(stop)
        times = {
            "patches a second": self.batch_size / seconds,
            "share of the time waiting for patches": min(1.0, waiting / seconds),
        }
        return dict(zip(logged, numbers, strict=True)) | {"learning rate": rate} | times

    def _begin_last_part(self) -> None:
        """Go on with the patches and the loss of the last part."""
        self.last_part = True
        self.batch_size = self.settings.last_batch_size
        self.objective.begin_last_part()
        self.batches.close()
        del self.batches
        self.prefetched = None
        self.dataset = self.dataset.of_size(self.settings.last_patch_size, self.settings.synthetic_share)

    def ema_decay(self) -> float:
        """Rises from zero at the first step, as a constant decay would keep the first weights for long."""
        progress = self.progress
        if progress.step == progress.skipped:
            return 0.0
        return min(self.settings.ema, (1 + progress.step) / (10 + progress.step))

    @functools.cached_property
    def batches(self) -> Generator[Batch, None, None]:
        """The batches of this process, from the position that the run has at their first use."""
        batch = self.batch_size // self.context.world_size
        start = self.progress.patches
        alone = self.context.world_size == 1  # several processes end together, after a step
        return batches(
            self.dataset, batch, start=start, workers=self.workers, context=self.context,
            stopped=lambda: self.stop and alone,
        )

    def next_inputs(self) -> Inputs:
        """The next batch of this process, with its patches and noise on the device."""
        batch = self.next_batch()
        x = send(batch.patches, self.device).float() / 255
        # Seeds of the noise and rates come with the samples, so they do not depend on the number of processes.
        return batch, x, self.noise(batch.seeds, x.shape[2:])

    def next_batch(self) -> Batch:
        """The next batch of this process. Prints photographs that could not be used."""
        start = time.monotonic()
        try:
            batch = next(self.batches)
        except ImageError as error:  # PyTorch puts the traceback of a worker into the text
            raise ImageError(str(error).splitlines()[-1].split("ImageError: ")[-1]) from None
        self.data_seconds = time.monotonic() - start
        for text in batch.unusable:
            if text not in self.unusable:
                self.unusable.add(text)
                tqdm.write(f"skipped: {text}", file=sys.stderr)
        return batch

    def noise(self, seeds: list[int], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Uniform noise in ±½ for y and z of each sample."""
        generator = torch.Generator(self.device)
        shapes = self.model.noise_shapes(*size)
        samples = []
        for seed in seeds:
            generator.manual_seed(seed)
            samples.append([torch.rand(shape, generator=generator, device=self.device) for shape in shapes])
        y, z = zip(*samples, strict=True)
        return torch.stack(y) - 0.5, torch.stack(z) - 0.5

    # The run ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until the budget is spent or a signal comes; validate and save in between and at the end.

        Raises:
            UserError: MAX_SKIPPED_STEPS steps in a row were not finite; or another process of the run is gone, or would
                train another run.
        """
        if self.context.world_size > 1:
            self._check_processes()
        with self._started():
            next_save = self._next_time(self.settings.save_minutes)
            next_validation = self._next_time(self.settings.validate_minutes)
            while budget_used(self.progress, self.settings) < 1:
                self._log_step(self.step())
                if self.all_stop:
                    self.save()
                    self.log.print(f"stopped and saved at step {self.progress.step}; go on with --resume")
                    return
                minutes = self.progress.seconds / 60
                if minutes >= next_validation:
                    next_validation = self._next_time(self.settings.validate_minutes)
                    self.save()
                    self.validate()
                elif minutes >= next_save:
                    next_save = self._next_time(self.settings.save_minutes)
                    self.save()
                else:
                    continue
                self.context.gather(None)  # the main process writes; the others would count the wait as training
                self.lap = time.monotonic()
            self.log.bar.close()
            self.save()  # first: what follows may be interrupted
            self.log.print("validating the weights, and fitting their coding tables")
            self.validate(last=True)

    def _check_processes(self) -> None:
        """UserError where the processes would not train one network. New weights are the first one's in all of them;
        but each resumes from its own folder, and DistributedDataParallel compares nothing."""
        run = asdict(self.settings) | {"step": self.progress.step, "weights": digest(self.model.state_dict()).hex()}
        first, *others = self.context.gather(run)
        for rank, other in enumerate(others, 1):
            if differ := [f"{name} ({other[name]}, not {first[name]})" for name in run if other[name] != first[name]]:
                told = f"process {rank} would train another run than process 0: {', '.join(differ)}"
                raise UserError(f"{told}; all need the same arguments, photographs and --save_path")

    def _check_gradients(self) -> None:
        """UserError naming parameters that several processes would wait for, as nothing depends on them."""
        parameters = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if idle := [name for name, p in parameters if p.grad is None]:
            raise UserError(f"no loss depends on {', '.join(idle)}: leave them out to train in several processes")

    def _next_time(self, interval: float) -> float:
        """The next multiple of an interval in minutes: the same for a run that is often resumed, as it may be."""
        minutes = self.progress.seconds / 60
        return (minutes // interval + 1) * interval if interval else minutes

    @contextlib.contextmanager
    def _started(self) -> Iterator[None]:
        """A run with its log and its answers to signals; what ends it before its time is told in a line."""
        if self.context.is_main:
            remove_left_over(self.folder, "*.pth.tar")
        self.log.open(self.progress.step, self._percent())
        self.lap = time.monotonic()
        try:
            with answered_signals(self._stop, self._go_on) as handlers:
                try:
                    yield
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        advice = f"a smaller --batch-size (or --cache-gb) may do; {self._how_to_continue()}"
                        raise UserError(f"there is not enough memory for a step: {advice}") from None
                    if self.context.world_size == 1 or not is_lost_peer(error):
                        raise
                    handlers.pop_all()  # torchrun's SIGTERM comes now; it must not end this process before its message
                    cause = str(error).strip().splitlines()[0]
                    lost = f"another process of this run has ended, or cannot be reached ({cause})"
                    raise UserError(f"{lost}; {self._how_to_continue()}") from None
        except ReadersGone as error:
            self.save()
            raise UserError(f"{error}; {self._how_to_continue()}") from None
        except StoppedWaiting:
            self.save()
            where = f"step {self.progress.step}, while waiting for photographs"
            self.log.print(f"stopped and saved at {where}; go on with --resume")
        finally:
            self.batches.close()  # ends its workers
            self.log.close()

    def _percent(self) -> float:
        return round(100 * min(1, budget_used(self.progress, self.settings)), 1)

    def _log_step(self, values: dict[str, float]) -> None:
        """Log what a step returned. UserError after too many steps that were not finite."""
        progress = self.progress
        if progress.skipped_in_a_row:
            self.log.print(f"step {progress.step}: loss or gradient not finite, skipped")
        if progress.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            cause = f"{MAX_SKIPPED_STEPS} steps in a row had a loss or gradient that is not finite"
            advice = "--amp bf16, which has a larger range," if self.scaler.is_enabled() else "a lower learning rate"
            raise UserError(f"{cause}: {advice} may help; {self._how_to_continue()}")
        values["skipped steps"] = progress.skipped
        self.log.step(progress.step, values, percent=self._percent(), at_once=progress.skipped_in_a_row > 0)

    def validate(self, last: bool = False) -> None:
        """Measure the EMA weights, write them for use, and log. The last time their coding tables are fitted too."""
        # Several processes must do the same, and a signal reaches them at different moments.
        alone = self.context.world_size == 1
        found = validate(
            self.objective, self.ema.model, self.validation, context=self.context,
            canceled=lambda: self.stop and alone,
        )
        if found is None:
            self.log.print("stopped while validating; go on with --resume")
            return
        means, pictures = found
        minutes = round(self.progress.seconds / 60, 2)
        result = {"step": self.progress.step, "patches": self.progress.patches, "minutes": minutes, **means}
        if self.context.is_main:
            self.log.validation(result, pictures)
            waiting, seconds = self.progress.waiting, self.progress.seconds
            if waiting > LONG_WAIT * seconds and not self.dataset.is_cached:
                told = "more readers (-n) or a larger --cache-gb may help"
                self.log.print(f"note: {waiting / seconds:.0%} of the time was spent waiting for patches: {told}")
            history = [*self.history, self.record(result)]
            export_model(self.folder / "model.pth.tar", self.ema.model, history, fit=self._fit_tables if last else None)
            self.finished = last
            self.log.draw_curves()

    def _fit_tables(self, model: Codec) -> None:
        """Fit the coding tables of weights for use to the first patches of the run."""
        model.to(self.device, memory_format=torch.channels_last)
        settings = self.settings  # not `self.last_part`: a run that is resumed after its last step has not begun it
        size = settings.last_patch_size if settings.last_share else settings.patch_size
        dataset = self.dataset.of_size(size, synthetic_share=0.0)
        try:
            with out_of_memory_as_value_error():
                fit_tables(model, first_batches(dataset, self.progress.patches), self.objective.indexes)
        except (ValueError, ImageError) as error:  # the tables of Gaussians do, too
            self.log.print(f"note: coding tables were not fitted: {error}")

    def _how_to_continue(self) -> str:
        last = self.folder / "last.pth.tar"
        return f"the last good checkpoint is {last}: go on with --resume" if last.exists() else "nothing was saved yet"

    def _stop(self, number: int) -> None:
        self.stop = True
        self.signal = number

    def _go_on(self) -> None:
        self.lap = time.monotonic()  # a suspended run does not train

    # Saving and resuming -----------------------------------------------------------------------

    def record(self, result: dict) -> dict:
        """The training record of this run, in plain values."""
        seconds = self.progress.seconds or math.nan  # before the first step that counts
        found = finite({
            **self.objective.describe(),
            "settings": asdict(self.settings),
            "photographs": len(self.dataset.paths),
            "machine": processor(self.device),
            "processes": self.context.world_size,
            "patches_per_second": round(self.progress.patches / seconds, 2),
            "waiting_for_patches": round(self.progress.waiting / seconds, 4),
            "skipped_steps": self.progress.skipped,
            **result,
        })
        return _without_folder(found)

    def save(self) -> None:
        """Write `last.pth.tar`: everything that the next step depends on. It can be loaded as weights too."""
        if not self.context.is_main:
            return
        state = describe(self.model) | {
            "state_dict": without_tables(self.model.state_dict()),
            "ema": without_tables(self.ema.model.state_dict()),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "settings": asdict(self.settings),
            "objective": self.objective.describe(),
            "training": [*self.history, self.record({"step": self.progress.step, "patches": self.progress.patches})],
            "history": len(self.history),  # records of "training" that are of earlier runs
        }
        write_checkpoint(self.folder / "last.pth.tar", state)

    def resume(self, state: dict) -> None:
        """Continue from a state (`read_run` of this folder) as if the run had not been interrupted.

        Raises:
            UserError: it is of another stage, or has other teachers.
        """
        theirs = state["objective"]
        ours = self.objective.describe()
        # Runs of earlier versions do not record all of it.
        if other := [key for key in theirs if theirs[key] != ours.get(key)]:
            told = "; ".join(f"{key} {theirs[key]}, not {ours.get(key, '(none)')}" for key in other)
            raise UserError(f"{self.folder} holds another run: {told}")
        for name, value in asdict(self.settings).items():
            before = state["settings"].get(name, value)  # a run of an older version has not all of them
            if before != value:
                self.log.print(f"note: {name} was {before} in this run and is {value} from here on")
        self.model.load_state_dict(state["state_dict"])
        self.ema.model.load_state_dict(state["ema"])
        for name, optimizer in self.optimizers.items():
            groups = optimizer.param_groups
            try:
                optimizer.load_state_dict(state["optimizers"][name])
            except ValueError:
                cause = "its optimizers do not fit this version of the code"
                raise UserError(f"{self.folder}: {cause}; start from it with --checkpoint") from None
            optimizer.param_groups = groups  # with the learning rates of the settings now, not of those then
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.history = state["training"][: state.get("history")]
        done = budget_used(self.progress, self.settings) >= 1  # then the last validation is made again
        self.log.keep_until(self.progress.step - done)


def _without_folder(record: dict) -> dict:
    """A training record with the name alone of the checkpoint that its run began with: weights are passed on, and where
    it lay is this machine's."""
    settings = record.get("settings", {})
    if not settings.get("checkpoint"):
        return record
    return record | {"settings": settings | {"checkpoint": Path(settings["checkpoint"]).name}}


def _distributed(objective: Objective) -> nn.Module:
    """An objective whose gradients are means over the processes. Its buffers are constants, equal in all of them."""
    with warnings.catch_warnings():  # PyTorch 2.14 renames the flag; 2.6 knows the old name only
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        return DistributedDataParallel(objective, broadcast_buffers=False)


def read_run(folder: Path) -> dict:
    """The state of a run in its `last.pth.tar`. UserError where that is something else."""
    path = folder / "last.pth.tar"
    state = read_checkpoint(path)
    if not {"arguments", "ema", "optimizers", "progress", "settings", "objective"} <= state.keys():
        raise UserError(f"{path}: not the state of a run; start one from it with --checkpoint")
    return state
