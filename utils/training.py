"""The training loop: budget and schedule, optimisers, EMA, validation, logs, exact resume.

A run lives in one folder: `last.pth.tar` to resume from, `model.pth.tar` to use (EMA weights, float16,
coding tables), `validation.jsonl`, and TensorBoard's events.
"""

import contextlib
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models.tcm import TCM
from utils.checkpoint import describe, export_model, read_checkpoint
from utils.crops import Crops
from utils.files import atomic_write
from utils.lambdas import LADDER, draw_index, index_to_lambda
from utils.losses import psnr_of_mse, rate_distortion


@dataclass
class Settings:
    """How to train; all of it is written to the checkpoint's training record."""

    max_minutes: float = 0  # budget: whichever of the two ends first; 0 is none
    max_steps: int = 0
    learning_rate: float = 2e-4
    aux_learning_rate: float = 1e-3
    density_factor: float = 10.0  # learning rate of z's density, in units of the networks'
    warmup: int = 200  # steps
    clip_max_norm: float = 1.0
    ema: float = 0.999
    validate_minutes: float = 15
    amp: bool = False  # bfloat16 autocast; the entropy models stay in float32
    seed: int = 0


@dataclass
class Progress:
    """How far a run is; part of what a resume restores."""

    step: int = 0
    patches: int = 0
    seconds: float = 0  # in training steps, validation and saving not counted
    skipped: int = 0  # steps with a loss or gradient that was not finite


def budget_used(progress: Progress, settings: Settings) -> float:
    """Share of the budget that is spent, 0 … 1 and beyond."""
    shares = [0.0]
    if settings.max_minutes:
        shares.append(progress.seconds / 60 / settings.max_minutes)
    if settings.max_steps:
        shares.append(progress.step / settings.max_steps)
    return max(shares)


def learning_rate(progress: Progress, settings: Settings) -> float:
    """Linear warm-up in steps, then a cosine over the budget that ends at zero with it."""
    warm = min(1.0, (progress.step + 1) / max(1, settings.warmup))
    return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, budget_used(progress, settings))))


def make_optimizers(model: TCM, settings: Settings) -> dict[str, torch.optim.Adam]:
    """Adam for the networks, "net", and another, "aux", for the bottleneck's quantiles.

    Not CompressAI's net_aux_optimizer, which has no groups: the density of z starts 10 wide, and Adam moves
    a weight by the learning rate a step, so that at the networks' rate z would cost 3 bits a symbol for long.
    """
    quantiles = [model.entropy_bottleneck.quantiles]
    density = [p for name, p in model.entropy_bottleneck.named_parameters() if name != "quantiles"]
    networks = [p for name, p in model.named_parameters() if not name.startswith("entropy_bottleneck.")]
    groups = [{"params": networks, "factor": 1.0}, {"params": density, "factor": settings.density_factor}]
    return {
        "net": torch.optim.Adam(groups, lr=settings.learning_rate),
        "aux": torch.optim.Adam(quantiles, lr=settings.aux_learning_rate),
    }


