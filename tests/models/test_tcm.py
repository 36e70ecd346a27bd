"""The networks: their forms of call, the latent's way through them, coding, and weights."""

import warnings
from dataclasses import asdict

import pytest
import torch

from models import LAE, TCM, TCM_VBR, TCMConfig
from models.coding.portable import table_rows
from models.coding.slice_coders import ste_round
from models.coding.tables import CodingTables
from models.lambdas import index_to_lambda
from models.registry import from_preset
from tests.conftest import BLOCKS_IN_EVERY_STAGE, TINY, shake


def bits(out):
    return {name: float(-value.log2().sum()) for name, value in out["likelihoods"].items()}


# Constraints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(N=48), "N must"),
        (dict(M=96), "M/2 must"),
        (dict(num_slices=3), "num_slices must divide"),
        (dict(max_support_slices=3), "max_support_slices"),
        (dict(head_dim=(8, 16, 24, 16, 16, 8)), "head_dim must divide"),
        (dict(config=(1, 1, 1)), "config"),
        (dict(inter_dim=40), "inter_dim"),
        (dict(inter_dim=None, num_slices=8), "without inter_dim"),
        (dict(slice_widths=(32,)), "slice_widths"),
        (dict(hyper_channels=0), "hyper_channels"),
        (dict(drop_path_rate=1.0), "drop_path_rate"),
    ],
)
def test_invalid_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        TCM_VBR(**TINY | change)


@pytest.mark.parametrize(
    "change",
    [
        dict(max_support_slices=0),
        dict(num_slices=1, max_support_slices=1),
        dict(num_slices=4, max_support_slices=4, M=128),
        dict(num_slices=4, max_support_slices=2, inter_dim=None),
        dict(config=(0, 1, 0, 1, 1, 3), drop_path_rate=0.1),
        dict(N=64, hyper_channels=48),
    ],
)
def test_valid_combinations_code_and_are_rebuilt_from_their_weights(change, image):
    torch.manual_seed(0)
    model = shake(TCM_VBR(**TINY | change)).eval()
    model.update()
    x = image[..., :128]
    with torch.no_grad():
        x_hat = model(x, 1.5)["x_hat"]
        out = model.compress(x, 1.5)
        assert torch.equal(model.decompress(out["strings"], out["shape"], 1.5)["x_hat"], x_hat.clamp(0, 1))
        again = TCM_VBR.from_state_dict(model.state_dict())
        assert torch.equal(again(x, 1.5)["x_hat"], x_hat)


def test_drop_path_rises_over_the_blocks_of_both_transforms():
    model = TCM(**TINY | BLOCKS_IN_EVERY_STAGE | dict(drop_path_rate=0.7))
    rates = [
        getattr(block.trans_block.drop_path, "drop_prob", 0.0)
        for transform in (model.g_a, model.g_s)
        for block in transform
        if hasattr(block, "trans_block")
    ]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], abs=1e-6)
    assert not any(hasattr(m, "drop_prob") for m in model.h_a.modules())


def test_forms_of_the_constructor():
    """The published call by name and by position, and a TCMConfig."""
    published = TCM_VBR(config=[2, 2, 2, 2, 2, 2], head_dim=[8, 16, 32, 32, 16, 8], drop_path_rate=0.0, N=64, M=320)
    assert published.config == TCMConfig(N=64) == TCM([2] * 6, [8, 16, 32, 32, 16, 8], 0, 64, 320).config
    assert TCM(TCMConfig(**TINY)).arguments == TCM(**TINY).arguments == asdict(TCMConfig(**TINY))
    assert isinstance(published.modnet_ga, LAE)


def test_presets_have_their_sizes():
    count = {name: sum(p.numel() for p in from_preset(name).parameters()) for name in ("full", "small")}
    assert 47.2e6 < count["full"] < 47.4e6
    assert 13.2e6 < count["small"] < 13.4e6


# Calls ---------------------------------------------------------------------------------------


def test_forward_gives_what_was_published(tiny, image):
    with torch.no_grad():
        out = tiny(image, 2)
    assert set(out) == {"x_hat", "likelihoods", "lmd_index", "latent", "log_m_ga", "log_m_gs"}
    assert out["x_hat"].shape == image.shape
    assert out["latent"].shape == out["likelihoods"]["y"].shape == (1, 64, 8, 16)
    assert out["likelihoods"]["z"].shape == (1, 32, 2, 4)
    assert out["lmd_index"].tolist() == [2]


