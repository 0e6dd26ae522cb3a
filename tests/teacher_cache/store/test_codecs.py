"""Codecs lose as little as they promise, whatever the shape, and decode the same in numpy and in torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from student_train.losses.targets import TeacherSide, scales_on
from teacher_cache.build.calibration import scales_to_bytes
from teacher_cache.config import PRESETS, SignalsConfig
from teacher_cache.errors import CacheError
from teacher_cache.store.codecs import (
    decode,
    encode,
    fit_channel_scales,
    scales_from_bytes,
    with_exact_head,
)
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.records import TeacherShape, hidden_arrays, record_arrays
from tests.fixtures.rounding import within
from tests.fixtures.store import signals, synthetic_cache

CODECS = ["float16", "bfloat16", "int8", "int4"]


def peaked_states(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows whose channels differ a thousandfold, one of them loudest: what real final-layer states look like."""
    random = np.random.default_rng(seed)
    loudness = np.exp(random.normal(0, 1.0, width))
    loudness[0] = loudness.sum()
    return (random.normal(size=(rows, width)) * loudness).astype(np.float32)


def kl(states: np.ndarray, decoded: np.ndarray, head: np.ndarray) -> float:
    """Mean KL(exact ‖ decoded) of the next-token distributions, nats, in float64."""
    exact, other = (
        torch.log_softmax(torch.from_numpy(s).double() @ torch.from_numpy(head).double().T, -1)
        for s in (states, decoded)
    )
    return float((exact.exp() * (exact - other)).sum(-1).mean())


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    lead=st.lists(st.integers(0, 4), min_size=1, max_size=2),
    width=st.integers(1, 70),
    pca=st.booleans(),
    seed=st.integers(0, 99),
)
def test_torch_and_numpy_decode_the_same(codec, lead, width, pca, seed, device):
    random = np.random.default_rng(seed)
    calibration = peaked_states(width + 5, width, seed)
    scales = fit_channel_scales(calibration, codec, max(1, width // 2) if pca else 0)
    states = torch.from_numpy((random.normal(size=(*lead, width)) * 3).astype(np.float32)).to(device)
    codes, row_scale = encode(states, codec, scales)
    bare = codes.view(torch.int16).cpu().view(codes.dtype) if codec == "bfloat16" else codes.cpu()
    plain = decode(bare.numpy(), None if row_scale is None else row_scale.cpu().numpy(), codec, scales)
    on_device = decode(codes, row_scale, codec, scales).cpu().numpy()
    assert plain.shape == on_device.shape == (*lead, width)
    assert plain.dtype == on_device.dtype == np.float32
    np.testing.assert_allclose(on_device, plain, **within(operations=1 + width, scale=np.abs(plain).max(initial=1)))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("pca", [0, 7])
def test_codes_have_the_shape_and_type_that_the_manifest_promises(codec, pca):
    config = SignalsConfig(codec=codec, pca=pca)
    scales = fit_channel_scales(peaked_states(40, 33), codec, pca)
    arrays = encode(torch.from_numpy(peaked_states(5, 33)), codec, scales)
    specs = hidden_arrays("hidden", "row", config, TeacherShape(33, 97))
    for spec, array in zip(specs, [a for a in arrays if a is not None], strict=True):
        assert (tuple(array.shape[1:]), str(array.numpy().dtype)) == (spec.shape, spec.dtype), spec.name


@pytest.mark.parametrize(("codec", "relative"), [("float16", 5e-4), ("bfloat16", 4e-3), ("int8", 6e-3), ("int4", 8e-2)])
def test_an_entry_is_at_most_half_a_step_off(codec, relative):
    """float: half a unit in the last place; int8, int4: half a step of its row (block), channel scale taken out."""
    scales = fit_channel_scales(peaked_states(300, 64), codec)
    states = peaked_states(50, 64, seed=1)
    codes, row_scale = encode(torch.from_numpy(states), codec, scales)
    decoded = decode(codes.numpy(), None if row_scale is None else row_scale.numpy(), codec, scales)
    error = np.abs(decoded - states) / scales.channel_scale
    scaled = np.abs(states / scales.channel_scale)
    if codec in ("float16", "bfloat16"):
        assert (error <= relative * scaled + 1e-6).all()
        return
    top = scaled.max(-1, keepdims=True) if codec == "int8" else scaled.reshape(50, -1, 32).max(-1).repeat(32, -1)
    assert (error <= relative * top).all()


def test_a_state_beyond_float16_is_infinite_not_cut_off():
    """Whoever stores it sees that: the sample is left out, and no row is quietly another."""
    states = torch.from_numpy(peaked_states(5, 64, seed=1))
    states[2, 3] = 1e6
    codes, _ = encode(states, "float16", fit_channel_scales(states.numpy(), "float16"))
    assert torch.isfinite(codes).all(1).tolist() == [True, True, False, True, True]


def test_each_codec_stays_under_its_divergence():
    """One channel holds most of the energy; without channel scales int8 would be a hundred times worse."""
    width = 256
    head = np.random.default_rng(2).normal(size=(500, width)).astype(np.float32)
    states, calibration = peaked_states(64, width, 1), peaked_states(512, width, 3)
    head /= 8 * np.abs(calibration).mean(0) * np.sqrt(width)
    head *= 12
    found = {}
    for codec in CODECS:
        scales = fit_channel_scales(calibration, codec)
        codes, row_scale = encode(torch.from_numpy(states), codec, scales)
        found[codec] = kl(
            states, decode(codes.numpy(), None if row_scale is None else row_scale.numpy(), codec, scales), head
        )
    plain = states / np.abs(states).max(-1, keepdims=True) * 127
    without = kl(states, np.round(plain) / 127 * np.abs(states).max(-1, keepdims=True), head)
    assert found["float16"] < 1e-5
    assert found["bfloat16"] < 1e-4
    assert found["int8"] < 1e-2
    assert found["int4"] < 0.4
    assert without > 50 * found["int8"]


def test_principal_components_give_back_what_lies_in_their_space():
    random = np.random.default_rng(0)
    states = (random.normal(size=(200, 6)) @ random.normal(size=(6, 30)) + 2).astype(np.float32)
    for components, close in ((6, True), (3, False)):
        scales = fit_channel_scales(states, "float16", components)
        codes, _ = encode(torch.from_numpy(states), "float16", scales)
        assert codes.shape == (200, components)
        assert np.allclose(decode(codes.numpy(), None, "float16", scales), states, atol=0.02) == close


def test_too_few_calibration_rows_for_the_components_are_refused():
    with pytest.raises(
        ValueError, match=r"signals\.pca=40 needs at least as many calibration rows.*calibration_samples"
    ):
        fit_channel_scales(peaked_states(8, 64), "int8", 40)


@pytest.mark.parametrize("codec", CODECS)
def test_silent_rows_silent_channels_and_huge_values_stay_finite(codec):
    calibration = peaked_states(64, 32)
    calibration[:, 5] = 0
    scales = fit_channel_scales(calibration, codec)
    states = np.zeros((3, 32), np.float32)
    states[1] = 3e4
    states[2, 5] = 1e-30
    codes, row_scale = encode(torch.from_numpy(states), codec, scales)
    decoded = decode(codes.numpy(), None if row_scale is None else row_scale.numpy(), codec, scales)
    assert np.isfinite(decoded).all()
    np.testing.assert_array_equal(decoded[0], 0)


@pytest.mark.parametrize(("codec", "pca"), [("int8", 5), ("int4", 0)])
def test_scales_survive_their_file(codec, pca):
    states = {"hidden": peaked_states(50, 20), "visual": peaked_states(9, 20)}
    fitted = {name: fit_channel_scales(rows, codec, pca) for name, rows in states.items()}
    again = scales_from_bytes(scales_to_bytes(fitted), "scales.safetensors", 20, pca)
    assert set(again) == {"hidden", "visual"}
    for name, scales in fitted.items():
        np.testing.assert_array_equal(again[name].channel_scale, scales.channel_scale)
        assert (again[name].basis is None) == (scales.basis is None)


@pytest.mark.parametrize(
    ("stored", "complaint"),
    [
        (b"scales", "ends within its header"),
        (
            save({"hidden.channel_scale": np.ones(3, np.float32), "hidden.gain": np.ones(3, np.float32)}),
            "'hidden.gain'",
        ),
        (
            save({"hidden.mean": np.ones(3, np.float32), "hidden.basis": np.ones((2, 3), np.float32)}),
            "'hidden': expected the shapes",
        ),
        (
            save({"hidden.channel_scale": np.ones(2, np.float32), "hidden.mean": np.ones(3, np.float32)}),
            "'hidden': expected the shapes",
        ),
    ],
    ids=["no_safetensors", "unknown_part", "no_channel_scale", "mean_without_basis"],
)
def test_a_file_that_holds_no_scales_is_refused(stored, complaint):
    with pytest.raises(CacheError, match=f"scales.safetensors: .*{complaint}"):
        scales_from_bytes(stored, "scales.safetensors", 3)


@pytest.mark.parametrize(
    "config",
    [
        *(signals(codec=c) for c in CODECS),
        signals("full", codec="int4", second_last=True),
        signals(pca=12, codec="int8"),
        signals(sampled=9),
        signals(sampled=9, sampled_from="tail"),
    ],
    ids=lambda c: f"{c.preset}-{c.codec}-{c.pca}-{c.sampled}-{c.sampled_from}",
)
def test_every_signal_is_in_the_manifest_and_decodes_on_a_device_from_the_cache_alone(tmp_path, config):
    made = synthetic_cache(tmp_path / "c", 5, config=config)
    with TeacherCache.open(tmp_path / "c") as cache:
        assert {s.name: s.dtype for s in cache.manifest.arrays} == {n: str(a.dtype) for n, a in cache[0].arrays.items()}
        batch = cache.read(range(len(cache)))
        arrays = {n: torch.from_numpy(a) for n, a in batch.arrays.items()}
        if config.hidden != "none":
            wanted = torch.cat([s.rows if config.hidden == "rows" else s.text for s in made.states])
            stored = cache.manifest.signals_config
            hidden = decode(arrays["hidden"], arrays.get("hidden_scale"), stored.codec, cache.scales["hidden"])
            tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "int8": 3e-2, "int4": 0.6}[config.codec]
            if not config.pca:
                torch.testing.assert_close(hidden, wanted, rtol=0, atol=tolerance)
            assert hidden.shape == wanted.shape
        if config.sampled:
            assert arrays["sampled_counts"].sum(-1).eq(9).all()


def test_coarse_states_with_an_exact_head_keep_the_head_and_its_mass_and_lose_less():
    random = np.random.default_rng(0)
    exact = torch.from_numpy(random.normal(0, 3, (20, 60))).log_softmax(-1)
    coarse = exact + torch.from_numpy(random.normal(0, 1.5, (20, 60)))
    lse = torch.from_numpy(random.normal(9, 1, 20))
    kept, ids = exact.topk(6)
    joined = with_exact_head(coarse, ids, kept, lse)
    logprobs = joined.log_softmax(-1)
    torch.testing.assert_close(joined.gather(-1, ids), kept + lse[:, None])
    torch.testing.assert_close(joined.logsumexp(-1), lse)
    torch.testing.assert_close(logprobs.gather(-1, ids), kept)
    even = ((1 - kept.exp().sum(-1, keepdim=True)) / 54).log().expand(20, 60).scatter(-1, ids, kept)

    def loss(other):
        return float((exact.exp() * (exact - other)).sum(-1).mean())

    assert loss(logprobs) < loss(coarse.log_softmax(-1)) / 3
    assert loss(logprobs) < loss(even)


@pytest.mark.parametrize(("codec", "pca", "corrected"), [("int8", 0, False), ("int4", 0, True), ("int8", 9, True)])
def test_a_student_sees_the_exact_head_where_states_are_coarse(tmp_path, codec, pca, corrected):
    config = signals(codec=codec, pca=pca)
    made = synthetic_cache(tmp_path / "c", 4, skipped=(), config=config)
    with TeacherCache.open(tmp_path / "c") as cache:
        arrays = {n: torch.from_numpy(a) for n, a in cache.read(range(4)).arrays.items()}
        scales = {name: scales_on(s, "cpu") for name, s in cache.scales.items()}
        manifest = cache.manifest
        width, n = manifest.shape.hidden_size, manifest.image_tokens
        side = TeacherSide(manifest.signals_config, scales, made.head, width, n)
        targets = side.rows(arrays, None)
    logits = targets.exact_logits(slice(None))
    kept = arrays["topk_logprobs"].float()
    found = logits.log_softmax(-1).gather(-1, arrays["topk_ids"].long())
    assert torch.allclose(found, kept, atol=2e-3) == corrected


def test_the_small_preset_takes_less_than_114_bytes_a_row():
    config = SignalsConfig(preset="small", **PRESETS["small"])
    specs = [s for s in record_arrays(config, TeacherShape(5120, 32064)) if s.axis == "row"]
    assert sum(s.line_bytes for s in specs) == 110
