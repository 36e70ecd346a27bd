"""Training patches: cut on the device from photographs in its memory, or read by worker processes.

Everything random about a sample is a function of the seed and of the sample's position in the run: the
photograph, the crop, the rate, the noise. So a run can be resumed anywhere, and shared by any number of
processes or workers, without a change in the samples.
"""

import contextlib
import itertools
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils.distributed import DistContext
from utils.errors import UserError
from utils.images import read_image
from utils.pictures import ImageError
from utils.training.synthetic import add_synthetic

GOLDEN = (5**0.5 - 1) / 2
MAX_UNREADABLE = 1000  # photographs in a row that cannot be used
SCALED = 0.25  # share of the patches that are scaled down
PREFETCHED = 2  # batches of each worker, PyTorch's default
SECONDS_BETWEEN_LOOKS = 5  # while no batch comes: whether the run was asked to stop
LONGEST_WAIT = 300  # seconds without a batch; then it is an error
ADVICE = "give a container more (docker run --shm-size 2g), take fewer readers (-n), or none (-n 0)"


class Batch(NamedTuple):
    """Training patches.

    Attributes:
        patches: uint8 `[B, 3, h, w]`.
        rate_uniform: a number in [0, 1) per patch, which an objective turns into its rate, `[B]`.
        seeds: one per patch, for its noise.
        keys: equal for equal patches.
        unusable: photographs that were passed over, each with the cause.
    """

    patches: Tensor
    rate_uniform: Tensor
    seeds: list[int]
    keys: list[int]
    unusable: list[str]


class PatchDataset(Dataset):
    """Patches of photographs, by position in the run. Each pass has every photograph once, in a new order.

    A photograph that cannot be read, or is smaller than a patch, is replaced by another one, drawn at random.

    Args:
        size: height and width of a patch.
        repeat: number of patches after which they come again, with other rates and noise; 0 for always new ones.
        cache: decoded photographs by number, or why one cannot be read. The others are read when needed.
        synthetic_share: share of the patches with a part that no photograph has.
    """

    def __init__(
        self, paths: Sequence[Path], size: tuple[int, int], seed: int, repeat: int = 0, cache: dict | None = None,
        synthetic_share: float = 0.0,
    ) -> None:
        self.paths = list(paths)
        self.size = size
        self.seed = seed
        self.repeat = repeat
        self.cache: dict[int, Tensor | str] = cache or {}
        self.synthetic_share = synthetic_share
        self._pass = (-1, np.empty(0, np.int64))

    @property
    def is_cached(self) -> bool:
        """Whether what can be read of all photographs is in memory."""
        return len(self.cache) == len(self.paths)

    def __getitem__(self, position: int) -> Batch:
        """The sample at a position, as a batch of one.

        Raises:
            ImageError: MAX_UNREADABLE photographs in a row cannot be used.
        """
        lap, key = divmod(position, self.repeat) if self.repeat else (0, position)
        random = np.random.default_rng((self.seed, key))
        number = self._number(key)
        unusable = []
        for _ in range(MAX_UNREADABLE):
            path = self.paths[number]
            image = usable(path, self.size, self.cache.get(number))
            if isinstance(image, Tensor):
                patch = random_crop(image, self.size, scaled=SCALED, random=random)
                if self.synthetic_share and random.random() < self.synthetic_share:
                    patch = add_synthetic(patch, random)
                if lap:
                    random = np.random.default_rng((self.seed, position))
                # Multiples of the golden ratio spread the rates of every batch evenly. The loss differs fourfold
                # between rates, so rates drawn at random would be noise in the gradient.
                # A patch that comes again has another rate, and so has every seed.
                spread = (position + 1) * GOLDEN + lap * 2**0.5 + self.seed * 3**0.5 % 1
                uniform = torch.tensor([min(spread % 1, 1 - 2**-24)])  # float32 would round up to 1
                return Batch(patch[None], uniform, seeds=[int(random.integers(2**62))], keys=[key], unusable=unusable)
            unusable.append(image)
            number = int(random.integers(len(self.paths)))
        raise ImageError(f"no photograph is left to train on; the last one tried: {unusable[-1]}")

    def of_size(self, size: tuple[int, int], synthetic_share: float) -> "PatchDataset":
        """The same photographs, cut to patches of another size."""
        return PatchDataset(self.paths, size, self.seed, self.repeat, self.cache, synthetic_share)

    def _number(self, position: int) -> int:
        epoch, place = divmod(position, len(self.paths))
        if self._pass[0] != epoch:
            self._pass = epoch, np.random.default_rng((self.seed, epoch, 0)).permutation(len(self.paths))
        return int(self._pass[1][place])