def test_forms_of_the_index_agree(tiny, image):
    with torch.no_grad():
        results = [tiny(image, index)["x_hat"] for index in (2, 2.0, torch.tensor([2]), torch.tensor(2.0))]
        assert all(torch.equal(r, results[0]) for r in results)
        assert not torch.equal(tiny(image, 2.5)["x_hat"], results[0])


def test_each_image_has_its_own_index(tiny, image):
    two, indexes = torch.cat([image, image]), torch.tensor([0.5, 4.0])
    with torch.no_grad():
        latents = tiny(two, indexes)["latent"]
        pictures = tiny.synthesize(latents, indexes)
        assert (latents[0] - latents[1]).abs().max() > 0.1
        for latent, picture, index in zip(latents, pictures, indexes, strict=True):
            torch.testing.assert_close(latent[None], tiny(image, index)["latent"], atol=1e-4, rtol=1e-4)
            alone = tiny.synthesize(latent[None], index[None])
            torch.testing.assert_close(picture[None], alone, atol=1e-3, rtol=1e-3)


def test_index_is_required_in_evaluation_and_drawn_in_training(tiny, image):
    with pytest.raises(ValueError, match="needs a rate index"):
        tiny(image)
    tiny.train()
    drawn = torch.cat([tiny(image.expand(8, -1, -1, -1))["lmd_index"] for _ in range(4)])
    assert drawn.tolist() == drawn.round().tolist() and 3 < len(drawn.unique()) <= 6  # whole ones, as published


@pytest.mark.parametrize("shape", [(1, 3, 100, 128), (3, 128, 128), (1, 1, 128, 128), (0, 3, 128, 128)])
def test_other_sides_are_refused(tiny, shape):
    with pytest.raises(ValueError, match="multiples of 128"):
        tiny(torch.rand(shape), 1)


def test_laes_are_identity_at_the_start(image):
    torch.manual_seed(0)
    base = shake(TCM(**TINY)).eval()
    base.update()
    model = TCM_VBR(**TINY).eval()
    shake(model, seed=5)  # weights of the LAEs that loading must put back
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        assert torch.equal(model(image, 3)["x_hat"], base(image)["x_hat"])
        assert torch.equal(model(image, 0.5)["x_hat"], base(image)["x_hat"])
        assert float(model.compress(image, 3)["m_y"]) == 0


def test_m_stays_within_its_bounds(tiny, image):
    with torch.no_grad():
        tiny.modnet_ga.mask.lmd_map.fc_layers[-1].bias.fill_(1e6)
        y, log_m = tiny.analyze(image, torch.tensor([5.0]))
        assert log_m.max() <= 1 and log_m.min() > 0.99
        torch.testing.assert_close(y, tiny.g_a(image) * log_m.exp(), atol=1e-4, rtol=1e-4)


# The latent ----------------------------------------------------------------------------------


def code_latent(model, y, z, index) -> dict:
    """What `compress` returns, from a latent, and the `x_hat` that `decompress` should make of it."""
    quantized = model.quantize(y, z, portable=False, complete=True)
    x_hat = model.synthesize(quantized.y_hat, model.resolve_index(index, len(y))).clamp(0, 1)
    return model.encode_symbols(quantized) | {"x_hat": x_hat}


@pytest.mark.parametrize("index", [[-2.0], [3.0], [6.5], [[[[-1.0, 2.0, 5.0, 7.0]]]]])
def test_beyond_the_ladder_latents_are_scaled_by_the_root_of_lambda_and_back(tiny, index):
    """In bands as in one piece, and for a map as for one index."""
    index = torch.tensor(index)
    y = torch.randn(1, tiny.M, 8, 4, generator=torch.Generator().manual_seed(0))
    if index.dim() == 4:
        index = index.expand(1, 1, 8, 4)
    ends = index.clamp(0, 5)
    gain = (index_to_lambda(index) / index_to_lambda(ends)).sqrt().view(1, 1, *(index.shape[2:] or (1, 1)))
    with torch.no_grad():
        scaled, log_m = tiny.modulate(y, index)
        torch.testing.assert_close(scaled, tiny.modulate(y, ends)[0] * gain)
        torch.testing.assert_close(log_m, (scaled / y).log())
        back, _ = tiny.demodulate(y, index)
        torch.testing.assert_close(back, tiny.demodulate(y, ends)[0] / gain)
        torch.testing.assert_close(torch.cat([*tiny.demodulate_bands(y, index, 4)], 2), back)


