"""Study: the paper's ablations, and the methods beside it, with ViT-Ti on CIFAR-10.

    python -m cjepa_jax.study --config=configs/study_ablation.py --plan
    python -m cjepa_jax.study --config=configs/study_ablation.py

Wants TFDS' cifar10 in ArrayRecord files; where it is not, the command says how to do that. In a copy of this file,
data=dict(source="npz", data_dir=FILE) reads arrays instead (docs/data.md).
Every arm has six trials, then three seeds: 171 runs of 17,578 steps of 256 images. Hardware: one accelerator;
--plan says how long it takes there. Not yet run.
"""

from typing import Any

from configs import simsiam_vitb16, vicreg_vitb16

DATA = dict(
    source="tfds",
    name="cifar10",
    test_split="test",
    image_size=32,
    mean=(0.491, 0.482, 0.447),
    std=(0.247, 0.243, 0.262),
    batch_size=256,
)
MODEL = dict(size="Ti", patch_size=4, init="fan_in")
COMMON = dict(log=dict(every=200), checkpoint=dict(every=2000), eval=dict(crop_fraction=1.0))
RATES = (2e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3)
FEWER = (5e-4, 1e-3, 2e-3)  # where a coefficient is tuned, too


# What follows an arm's name, and the settings that it stands for.
AVERAGES: dict[str, dict[str, Any]] = {"": {}, ", no EMA": {"ema": {"start": 0.0, "end": 0.0}}}


def views(config: Any, **more: Any) -> dict[str, Any]:
    """A method of two augmented views, on the same images, encoder and number of epochs."""
    values = config.to_dict()
    values["data"] |= DATA
    values["model"] = MODEL
    values["optim"] |= dict(epochs=100.0, warmup_epochs=10.0)
    values.pop("checkpoint")
    # 32 pixels have no room for blur, and AdamW is the optimizer of all arms.
    values["views"] |= dict(blur=(0.0, 0.0))
    return {**values, **COMMON, **more}


def terms(rates: dict[str, Any], both: dict[str, Any]) -> dict[str, Any]:
    """The paper's ablation of its terms, with and without EMA; `both` is what arms with a coefficient tune."""
    given = {
        "I-JEPA": ({"weight": 0.0}, rates),
        "variance and covariance": ({"invariance": 0.0}, both),
        "invariance": ({"variance": 0.0, "covariance": 0.0}, both),
        "all": ({}, both),
    }
    arms = {}
    for ema, average in AVERAGES.items():
        for name, (vicreg, tune) in given.items():
            arms[name + ema] = dict(settings={"vicreg": vicreg, **average}, tune=tune)
    return arms


def get_config() -> dict[str, Any]:
    base = dict(
        method="cjepa",
        data=DATA,
        model=MODEL,
        predictor=dict(width=96, depth=4),
        # 64 patches, of which about a third is left when four blocks are hidden.
        mask=dict(recipe="corrected", context_tokens=20, min_keep=4, keep="random"),
        vicreg=dict(weight=0.003),
        optim=dict(epochs=100.0, warmup_epochs=10.0, learning_rate_start=5e-5),
        **COMMON,
    )
    rates = {"optim.learning_rate": RATES}
    both = {"optim.learning_rate": FEWER, "vicreg.weight": (0.001, 0.01)}
    arms = terms(rates, both)
    for weight in (0.0003, 0.001, 0.003, 0.01, 0.03):
        arms[f"all, coefficient {weight}"] = dict(settings={"vicreg": {"weight": weight}}, tune=rates)
    arms["all, projector of 3 layers"] = dict(settings={"vicreg": {"projector": (512, 512, 512)}}, tune=both)
    arms["all, views context and target"] = dict(settings={"vicreg": {"views": "context_target"}}, tune=both)
    arms["all, masks as released"] = dict(settings={"mask": {"recipe": "released", "keep": "raster"}}, tune=both)
    sigreg = {"optim.learning_rate": FEWER, "sigreg.weight": (0.005, 0.05)}
    arms["SIGReg"] = dict(settings={"vicreg": {"weight": 0.0}}, tune=sigreg)
    arms["SimSiam"] = dict(base=views(simsiam_vitb16.get_config()), tune=rates)
    arms["VICReg"] = dict(base=views(vicreg_vitb16.get_config()), tune=rates)
    return dict(
        base=base,
        arms=arms,
        baseline="I-JEPA",
        seeds=(0, 1, 2),
        splits=dict(train="train[:90%]", held_out="train[90%:]", test="test"),
        probes=10,
        evaluators=("knn", "logistic", "linear", "collapse"),
    )
