"""The linear decoder of pixels: against scikit-learn's Ridge, an exactly linear encoder, and on whole checkpoints."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from cjepa_jax import plots
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate import decoder
from cjepa_jax.models.vit import patchify
from tests.test_patchwise import SIZE, drawn, load, save

assert drawn and load and save  # fixtures


@pytest.mark.parametrize("strength", [1e-6, 0.3])
def test_it_is_scikit_learns_ridge(strength):
    """On features of large means and very different scales, in two parts."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 7)) * np.exp(rng.normal(size=7)) + 10 * rng.normal(size=7)
    y = x @ rng.normal(size=(7, 4)) + rng.normal(size=(200, 4)) + 3
    moments = decoder.Moments.of(x[:150], y[:150]).plus(decoder.Moments.of(x[150:], y[150:]))
    found = decoder.fit(moments, strength)
    reference = Ridge(alpha=200 * strength * x.var(axis=0).mean(), solver="svd").fit(x, y)
    np.testing.assert_allclose(found.kernel, reference.coef_.T, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.bias, reference.intercept_, rtol=1e-6)
    error = np.square(reference.predict(x) - y).sum()
    assert decoder.squared_error(moments, found) == pytest.approx(error, rel=1e-7)


def test_features_that_are_all_the_same_give_the_mean():
    y = np.random.default_rng(0).random((30, 4))
    found = decoder.fit(decoder.Moments.of(np.full((30, 3), 0.5), y), 1e-4)
    np.testing.assert_allclose(np.full(3, 0.5) @ found.kernel + found.bias, y.mean(axis=0))


def test_a_linear_encoder_is_decoded_exactly(save, load, drawn, tmp_path, monkeypatch):
    """One that turns and shifts pixels; the others see fewer of them. The picture shows what was decoded."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(48, 48)))[0].astype(np.float32)

    def linear(model, **_):
        def apply(params, images):
            return patchify(images.astype(np.float32) / 255, 4) @ turn[:, : params["shown"].shape[0]] + 5

        return apply

    monkeypatch.setattr(decoder, "patch_features", linear)
    chosen, frozen, images = load(save("run"))
    widths = {"trained": 48, "context encoder": 24, "untrained": 8}
    shown = {name: {"shown": jax.numpy.zeros(width)} for name, width in widths.items()}
    monkeypatch.setattr(decoder, "shown_encoders", lambda frozen: shown)
    rows = chosen.decoder.run(frozen, tmp_path / "x")
    assert rows["trained"]["R2"] == pytest.approx(1, abs=1e-6) and rows["trained"]["strength"] == 1e-8
    assert 0.3 < rows["context encoder"]["R2"] < 0.7 and 0 < rows["untrained"]["R2"] < 0.3
    columns, _ = drawn["x.decoder.png"]
    assert [*columns] == ["image", "trained,\ntarget encoder", "context encoder", "untrained"]
    clean = images[np.linspace(0, 19, 8).round().astype(int)]
    np.testing.assert_array_equal(columns["image"], clean)
    np.testing.assert_allclose(columns["trained,\ntarget encoder"], clean / 255, atol=1e-4)
    assert abs(columns["untrained"] - clean / 255).max() > 0.1


def test_both_encoders_of_a_checkpoint_are_judged_on_test_images(save, load, tmp_path, monkeypatch):
    """R2 and PSNR against scikit-learn, with the encoders' features; what is read alone counts."""
    monkeypatch.setattr(plots, "side_by_side", lambda *_, **__: None)
    chosen, frozen, images = load(save("run"), decoder__strengths=(1e-3,))
    chosen.decoder.check(frozen)
    rows = chosen.decoder.run(frozen, None)
    assert [*rows] == ["trained", "context encoder", "untrained"]
    params = decoder.shown_encoders(frozen)
    extractor = decoder.extractor_of(frozen, params)
    targets = np.asarray(patchify(images / 255, 4)).reshape(-1, 48)
    for name, row in rows.items():
        x = np.asarray(jax.jit(extractor.encoders[name])(params[name], images), np.float64).reshape(len(targets), -1)
        alpha = len(x) * 1e-3 * x.var(axis=0).mean()  # the training images are those of the test, in another order
        predicted = Ridge(alpha=alpha, solver="svd").fit(x, targets).predict(x)
        assert row["R2"] == pytest.approx(r2_score(targets, predicted, multioutput="variance_weighted"), abs=1e-4)
        assert row["PSNR in dB"] == pytest.approx(-10 * np.log10(np.square(predicted - targets).mean()), abs=1e-3)
        assert row["images"] == 20 and [*row["held-out error"]] == ["0.001"]
    assert len({row["R2"] for row in rows.values()}) == 3


@pytest.mark.parametrize(
    "overrides, says",
    [
        ({"decoder__strengths": ()}, r"decoder\.strengths is empty"),
        ({"decoder__strengths": (0.0,)}, r"decoder\.strengths must be in \(0, 1e9\], got 0\.0"),
        ({"decoder__images": 1}, r"decoder\.images must be in \[2, 1e9\], got 1"),
    ],
)
def test_what_cannot_be_fitted_is_said_first(save, load, overrides, says):
    with pytest.raises(UserError, match=says):
        load(save("run"), baselines=False, **overrides)


def test_images_of_which_nothing_can_be_learned_are_refused(save, load, tmp_path):
    grey = np.full((20, SIZE, SIZE, 3), 128, np.uint8)
    chosen, frozen, _ = load(save("run"), baselines=False)
    np.savez(tmp_path / "images.npz", train_images=grey, test_images=grey)
    with pytest.raises(UserError, match=r"data\.test_split = 'test': all patches are the same"):
        chosen.decoder.run(frozen, None)
    chosen, frozen, _ = load(save("other"), baselines=False)
    np.savez(tmp_path / "images.npz", train_images=grey[:1], test_images=grey)
    with pytest.raises(UserError, match=r"data\.train_split = 'train' has 1 image; decoder needs 2 or more"):
        chosen.decoder.check(frozen)