def test_from_latent_equals_forward(tiny, image):
    with torch.no_grad():
        out = tiny(image, 2)
        y = out["latent"]
        again = tiny.forward_fromlatent(y, tiny.h_a(y), 2)
        coded = code_latent(tiny, y, tiny.h_a(y), 2)
    assert torch.equal(again["x_hat"], out["x_hat"])
    assert torch.equal(coded["x_hat"], out["x_hat"].clamp(0, 1))
    assert coded["strings"] == tiny.compress(image, 2)["strings"]


def test_gradients_reach_the_latent(tiny, image):
    with torch.no_grad():
        y = tiny(image, 2)["latent"]
        z = tiny.h_a(y)
    y.requires_grad_()
    z.requires_grad_()
    tiny.train()
    out = tiny.forward_fromlatent(y, z, 2)
    rate = sum(value.log().mean() for value in out["likelihoods"].values())
    (out["x_hat"].square().mean() - rate).backward()
    assert y.grad.abs().mean() > 0 and z.grad.abs().mean() > 0


def test_rounding_is_exact_and_passes_gradients():
    x = torch.randn(1000) * 1e3
    x.requires_grad_()
    rounded = ste_round(x)
    assert torch.equal(rounded, x.round())
    rounded.sum().backward()
    assert (x.grad == 1).all()


# Coding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 2.25, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_decoding_gives_what_forward_gives(tiny, image, index, layout):
    tiny.to(memory_format=layout)
    x = torch.cat([image, image.flip(-1), image.flip(-2)])
    with torch.no_grad():
        expected = tiny(x, index)
        out = tiny.compress(x, index)
        decoded = tiny.decompress(out["strings"], out["shape"], index)["x_hat"]
    assert torch.equal(decoded, expected["x_hat"].clamp(0, 1))
    y_strings, z_strings = out["strings"]
    assert len(y_strings) == len(z_strings) == 3
    assert tuple(out["shape"]) == (2, 4)
    expected_bits = bits(expected)
    for name, strings in (("y", y_strings), ("z", z_strings)):
        coded = 8 * sum(map(len, strings))
        assert coded == pytest.approx(expected_bits[name], rel=0.02, abs=3 * 100)  # each stream ends on whole words


