"""The budget of a run: steps, epochs and minutes, learning rates, and a last part with other patches."""

import argparse

import pytest
import skimage.data
import torch

from tests.training.runs import same, train
from utils import cli
from utils.checkpoint import read_checkpoint
from utils.cli.training_arguments import add_run_arguments, check_run_arguments
from utils.images import save_image
from utils.pictures import ImageError
from utils.training import trainer
from utils.training.fit_tables import first_batches
from utils.training.objectives import Objective
from utils.training.patches import batches
from utils.training.schedule import Progress, Settings, in_last_part, learning_rate
from utils.training.trainer import Trainer


def test_the_learning_rate_ends_with_the_budget():
    settings = Settings(max_minutes=10, max_steps=1000, warmup=10, learning_rate=1.0)
    assert learning_rate(Progress(step=0), settings) == pytest.approx(0.1, rel=1e-3)
    assert learning_rate(Progress(step=500), settings) == pytest.approx(0.5)
    assert learning_rate(Progress(step=500, seconds=600), settings) == 0  # whichever ends first
    assert learning_rate(Progress(step=1000), settings) == 0
    steps = Settings(max_steps=200, warmup=0, learning_rate=1.0, schedule="step")
    assert [learning_rate(Progress(step=s), steps) for s in (0, 49, 50, 100, 150, 199)] == [1, 1, 0.5, 0.1, 0.05, 0.05]


def test_before_a_last_part_the_rate_falls_to_a_quarter_and_in_it_to_zero():
    settings = Settings(max_steps=1000, warmup=0, learning_rate=1.0, last_share=0.2)
    rates = [learning_rate(Progress(step=s), settings) for s in (0, 400, 799, 800, 900, 1000)]
    assert rates == pytest.approx([1, 0.625, 0.25, 0.25, 0.125, 0], abs=1e-5)
    assert [in_last_part(Progress(step=s), settings) for s in (799, 800)] == [False, True]
    assert not in_last_part(Progress(step=1000), Settings(max_steps=1000))


LAST = ["--last-part", 0.5, "--last-patch-size", 256, 128, "--last-batch-size", 1, "--balance", 0.5, "--max-steps", 4]


def test_the_last_part_has_other_patches_and_a_resumed_run_is_the_same(quick, tmp_path, monkeypatch):
    for i, picture in enumerate((skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea())):
        save_image(tmp_path / "large" / f"{i}.png", torch.from_numpy(picture).permute(2, 0, 1))
    seen, forward, step = [], Objective.forward, Trainer.step

    def spy(self, x, *rest):
        seen.append((tuple(x.shape), self.balance, self.map_share))
        return forward(self, x, *rest)

    monkeypatch.setattr(Objective, "forward", spy)
    more = ["--checkpoint", quick, *LAST]
    whole = train(tmp_path / "large", tmp_path / "whole", *more)
    assert seen == [((2, 3, 128, 128), 0.5, 0.0)] * 2 + [((1, 3, 256, 128), 0.0, 0.2)] * 2
    assert whole["progress"]["patches"] == 6
    for last in (2, 3, 4):  # the first of the last part, one within it, and none: only what follows is left
        def interrupted(self, last=last):
            if self.progress.step == last:
                self.save()
                raise KeyboardInterrupt
            return step(self)

        def interrupted_at_the_end(self, last=False):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", interrupted)
            patch.setattr(Trainer, "validate", interrupted_at_the_end)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "large", tmp_path / f"{last}", *more)
        parts = train(tmp_path / "large", tmp_path / f"{last}", *more, "--resume")
        assert same(whole["state_dict"], parts["state_dict"])
        made, again = (read_checkpoint(tmp_path / name / "model.pth.tar") for name in ("whole", f"{last}"))
        assert same(made["state_dict"], again["state_dict"])  # coding tables too


def test_photographs_that_are_too_small_for_the_last_part_are_told_before_the_first(photos, quick, tmp_path):
    for more in ([], ["--cache-gb", 0, "-n", 1]):
        with pytest.raises(ImageError, match=r"for the last part of the run; .*smaller than a patch of 128×256"):
            train(photos, tmp_path / "run", "--checkpoint", quick, *LAST, *more)
    assert not (tmp_path / "run" / "last.pth.tar").exists()


