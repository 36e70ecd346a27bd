"""The training loop: one step, the run, and leaving and coming back without a trace.

A run lives in one folder: `last.pth.tar` to resume from, `model.pth.tar` to use (EMA weights, float16,
coding tables), `validation.jsonl`, and TensorBoard's events.
"""

import contextlib
import json
import math
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models.tcm import TCM
from utils import cli
from utils.checkpoint import describe, export_model, read_checkpoint, write_checkpoint
from utils.distributed import Team, is_lost_peer
from utils.errors import ImageError
from utils.files import atomic_write, remove_left_over
from utils.objectives import Objective
from utils.patches import Batch, Photographs, batches
from utils.schedule import Progress, Settings, budget_used, learning_rate
from utils.validation import log_validation, validate

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
HOPELESS = 10  # skipped steps in a row that end a run


def make_optimizers(model: TCM, settings: Settings) -> dict[str, torch.optim.Adam]:
    """Adam for the networks, "net", and another, "aux", for the bottleneck's quantiles, of what is trained.

    Not CompressAI's net_aux_optimizer, which has no groups: the density of z starts 10 wide, and Adam moves
    a weight by the learning rate a step, so that at the networks' rate z would cost 3 bits a symbol for long.
    """
    networks, transforms, density, quantiles = [], [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name.startswith("entropy_bottleneck."):
            (quantiles if name.endswith(".quantiles") else density).append(p)
        else:
            (transforms if name.startswith(("g_a.", "g_s.")) else networks).append(p)
    factors = (1.0, settings.transform_factor, settings.density_factor)
    groups = [{"params": p, "factor": f} for p, f in zip((networks, transforms, density), factors, strict=True) if p]
    optimizers = {"net": torch.optim.Adam(groups, settings.learning_rate, fused=True)}
    if quantiles:
        optimizers["aux"] = torch.optim.Adam(quantiles, settings.aux_learning_rate, fused=True)
    return optimizers


class Trainer:
    """Trains the model of an objective.

    Args:
        objective: on its device; the optimisers are made here.
        photographs: what patches are cut from.
        workers: processes that read photographs which are not cached.
        validation: photographs uint8 `[3, H, W]`, sides multiples of 128; the same in every process.
        folder: where the run is written.
        history: training records of the weights that the run starts from.
    """

    def __init__(
        self,
        objective: Objective,
        photographs: Photographs,
        workers: int,
        validation: Sequence[Tensor],
        folder: Path,
        settings: Settings,
        team: Team,
        history: Sequence[dict] = (),
    ) -> None:
        self.objective, self.model = objective, objective.model
        self.photographs, self.workers, self.validation = photographs, workers, validation
        self.folder, self.settings, self.team, self.history = folder, settings, team, list(history)
        self.device = team.device
        self.progress = Progress()
        self.ema = AveragedModel(self.model, multi_avg_fn=self._average)
        self.optimizers = make_optimizers(self.model, settings)
        precision = PRECISIONS.get(settings.amp)
        objective.autocast, objective.balance = precision, settings.balance
        # fp16's small gradients would vanish; PyTorch's start at 2^16 costs more skipped steps than one at 2^10.
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**10, enabled=precision is torch.float16)
        self.shared: nn.Module = _shared(objective) if team.size > 1 else objective
        self.batches: Generator[Batch, None, None] | None = None
        self.ahead: Batch | None = None
        self.waited = 0.0
        self.unusable = {told for told in photographs.cache.values() if isinstance(told, str)}
        self.stop = False
        self.writer: SummaryWriter | None = None

    def _average(self, ema: list[Tensor], new: list[Tensor], _: Tensor) -> None:
        # The decay warms up: a fixed one would keep the first, random weights for long.
        decay = min(self.settings.ema, (1 + self.progress.step) / (10 + self.progress.step))
        torch._foreach_lerp_(ema, new, 1 - decay)  # as torch's get_ema_multi_avg_fn does

    # One step ---------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One step of the optimisers, unless a loss or gradient is not finite; what there is to log."""
        rate = self._set_learning_rates()
        self.objective.train()
        batch = self.ahead or self.next_batch()
        # Drop-path draws from PyTorch's own generator: it depends on the step (and, alone of all, on the process).
        torch.manual_seed(_seed(self.settings.seed, self.progress.step, self.team.rank))
        x = batch.patches.to(self.device, non_blocking=True).float() / 255
        # The seeds of the noise and the rates come with the samples: the same in however many processes.
        keys = [batch.keys] if self.objective.repeat else []
        out = self.shared(x, batch.draws, self.noise(batch.seeds, x.shape[2:]), *keys)
        self.scaler.scale(out.pop("total")).backward()
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        parameters = [p for group in self.optimizers["net"].param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_max_norm or math.inf)
        self.ahead = self.next_batch()  # here, while a GPU is still busy with the step
        means = self.team.mean(torch.stack([value.detach().float() for value in out.values()]))
        numbers = torch.cat([means, norm.detach().view(1)]).tolist()
        finite = bool(np.isfinite(numbers).all())
        for optimizer in self.optimizers.values():
            if finite:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        if finite:
            self.ema.update_parameters(self.model)
        self.progress.skipped += not finite
        self.progress.skipped_in_a_row = 0 if finite else self.progress.skipped_in_a_row + 1
        self.progress.step += 1
        self.progress.patches += self.settings.batch_size
        return dict(zip([*out, "gradient norm"], numbers, strict=True)) | {"learning rate": rate}

    def _set_learning_rates(self) -> float:
        """Of all groups, for this step, as the settings are now; returns that of the networks."""
        rate = learning_rate(self.progress, self.settings)
        for group in self.optimizers["net"].param_groups:
            group["lr"] = rate * group["factor"]
        if "aux" in self.optimizers:
            for group in self.optimizers["aux"].param_groups:
                group["lr"] = self.settings.aux_learning_rate
        return rate

    def open_batches(self) -> None:
        """Start reading the batches that `next_batch` gives, from where the run is."""
        self.batches = batches(
            self.photographs,
            self.settings.batch_size // self.team.size,
            self.team.rank,
            self.team.size,
            self.progress.patches,
            self.workers,
            self.device,
        )

    def next_batch(self) -> Batch:
        """The next batch of this process, once there is `open_batches`; what could not be used is told."""
        start = time.monotonic()
        try:
            batch = next(self.batches)
        except ImageError as error:  # of a worker: PyTorch puts its traceback in the text
            raise ImageError(str(error).splitlines()[-1].split("ImageError: ")[-1]) from None
        self.waited = time.monotonic() - start
        for text in batch.unusable:
            if text not in self.unusable:
                self.unusable.add(text)
                tqdm.write(f"skipped: {text}", file=sys.stderr)
        return batch

    def noise(self, seeds: list[int], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Uniform noise in ±½ for y and z of each sample."""
        generator = torch.Generator(self.device)
        noises: tuple[list[Tensor], list[Tensor]] = [], []
        for seed in seeds:
            generator.manual_seed(seed)
            for noise, shape in zip(noises, self.model.noise_shapes(*size), strict=True):
                noise.append(torch.rand(shape, generator=generator, device=self.device) - 0.5)
        return torch.stack(noises[0]), torch.stack(noises[1])

    # The run ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until the budget is spent, or a signal comes; validate and save on the way and at the end.

        Raises:
            UserError: ten steps in a row were not finite, or another process of the run is gone.
        """
        self.open_batches()
        if self.team.first:
            remove_left_over(self.folder, "*.pth.tar")
            self.writer = SummaryWriter(str(self.folder), purge_step=self.progress.step + 1)
        try:
            with self._signals():
                self._run()
        except RuntimeError as error:
            if self.team.size > 1 and is_lost_peer(error):
                cause = str(error).strip().splitlines()[0]
                raise cli.UserError(
                    f"another process of this run has ended, or cannot be reached ({cause}); {self._way_on()}"
                ) from None
            raise
        finally:
            self.batches.close()  # its workers end in peace
            self._log(lambda writer: writer.close())

    def _run(self) -> None:
        bar = tqdm(
            total=100,
            initial=round(100 * min(1, budget_used(self.progress, self.settings)), 1),
            desc="training",
            unit="%",
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
            disable=not self.team.first,
        )
        minutes = self.progress.seconds / 60
        next_save = minutes + self.settings.save_minutes
        next_validation = minutes + self.settings.validate_minutes
        with contextlib.closing(bar):
            while budget_used(self.progress, self.settings) < 1:
                stop = self._timed_step(bar)
                minutes = self.progress.seconds / 60
                if stop:
                    self.save()
                    self._say(f"stopped and saved at step {self.progress.step}; go on with --resume")
                    return
                if minutes >= next_validation:
                    next_validation = minutes + self.settings.validate_minutes
                    self.save()
                    self.validate()
                elif minutes >= next_save:
                    next_save = minutes + self.settings.save_minutes
                    self.save()
        self.save()  # first: what follows may be interrupted
        self.validate()

    def _timed_step(self, bar: tqdm) -> bool:
        """A step, its time and its log; whether the run was asked to stop, in any of its processes."""
        start = time.monotonic()
        values = self.step()
        seconds, waited, stop = self.team.largest(time.monotonic() - start, self.waited, float(self.stop))
        self.progress.seconds += seconds
        self.progress.waiting += waited
        if self.progress.skipped_in_a_row:
            self._say(f"step {self.progress.step}: loss or gradient not finite, skipped")
        if self.progress.skipped_in_a_row >= HOPELESS:
            raise cli.UserError(
                f"{HOPELESS} steps in a row had a loss or gradient that is not finite: a lower learning rate may help; "
                + self._way_on()
            )
        bar.n = round(100 * min(1, budget_used(self.progress, self.settings)), 1)
        bar.set_postfix({"step": self.progress.step, **{k: f"{values[k]:.3f}" for k in ("loss", "bpp") if k in values}})
        if self.progress.step % 10 == 0 or self.progress.skipped_in_a_row:
            values["patches a second"] = self.settings.batch_size / seconds
            values["share of the time waiting for patches"] = waited / seconds
            values["skipped steps"] = self.progress.skipped

            def write(writer: SummaryWriter) -> None:
                for name, value in values.items():
                    writer.add_scalar(f"training/{name}", value, self.progress.step)

            self._log(write)
        return bool(stop)

    def validate(self) -> None:
        """Measure the EMA weights, write them for use, and log."""
        # Of several processes all must do the same, and a signal reaches them at different moments.
        cancelled = None if self.team.size > 1 else lambda: self.stop
        found = validate(self.objective, self.ema.module, self.validation, self.team, cancelled)
        if found is None:
            self._say("stopped while validating; go on with --resume")
            return
        means, pictures = found
        result = {
            "step": self.progress.step,
            "patches": self.progress.patches,
            "minutes": round(self.progress.seconds / 60, 2),
            **means,
        }
        if self.team.first:
            self._say(json.dumps(result))
            self._log(lambda writer: log_validation(writer, result, pictures, self.progress.step))
            with (self.folder / "validation.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
            export_model(self.folder / "model.pth.tar", self.ema.module, [*self.history, self.record(result)])

    def _log(self, write: Callable[[SummaryWriter], None]) -> None:
        """Write to TensorBoard, as long as that works: its curves are not worth a run."""
        if self.writer:
            try:
                write(self.writer)
            except OSError as error:
                self.writer = None  # not closed: its thread is gone, and closing would wait for it
                self._say(f"note: TensorBoard's events cannot be written any more ({error})")

    def _way_on(self) -> str:
        last = self.folder / "last.pth.tar"
        return f"the last good checkpoint is {last}: go on with --resume" if last.exists() else "nothing was saved yet"

    def _say(self, text: str) -> None:
        if self.team.first:
            tqdm.write(text)

    @contextlib.contextmanager
    def _signals(self):
        """SIGINT and SIGTERM end the run after the step; a second SIGINT at once."""

        def handle(number: int, frame: object) -> None:
            self.stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    # Leaving and coming back ------------------------------------------------------------------

    def record(self, result: dict) -> dict:
        """What this run did, in plain values."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor()
        seconds = max(1e-9, self.progress.seconds)
        return {
            **self.objective.describe(),
            "settings": asdict(self.settings),
            "photographs": len(self.photographs.paths),
            "machine": name,
            "processes": self.team.size,
            "patches_per_second": round(self.progress.patches / seconds, 2),
            "waiting_for_patches": round(self.progress.waiting / seconds, 4),
            "skipped_steps": self.progress.skipped,
            **result,
        }

    def save(self) -> None:
        """`last.pth.tar`: all that the next step depends on."""
        if not self.team.first:
            return
        state = describe(self.model) | {
            "state_dict": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "settings": asdict(self.settings),
            "objective": self.objective.describe(),
            "training": self.history,
        }
        write_checkpoint(self.folder / "last.pth.tar", state)

    def resume(self, state: dict) -> None:
        """Go on from a state (`read_run` of this folder) as if the run had not been interrupted.

        Raises:
            UserError: it is of another stage.
        """
        if state["objective"] != self.objective.describe():
            told = f"{state['objective']}, not of {self.objective.describe()}"
            raise cli.UserError(f"{self.folder} holds a run of {told}")
        for name, value in asdict(self.settings).items():
            if (before := state["settings"].get(name)) != value:
                self._say(f"note: {name} was {before} in this run and is {value} from here on")
        self.model.load_state_dict(state["state_dict"])
        self.ema.module.load_state_dict(state["ema"])
        for name, optimizer in self.optimizers.items():
            factors = [group.get("factor") for group in optimizer.param_groups]
            try:
                optimizer.load_state_dict(state["optimizers"][name])
            except ValueError:
                cause = "its optimisers do not fit this version of the code"
                raise cli.UserError(f"{self.folder}: {cause}; start from it with --checkpoint") from None
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["factor"] = factor  # as the settings are now, not as they were
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.ema.n_averaged.fill_(self.progress.step - self.progress.skipped)
        self.history = state["training"]
        if self.team.first:
            self._forget_later_validations()

    def _forget_later_validations(self) -> None:
        path = self.folder / "validation.jsonl"
        if path.exists():
            done = budget_used(self.progress, self.settings) >= 1  # then the last one is made again
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= self.progress.step - done]
            with atomic_write(path) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())


def compile_networks(model: TCM) -> None:
    """`torch.compile` the sub-networks in place; the slice walk between them stays as it is."""
    networks: list[nn.Module] = [model.g_a, model.g_s, model.h_a, model.h_mean_s, model.h_scale_s]
    for parts in (model.atten_mean, model.atten_scale, model.cc_mean_transforms, model.cc_scale_transforms):
        networks += parts
    networks += model.lrp_transforms
    # All are calls of one nn.Module method, so Dynamo counts their graphs together: its limit of 8 would leave g_s out.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(networks))
    torch._dynamo.config.optimize_ddp = False  # which splits graphs where gradients are sent: each is small already
    for network in networks:
        network.compile()


def _shared(objective: Objective) -> nn.Module:
    """An objective whose gradients are means over the processes. Its buffers are constants, the same in all."""
    with warnings.catch_warnings():  # PyTorch 2.14 renames the flag; 2.6 knows the old name only
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        return DistributedDataParallel(objective, broadcast_buffers=False)


def read_run(folder: Path) -> dict:
    """`last.pth.tar` of a run. UserError where it is something else."""
    path = folder / "last.pth.tar"
    state = read_checkpoint(path)
    if not {"arguments", "ema", "optimizers", "progress", "settings", "objective"} <= state.keys():
        raise cli.UserError(f"{path}: not the state of a run; start one from it with --checkpoint")
    return state


def _step_of(line: str) -> float:
    """Step of a line of validation.jsonl; infinite for one that a full disk or a power cut has torn."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
        return f"{name}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