def usable(path: Path, size: tuple[int, int], known: Tensor | str | None = None) -> Tensor | str:
    """A photograph, uint8 `[3, H, W]`, or the reason why no patch of this size can be cut from it.

    Args:
        known: the photograph, or why it cannot be read; None reads it.
    """
    image = _read(path) if known is None else known
    if isinstance(image, Tensor) and (image.shape[1] < size[0] or image.shape[2] < size[1]):
        return f"{path}: {image.shape[2]}×{image.shape[1]} is smaller than a patch of {size[1]}×{size[0]}"
    return image


def _read(path: Path) -> Tensor | str:
    """A photograph, uint8 `[3, H, W]`, or the reason why it cannot be read."""
    try:
        return read_image(path)
    except ImageError as error:
        return str(error)


def random_crop(image: Tensor, size: tuple[int, int], scaled: float, random: np.random.Generator) -> Tensor:
    """One random patch, uint8 `[3, *size]`, of a photograph that is at least as large.

    It is flipped and (where it is square) transposed at random, and with probability `scaled` it is cut up to twice as
    large and scaled down.
    """
    largest = min(2.0, image.shape[1] / size[0], image.shape[2] / size[1])
    factor = random.uniform(1.0, largest) if random.random() < scaled else 1.0
    height, width = (int(side * factor) for side in size)
    top = random.integers(image.shape[1] - height + 1)
    left = random.integers(image.shape[2] - width + 1)
    patch = image[:, top : top + height, left : left + width]
    if (height, width) != tuple(size):
        patch = F.interpolate(patch[None].float(), size, mode="bilinear", antialias=True)[0].round().to(torch.uint8)
    turn = int(random.integers(8))
    if turn & 1:
        patch = patch.flip(1)
    if turn & 2:
        patch = patch.flip(2)
    if turn & 4 and size[0] == size[1]:
        patch = patch.transpose(1, 2)
    return patch.contiguous()


def read_all(
    paths: Sequence[Path], size: tuple[int, int], device: torch.device, purpose: str = "train on", quiet: bool = False
) -> dict:
    """All photographs on a device, by number, or the reason why one cannot be read.

    Those that cannot be read, or are smaller than `size`, are named. ImageError where no other is left.
    """
    cache: dict[int, Tensor | str] = {}
    some = False
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.filterwarnings("ignore", module="PIL")  # about pictures that are read all the same
        images = pool.map(_read, paths)
        bar = tqdm(images, total=len(paths), desc="reading photographs", unit="file", disable=True if quiet else None)
        for number, image in enumerate(bar):
            found = usable(paths[number], size, image)
            if isinstance(found, Tensor):
                some = True
            elif not quiet:
                tqdm.write(f"skipped: {found}", file=sys.stderr)
            cache[number] = image if isinstance(image, str) else image.to(device)
    if not some:
        raise ImageError(f"no photograph is left to {purpose}; the last one tried: {found}")
    return cache