class Trainer:
    """Trains a TCM or TCM_VBR jointly over all rates (SPEC 4: one λ index a sample).

    Args:
        model: on its device; the optimisers are made here.
        crops: gives a batch of patches at each call.
        validation: photographs `[1, 3, H, W]` on the device, sides multiples of 128.
        folder: where the run is written.
        history: training records of the weights that the run starts from.
    """

    def __init__(
        self,
        model: TCM,
        crops: Crops,
        validation: Sequence[Tensor],
        folder: Path,
        settings: Settings,
        history: Sequence[dict] = (),
    ) -> None:
        self.model, self.crops, self.validation = model, crops, validation
        self.folder, self.settings, self.history = folder, settings, list(history)
        self.device = next(model.parameters()).device
        self.progress = Progress()
        self.ema = AveragedModel(model, multi_avg_fn=self._average)
        self.optimizers = make_optimizers(model, settings)
        self.writer = SummaryWriter(str(folder))

    def _average(self, ema: list[Tensor], new: list[Tensor], _: Tensor) -> None:
        # The decay warms up: a fixed one would keep the first, random weights for long.
        decay = min(self.settings.ema, (1 + self.progress.step) / (10 + self.progress.step))
        torch._foreach_lerp_(ema, new, 1 - decay)  # as torch's get_ema_multi_avg_fn does

    # One step ---------------------------------------------------------------------------------

    def step(self) -> dict[str, float] | None:
        """One step of both optimisers; None where it was skipped because something was not finite."""
        rate = learning_rate(self.progress, self.settings)
        groups = self.optimizers["net"].param_groups
        for group in groups:
            group["lr"] = rate * group["factor"]
        self.model.train()
        x = self.crops()
        index = draw_index(len(x))
        lmbda = index_to_lambda(index).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
            out = self.model(x, index)
        losses = rate_distortion(out, x, lmbda)
        aux = self.model.aux_loss()
        (losses["loss"] + aux).backward()  # no parameter is in both: the bottleneck's loss stops at the quantiles
        parameters = [p for group in groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_max_norm)
        finite = bool(torch.isfinite(losses["loss"]) & torch.isfinite(norm))
        if finite:
            for optimizer in self.optimizers.values():
                optimizer.step()
            self.ema.update_parameters(self.model)
        else:
            self.progress.skipped += 1
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.patches += len(x)
        if not finite:
            return None
        return {
            "loss": float(losses["loss"].detach()),
            "bpp": float(losses["bpp"].detach().mean()),
            "psnr": float(psnr_of_mse(losses["mse"].detach()).mean()),
            "aux": float(aux.detach()),
            "gradient norm": float(norm),
            "learning rate": rate,
        }

    # The run ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until the budget is spent; validate and save on the way, at the end, and (save) on Ctrl-C."""
        bar = tqdm(total=100, desc="training", unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
        next_validation = self.progress.seconds / 60 + self.settings.validate_minutes
        try:
            while budget_used(self.progress, self.settings) < 1:
                self._timed_step(bar)
                if self.progress.seconds / 60 >= next_validation:
                    next_validation += self.settings.validate_minutes
                    self.validate_and_save()
        except KeyboardInterrupt:
            self.save()
            tqdm.write(f"saved at step {self.progress.step}; go on with --resume")
            raise
        finally:
            bar.close()
        self.validate_and_save()
        self.writer.close()

    def _timed_step(self, bar: tqdm) -> None:
        start = time.monotonic()
        values = self.step()
        seconds = time.monotonic() - start
        self.progress.seconds += seconds
        if values is None:
            tqdm.write(f"step {self.progress.step}: loss or gradient not finite, skipped")
            return
        bar.n = round(100 * min(1, budget_used(self.progress, self.settings)), 1)
        bar.set_postfix(step=self.progress.step, loss=f"{values['loss']:.3f}", bpp=f"{values['bpp']:.3f}")
        if self.progress.step % 10 == 0:
            values["patches a second"] = self.crops.batch / seconds
            for name, value in values.items():
                self.writer.add_scalar(f"training/{name}", value, self.progress.step)

    def validate_and_save(self) -> dict:
        result = self.validate()
        tqdm.write(json.dumps(result))
        with (self.folder / "validation.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        export_model(self.folder / "model.pth.tar", self.ema.module, self.history + [self.record(result)])
        self.save()
        return result

    @torch.no_grad()
    def validate(self) -> dict:
        """Mean bpp and PSNR of the EMA weights at the six λ, with real rounding, and the mean R-D loss."""
        model = self.ema.module.eval()
        indices = range(len(LADDER))
        bpp, psnr, losses = [], [], []
        for index in indices:
            outs = []
            for number, x in enumerate(self.validation):
                out = model(x, index)
                out["x_hat"] = (out["x_hat"].clamp(0, 1) * 255).round() / 255
                outs.append(rate_distortion(out, x, torch.tensor([LADDER[index]], device=self.device)))
                if number == 0:
                    self.writer.add_image(f"validation/index {index}", out["x_hat"][0], self.progress.step)
            bpp.append(float(torch.cat([o["bpp"] for o in outs]).mean()))
            psnr.append(float(psnr_of_mse(torch.cat([o["mse"] for o in outs])).mean()))
            losses.append(float(torch.stack([o["loss"] for o in outs]).mean()))
            self.writer.add_scalar(f"validation/bpp {index}", bpp[-1], self.progress.step)
            self.writer.add_scalar(f"validation/PSNR {index}", psnr[-1], self.progress.step)
        loss = sum(losses) / len(losses)
        self.writer.add_scalar("validation/loss", loss, self.progress.step)
        return {
            "step": self.progress.step,
            "patches": self.progress.patches,
            "minutes": round(self.progress.seconds / 60, 2),
            "bpp": [round(v, 4) for v in bpp],
            "psnr": [round(v, 3) for v in psnr],
            "loss": round(loss, 5),
        }

    # Leaving and coming back ------------------------------------------------------------------

    def record(self, result: dict) -> dict:
        """What this run did, in plain values."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor()
        return {
            "settings": dict(vars(self.settings)),
            "patch_size": self.crops.size,
            "batch_size": self.crops.batch,
            "photographs": len(self.crops.images),
            "machine": name,
            "patches_per_second": round(self.progress.patches / max(1e-9, self.progress.seconds), 2),
            "skipped_steps": self.progress.skipped,
            **result,
        }

    def save(self) -> None:
        """`last.pth.tar`: all that the next step depends on."""
        state = describe(self.model) | {
            "state_dict": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "progress": dict(vars(self.progress)),
            "training": self.history,
            "random": {
                "crops": self.crops.generator.get_state(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        }
        with atomic_write(self.folder / "last.pth.tar") as file:
            torch.save(state, file)

    def resume(self) -> None:
        """Go on from `last.pth.tar` as if the run had not been interrupted."""
        state = read_checkpoint(self.folder / "last.pth.tar")
        self.model.load_state_dict(state["state_dict"])
        self.ema.module.load_state_dict(state["ema"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.progress = Progress(**state["progress"])
        self.ema.n_averaged.fill_(self.progress.step - self.progress.skipped)
        self.history = state["training"]
        self.crops.generator.set_state(state["random"]["crops"])
        torch.set_rng_state(state["random"]["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)


def compile_networks(model: TCM) -> None:
    """`torch.compile` the sub-networks in place; the slice walk between them stays as it is."""
    networks: list[torch.nn.Module] = [model.g_a, model.g_s, model.h_a, model.h_mean_s, model.h_scale_s]
    for parts in (model.atten_mean, model.atten_scale, model.cc_mean_transforms, model.cc_scale_transforms):
        networks += parts
    networks += model.lrp_transforms
    for network in networks:
        network.compile()


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
        return f"{name}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