def test_epochs_are_passes_over_the_photographs(photos, quick, tmp_path):
    state = train(photos, tmp_path / "run", "--checkpoint", quick, "-e", 2, "--val", sorted(photos.iterdir())[0])
    assert state["progress"]["step"] == 7  # seven photographs twice, two a step


def test_a_run_is_not_overwritten_and_a_budget_is_needed(photos, quick, tmp_path):
    def fails(text, *more):
        with pytest.raises(cli.UserError, match=text):
            train(photos, tmp_path / "run", "--checkpoint", quick, *more)

    fails("no budget")
    for wrong in (["--max-minutes", "-5"], ["-e", "1", "-bs", "0"]):
        fails("must not be negative", *wrong)
    fails("multiple of 128", "-e", 1, "--patch-size", 100)
    fails("one number or two", "-e", 1, "--patch-size", 128, 128, 128)
    fails("must lie in", "-e", 1, "--last-part", 1)
    fails("--schedule cosine", "-e", 1, "--last-part", 0.1, "--schedule", "step")
    fails("not static", "-e", 1, "--last-part", 0.1, "--stage", "static")
    fails("--last-patch-size must be a multiple of 128", "-e", 1, "--last-part", 0.1, "--last-patch-size", 100)
    fails("--last-batch-size is of --last-part", "-e", 1, "--last-batch-size", 2)
    fails("--preset is of a new model", "-e", 1, "--preset", "full")
    fails("belong together", "-e", 1, "--stage", "static")
    fails("of --stage base", "-e", 1, "--lambda", 0.05)
    fails("nothing to resume", "-e", 1, "--resume")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pth.tar").touch()
    fails("already there", "-e", 1)


def test_the_share_of_synthetic_patches_is_for_training_and_not_for_tables(photos, quick, tmp_path, monkeypatch):
    shares = []

    def first(dataset, *more):
        shares.append(dataset.synthetic_share)
        return first_batches(dataset, *more)

    def batches_of(dataset, *args, **kwargs):
        shares.append(dataset.synthetic_share)
        return batches(dataset, *args, **kwargs)

    monkeypatch.setattr(trainer, "first_batches", first)
    monkeypatch.setattr(trainer, "batches", batches_of)
    more = ["--synthetic-share", 0.5, "--max-steps", 2, "--last-part", 0.5, "--last-patch-size", 128]
    train(photos, tmp_path / "run", "--checkpoint", quick, *more)
    assert shares == [0.5, 0.5, 0.0]
    with pytest.raises(cli.UserError, match="--synthetic-share must lie in"):
        train(photos, tmp_path / "other", "--checkpoint", quick, "--max-steps", 2, "--synthetic-share", 1.5)


def test_the_last_part_has_as_many_pixels_a_step_and_no_more_patches(photos, quick, tmp_path):
    parser = argparse.ArgumentParser()
    add_run_arguments(parser, "nowhere")
    for more, expected in (([], 2), (["--last-batch-size", "3"], 3), (["--patch-size", "512"], 8), (["-bs", "2"], 1)):
        args = parser.parse_args(["-d", "photos", "-e", "1", "--last-part", "0.2", "--patch-size", "128", *more])
        check_run_arguments(args)
        assert args.last_batch_size == expected
    more = ["--checkpoint", quick, "--last-part", 0.1, "--last-patch-size", 128]
    train(photos, tmp_path / "run", *more, "--max-steps", 1, "--last-batch-size", 1)
    state = train(photos, tmp_path / "run", *more, "--max-steps", 2, "--resume")
    assert state["settings"]["last_batch_size"] == 1


def test_the_step_that_compiles_is_not_counted(photos, quick, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.cli.training_run.compile_networks", lambda model: None)
    more = ["--checkpoint", quick, "--compile", "--max-steps"]
    one, two = (train(photos, tmp_path / f"{steps}", *more, steps)["progress"]["seconds"] for steps in (1, 2))
    assert one == 0 < two


def test_times_of_validations_are_multiples_whenever_a_run_is_resumed():
    class Resumed:
        progress = Progress(seconds=60 * 44)

    assert Trainer._next_time(Resumed, 15) == 45 and Trainer._next_time(Resumed, 0) == 44