def decoded_gigabytes(paths: Sequence[Path], most: int = 1000) -> float:
    """Memory in GB that the photographs take once decoded, by the headers of at most `most` of them."""
    some = paths[:: -(-len(paths) // most)]
    total = 0
    for path in some:
        with contextlib.suppress(Exception), Image.open(path) as image:  # an error is reported when it is read
            total += 3 * image.width * image.height
    return total * len(paths) / len(some) / 1e9


class StoppedWaiting(Exception):
    """The run was asked to stop while it waited for patches."""


class ReadersGone(UserError):
    """No more patches come: the processes that read photographs are stuck or have ended."""


def batches(
    dataset: PatchDataset, batch: int, start: int, workers: int, context: DistContext,
    stopped: Callable[[], bool] = lambda: False,
) -> Generator[Batch, None, None]:
    """Endless batches of one process from a position on: the rank-th part of every global batch.

    With everything cached, patches are cut in this process, on the device; otherwise by worker processes, each of which
    holds a few batches and one decoded photograph at a time, however many photographs there are.

    Args:
        stopped: asked every few seconds while nothing comes.

    Raises:
        UserError: the workers have too little shared memory.
        ReadersGone: they have ended, or nothing came from them for LONGEST_WAIT.
        StoppedWaiting: `stopped` said so.
    """
    firsts = itertools.count(start + context.rank * batch, context.world_size * batch)
    workers = 0 if dataset.is_cached else workers
    check_shared_memory(workers, batch, dataset.size)
    answer = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    loader = iter(DataLoader(
        dataset,
        batch_sampler=(range(first, first + batch) for first in firsts),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=context.device.type == "cuda" and workers > 0,
        worker_init_fn=_start_worker,
        timeout=SECONDS_BETWEEN_LOOKS if workers else 0,
    ))
    if workers and threading.current_thread() is threading.main_thread():
        # PyTorch's own answer raises that a worker has died wherever this process is, mostly within a step. The next
        # batch, which is not there, tells it too.
        signal.signal(signal.SIGCHLD, answer or signal.SIG_DFL)
    looks = 0  # not the time since the last batch, most of which a run may have been suspended
    while True:
        try:
            found = next(loader)
        except (RuntimeError, OSError, EOFError) as error:  # the latter where a reader dies while it hands a batch over
            if not workers:  # an error of the device, and no trouble of readers
                raise
            if stopped():
                raise StoppedWaiting from None
            looks += 1
            waited = looks * SECONDS_BETWEEN_LOOKS
            if "timed out" in str(error) and waited < LONGEST_WAIT:
                continue
            told = (str(error) or repr(error)).splitlines()[0]
            if "timed out" in told:
                told = f"nothing came for {waited:.0f} s"
            raise ReadersGone(f"the readers of photographs are stuck or gone ({told}); {ADVICE}") from None
        yield found
        looks = 0


def check_shared_memory(workers: int, batch: int, size: tuple[int, int]) -> None:
    """UserError where batches on their way from so many workers have no room."""
    needed = workers * PREFETCHED * batch * 3 * size[0] * size[1]
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:  # another system
        return
    if needed > free:
        sizes = f"{needed / 2**20:.0f} MiB of batches on their way, {free / 2**20:.0f} MiB of shared memory are free"
        raise UserError(f"{sizes}; {ADVICE}")


def collate(samples: Sequence[Batch]) -> Batch:
    return Batch(
        torch.cat([sample.patches for sample in samples]),
        torch.cat([sample.rate_uniform for sample in samples]),
        seeds=[seed for sample in samples for seed in sample.seeds],
        keys=[key for sample in samples for key in sample.keys],
        unusable=[text for sample in samples for text in sample.unusable],
    )


def _start_worker(worker: int) -> None:
    os.setsid()  # Ctrl-C, torchrun and batch systems signal whole process groups; a worker that dies would end the run
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.filterwarnings("ignore", module="PIL")  # about pictures that are read all the same
    Image.MAX_IMAGE_PIXELS = None  # as in the script (utils/cli), which a worker that is spawned does not run
