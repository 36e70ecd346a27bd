"""What is trained on: a function of the seed and the position alone, whoever reads it."""

import itertools
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_vbr
from utils import cli
from utils.distributed import DistContext
from utils.images import read_image, save_image
from utils.pictures import ImageError, find_images
from utils.training import patches
from utils.training.patches import PatchDataset, batches, decoded_gigabytes, random_crop, read_all

CPU = torch.device("cpu")
SIZE = (128, 128)


def first(photographs, count, batch=4, rank=0, size=1, start=0, workers=0):
    found = batches(photographs, batch, start, workers, DistContext(CPU, rank, size))
    return list(itertools.islice(found, count))


def same(a, b):
    return torch.equal(a.patches, b.patches) and torch.equal(a.rate_uniform, b.rate_uniform) and a.seeds == b.seeds


def test_cached_read_and_worked_patches_are_the_same(photos):
    paths = find_images([photos])
    cached = first(PatchDataset(paths, SIZE, 3, cache=read_all(paths, SIZE, CPU, quiet=True)), 5)
    assert all(map(same, cached, first(PatchDataset(paths, SIZE, 3), 5)))
    assert all(map(same, cached, first(PatchDataset(paths, SIZE, 3), 5, workers=2)))
    (other,) = first(PatchDataset(paths, SIZE, 4), 1)
    assert not torch.equal(cached[0].patches, other.patches) and cached[0].seeds != other.seeds
    assert not torch.isin(cached[0].rate_uniform, other.rate_uniform).any()


def test_processes_share_out_a_batch_and_a_run_goes_on_anywhere(photos):
    photographs = PatchDataset(find_images([photos]), SIZE, 0)
    whole = first(photographs, 4)
    halves = [first(photographs, 4, batch=2, rank=rank, size=2) for rank in (0, 1)]
    for batch, left, right in zip(whole, *halves, strict=True):
        assert torch.equal(batch.patches, torch.cat([left.patches, right.patches]))
        assert batch.seeds == left.seeds + right.seeds
    assert all(map(same, whole[2:], first(photographs, 2, start=8)))


def test_a_pass_takes_every_photograph_once_in_a_new_order(photos):
    photographs = PatchDataset(find_images([photos]), SIZE, 0)
    laps = [[photographs._number(lap * 8 + place) for place in range(8)] for lap in range(3)]
    assert all(sorted(lap) == list(range(8)) for lap in laps)
    assert laps[0] != laps[1] != laps[2]


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_unusable_photographs_are_named_and_passed_over(photos, workers, capsys):
    (photos / "p2.png").write_bytes(b"broken")
    save_image(photos / "p5.png", torch.zeros(3, 100, 300, dtype=torch.uint8))
    paths = find_images([photos])
    cache = read_all(paths, SIZE, CPU) if workers is None else None
    found = first(PatchDataset(paths, SIZE, 0, cache=cache), 4, workers=workers or 0)
    told = {text for batch in found for text in batch.unusable}
    assert len(told) == 2
    assert any("p2.png: cannot be read" in text for text in told)
    assert any("p5.png: 300×100 is smaller than a patch of 128×128" in text for text in told)
    if workers is None:
        printed = capsys.readouterr().err
        assert all(f"skipped: {text}" in printed for text in told)
    assert all(batch.patches.shape == (4, 3, 128, 128) for batch in found)


def test_what_is_too_small_for_a_patch_may_do_for_a_smaller_one(photos):
    """As in the last part of a run, whether photographs are kept or not."""
    paths = find_images([photos])
    for number, path in enumerate(paths):
        save_image(path, torch.randint(256, (3, *((130, 140) if number else (300, 280))), dtype=torch.uint8))
    cached = PatchDataset(paths, (256, 256), 0, cache=read_all(paths, (256, 256), CPU, quiet=True))
    assert first(cached, 2)[1].unusable and cached.is_cached
    kept = first(cached.of_size(SIZE, 0.0), 3)
    read = first(PatchDataset(paths, SIZE, 0), 3)
    assert all(map(same, kept, read)) and not any(batch.unusable for batch in kept)