def test_symbols_beyond_the_tables_survive(tiny, image):
    with torch.no_grad():
        y = tiny(image, 2)["latent"]
        z = tiny.h_a(y)
        y, z = y * 30, z + 40 * torch.eye(4)[:2]  # far outside the range of every table row
        coded = code_latent(tiny, y, z, 2)
        decoded = tiny.decompress(coded["strings"], coded["shape"], 2)["x_hat"]
    assert torch.equal(decoded, coded["x_hat"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_latents_that_cannot_be_coded_are_an_error(tiny, image, value):
    with torch.no_grad():
        y = tiny(image, 2)["latent"]
        z = tiny.h_a(y)
        y[0, 40, 3, 3] = value
        with pytest.raises(ValueError, match="cannot be coded"):
            code_latent(tiny, y, z, 2)


def test_hyper_latent_is_coded_as_compressai_codes_it(tiny, image):
    with torch.no_grad():
        z = tiny.h_a(tiny(image, 2)["latent"])
        assert tiny.compress(image, 2)["strings"][1] == tiny.entropy_bottleneck.compress(z)


def test_table_indexes_are_those_of_compressai(tiny):
    table = tiny.gaussian_conditional.scale_table
    sigma = torch.cat([torch.linspace(-1, 300, 5001), table, table.nextafter(torch.tensor(0.0)), torch.tensor([0.11])])
    indexes = table_rows(tiny.gaussian_conditional, sigma)
    assert torch.equal(indexes, tiny.gaussian_conditional.build_indexes(sigma))


def test_tables_are_made_once_and_anew_after_an_update(tiny):
    assert tiny.coding_tables[0] is tiny.coding_tables[0]
    before = tiny.coding_tables
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no table was fitted
        tiny.update(force=True)
    assert tiny.coding_tables[0] is not before[0]
    with pytest.raises(ValueError, match="call update"):
        CodingTables(TCM(**TINY).gaussian_conditional)


# Weights -------------------------------------------------------------------------------------

OLD_NAMES = {"matrices.": "_matrix", "biases.": "_bias", "factors.": "_factor"}


def old_form(state, half=False, tables=True):
    """As an old training script would have saved it."""
    out = {}
    for name, value in state.items():
        if not tables and any(t in name for t in ("_offset", "_quantized_cdf", "_cdf_length", "scale_table")):
            continue
        if name.startswith("entropy_bottleneck."):
            for new, old in OLD_NAMES.items():
                name = name.replace(f"entropy_bottleneck.{new}", f"entropy_bottleneck.{old}")
        out["module." + name] = value.half() if half and value.is_floating_point() else value
    return out


@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("cls", [TCM, TCM_VBR])
def test_published_forms_load(image, cls, half, tables):
    torch.manual_seed(0)
    expected = shake(cls(**TINY)).eval()
    if half:  # the same model with weights rounded to float16, its constants not
        with torch.no_grad():
            for p in expected.parameters():
                p.copy_(p.half())
    expected.update()
    state = old_form(expected.state_dict(), half, tables)
    assert "module.entropy_bottleneck._matrix0" in state
    model = cls.from_state_dict(state)
    model.update()
    with torch.no_grad():
        x_hat = expected(image, 1.5)["x_hat"]
        assert torch.equal(model(image, 1.5)["x_hat"], x_hat)
        coded = model.compress(image, 1.5)
        assert coded["strings"] == expected.compress(image, 1.5)["strings"]
        assert torch.equal(model.decompress(coded["strings"], coded["shape"], 1.5)["x_hat"], x_hat.clamp(0, 1))


def test_tables_of_the_file_are_kept(tiny):
    state = tiny.state_dict()
    state["gaussian_conditional._offset"] = state["gaussian_conditional._offset"] - 1
    model = TCM_VBR(**TINY)
    model.update()  # tables of its own, of other sizes
    model.load_state_dict(state)
    model.update()
    assert torch.equal(model.gaussian_conditional._offset, state["gaussian_conditional._offset"])
    assert torch.equal(model.entropy_bottleneck._quantized_cdf, tiny.entropy_bottleneck._quantized_cdf)


def test_weights_that_do_not_fit_are_explained_in_one_line(tiny):
    state = tiny.state_dict()
    state["g_a.0.conv1.weight"] = state["g_a.0.conv1.weight"][:, :2]
    state["odd"] = torch.zeros(1)
    del state["h_a.0.conv1.bias"]
    with pytest.raises(ValueError) as error:
        tiny.load_state_dict(state)
    text = str(error.value)
    assert "\n" not in text
    assert "1 missing: h_a.0.conv1.bias" in text and "1 unknown: odd" in text
    assert "g_a.0.conv1.weight is [64, 2, 3, 3], not [64, 3, 3, 3]" in text
    assert tiny.gaussian_conditional._offset.numel()  # the model is as it was


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="not the weights of a TCM"):
        TCM_VBR.from_state_dict(torch.nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match="not a state dict"):
        TCM.from_state_dict({"epoch": 3})
    with pytest.raises(ValueError, match="do not fit TCM: .*unknown: modnet_ga"):
        TCM.from_state_dict(TCM_VBR(**TINY).state_dict())


def test_the_latent_is_float32_under_autocast(tiny):
    """bfloat16 numbers above 128 are a step apart, and the latent is rounded to whole numbers."""
    last, seen = tiny.g_a[-1], []
    last.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tiny.features(x)
    before, y = seen.pop()
    assert before.dtype == torch.bfloat16 and y.dtype == torch.float32
    with torch.no_grad():
        exact = torch.nn.functional.conv2d(before.float(), last.weight, last.bias, stride=2, padding=1)
        assert torch.equal(y, exact)
        tiny.features(x)
        before, y = seen.pop()
        assert torch.equal(y, torch.nn.functional.conv2d(before, last.weight, last.bias, stride=2, padding=1))