def test_nothing_left_is_an_error(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"broken")
    paths = find_images([tmp_path])
    with pytest.raises(ImageError, match="no photograph is left"):
        read_all(paths, SIZE, CPU, quiet=True)
    with pytest.raises(ImageError, match="no photograph is left"):
        first(PatchDataset(paths, SIZE, 0), 1)


def test_patches_are_cut_from_the_photograph():
    image = torch.arange(3 * 200 * 220).view(3, 200, 220).remainder(251).to(torch.uint8)
    values = set(map(tuple, image.flatten(1).T.tolist()))
    random = np.random.default_rng(0)
    for _ in range(8):
        patch = random_crop(image, SIZE, 0.0, random)
        assert patch.shape == (3, *SIZE) and set(map(tuple, patch.flatten(1).T.tolist())) <= values
    assert random_crop(image, (128, 192), 0.0, random).shape == (3, 128, 192)
    flat = torch.full((3, 256, 256), 7, dtype=torch.uint8)
    assert all((random_crop(flat, SIZE, 1.0, random) == 7).all() for _ in range(8))


def test_memory_is_known_before_anything_is_decoded(photos):
    exact = sum(read_image(path).numel() for path in photos.iterdir()) / 1e9
    assert decoded_gigabytes(find_images([photos])) == pytest.approx(exact)
    assert decoded_gigabytes(find_images([photos]), most=4) == pytest.approx(exact, rel=0.05)


# Readers in processes -------------------------------------------------------------------------------


class Slow(PatchDataset):
    """Reads nothing for a minute."""

    def __getitem__(self, position: int):
        time.sleep(60)


def test_a_wait_for_readers_hears_a_stop_and_has_a_limit(photos, monkeypatch):
    monkeypatch.setattr(patches, "SECONDS_BETWEEN_LOOKS", 0.2)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # how long a worker may take to end
    dataset, context = Slow(find_images([photos]), (128, 128), 0), DistContext(torch.device("cpu"))
    calls = iter([False, True])
    with pytest.raises(patches.StoppedWaiting):
        next(patches.batches(dataset, 1, 0, 1, context, lambda: next(calls)))
    monkeypatch.setattr(patches, "LONGEST_WAIT", 0.5)
    with pytest.raises(cli.UserError, match=r"nothing came for \d+ s\); .*--shm-size.*-n 0"):
        next(patches.batches(dataset, 1, 0, 1, context))


def test_an_error_of_the_device_is_not_taken_for_one_of_readers(photos, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(patches, "random_crop", broken)
    paths = find_images([photos])
    cached = PatchDataset(paths, SIZE, 0, cache=read_all(paths, SIZE, CPU))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        next(batches(cached, 2, 0, 0, DistContext(CPU)))


def test_too_little_shared_memory_is_said_at_once(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    dataset = PatchDataset(find_images([photos]), (128, 128), 0)
    with pytest.raises(cli.UserError, match=r"9 MiB of batches .*, 1 MiB of shared memory are free; .*--shm-size"):
        next(patches.batches(dataset, 100, 0, 1, DistContext(torch.device("cpu"))))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # processes of one machine, of which none has begun
    run = ["--save_path", str(tmp_path), "-e", "1", "--patch-size", "128", "-bs", "100", "--cache-gb", "0", "-n", "1"]
    with pytest.raises(cli.UserError, match="19 MiB of batches"):
        train_vbr.main(["-d", str(photos), *run, "--preset", "depthconv", "--device", "cpu"])
    cached = PatchDataset(dataset.paths, SIZE, 0, cache=read_all(dataset.paths, SIZE, CPU))
    assert len(next(batches(cached, 2, 0, 1, DistContext(CPU))).patches) == 2
