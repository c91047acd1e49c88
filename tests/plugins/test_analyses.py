import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from at_smooth import InputError, OptionError, Run, Threat, checkpoint, create, load_data, load_model, train
from at_smooth.data import as_float
from at_smooth_plugins.analyses.confidence import expected_calibration_error, reliability
from at_smooth_plugins.analyses.input_landscape import directions_of, landscape
from at_smooth_plugins.analyses.local_linearity import local_linearity, uniform_noise
from at_smooth_plugins.analyses.tsne import features_of
from at_smooth_plugins.analyses.weight_flatness import moved, random_direction

QUICK = {
    "curves": {},
    "logits": {"n_examples": 30, "steps": 2},
    "tsne": {"n_examples": 24, "steps": 2},
    "input-landscape": {"n_examples": 2, "points": 5},
    "weight-flatness": {"n_examples": 20, "steps": 2, "directions": 2, "distances": [0, 1]},
    "local-linearity": {"n_examples": 30, "draws": 2},
    "transfer": {"n_examples": 30, "steps": 2},
    "confidence": {"n_examples": 60, "steps": 2},
    "attack-gallery": {"n_examples": 2, "steps": 2},
}
ON_MODELS = sorted(set(QUICK) - {"curves"})


def study(name, runs, **options):
    here = {} if name == "curves" else {"device": "cpu"}
    return create("analyses", name, {**here, **QUICK[name], **options}).study(runs)


def rows(name, runs, **options):
    """The rows of the only table."""
    [table] = study(name, runs, **options).tables.values()
    return table


@pytest.fixture(scope="module")
def second_seed(tiny, tmp_path_factory):
    return train(tiny(seed=1), tmp_path_factory.mktemp("second") / "run")


@pytest.fixture(scope="module")
def colour_runs(tiny, tmp_path_factory):
    """Two runs on small colour images, in L2."""
    folder = tmp_path_factory.mktemp("colour")
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = np.clip(rng.random((3, 6, 6, 3))[labels] + 0.2 * rng.normal(size=(60, 6, 6, 3)), 0, 1)
    np.savez(folder / "colour.npz", x_train=images[:40].astype(np.float32), y_train=labels[:40],
             x_test=images[40:].astype(np.float32), y_test=labels[40:])  # fmt: skip
    recipe = {"dataset": "npz", "dataset_options": {}, "data_dir": folder / "colour.npz", "norm": "L2", "eps": 0.5,
              "epochs": 2}  # fmt: skip
    return [train(tiny(**recipe, smoother=smoother), folder / smoother) for smoother in ("none", "swa")]


@pytest.mark.parametrize("name", QUICK)
def test_every_analysis_draws_settings_side_by_side(name, plain_run, second_seed, smoothed_run, contents):
    runs = [plain_run, second_seed, smoothed_run]
    files, state = [contents(run.path) for run in runs], torch.random.get_rng_state()
    found = study(name, runs)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [contents(run.path) for run in runs] == files
    assert found.figure.axes
    for table in found.tables.values():
        assert table
        assert all(row.keys() == table[0].keys() for row in table)
    words = " ".join(str(value) for table in found.tables.values() for row in table for value in row.values())
    assert "at + kd-std-adv + swa" in words


@pytest.mark.parametrize("name", QUICK)
def test_every_analysis_works_on_colour_images_in_l2(name, colour_runs):
    found = study(name, colour_runs, width="double")
    found.figure.draw_without_rendering()
    assert found.figure.get_figwidth() == 6.9


@pytest.mark.parametrize("name", ON_MODELS)
def test_the_seed_decides_everything(name, plain_run, second_seed):
    runs = [plain_run, second_seed] if name == "transfer" else [plain_run]
    torch.manual_seed(1)
    once = study(name, runs).tables
    torch.manual_seed(2)
    assert study(name, runs).tables == once
    assert study(name, runs, seed=3).tables != once


@pytest.mark.parametrize("name", ["local-linearity", "weight-flatness", "tsne"])
def test_what_a_run_shows_does_not_depend_on_its_neighbours(name, plain_run, smoothed_run):
    alone, beside = (study(name, runs).tables for runs in ([plain_run], [smoothed_run, plain_run]))
    for table, wanted in alone.items():
        found = [row for row in beside[table] if row["setting"] == "at (epochs=4)"]
        assert found == [{**row, "setting": "at (epochs=4)"} for row in wanted]


@pytest.mark.parametrize("name", ON_MODELS)
def test_runs_of_different_data_are_refused(name, plain_run, colour_runs):
    with pytest.raises(InputError, match=r"of different data|Analyse them apart"):
        study(name, [plain_run, colour_runs[0]])


def test_runs_for_different_threats_are_refused_where_one_attack_measures_all(tiny, plain_run, tmp_path):
    other = train(tiny(eps=0.2, epochs=1), tmp_path / "other")
    with pytest.raises(InputError, match=r"Linf, eps 0\.1.*Linf, eps 0\.2.*Analyse them apart"):
        study("weight-flatness", [plain_run, other])


def test_an_unfinished_run_has_no_final_checkpoint_but_a_best(stopped_run):
    _, path = stopped_run()
    with pytest.raises(InputError, match=r"--resume.*--checkpoint best"):
        study("confidence", [Run(path)])
    assert rows("attack-gallery", [Run(path)], checkpoint="best")
    assert rows("curves", [Run(path)])


# curves


def test_curves_are_means_over_seeds(plain_run, second_seed):
    table = rows("curves", [plain_run, second_seed])
    pairs = [(one["test_ra"], two["test_ra"]) for one, two in zip(plain_run.history, second_seed.history, strict=True)]
    assert [row["ra"] for row in table] == [pytest.approx(np.mean(pair)) for pair in pairs]
    assert [row["ra_sd"] for row in table] == [pytest.approx(np.std(pair, ddof=1)) for pair in pairs]
    assert {row["n"] for row in table} == {2}


def test_errors_are_what_is_missing_to_a_hundred(plain_run):
    accuracy, error = rows("curves", [plain_run]), rows("curves", [plain_run], measure="error")
    assert [100 - row["sa"] for row in accuracy] == [row["sa"] for row in error]


def test_the_average_counts_from_when_there_is_one(smoothed_run):
    history = {row["epoch"]: row for row in smoothed_run.history if row["test_ra"] is not None}
    reported = {row["epoch"]: row["ra"] for row in rows("curves", [smoothed_run])}
    assert reported == {
        epoch: row["test_ra"] if row["smoothed_test_ra"] is None else row["smoothed_test_ra"]
        for epoch, row in history.items()
    }
    raw = {row["epoch"]: row["ra"] for row in rows("curves", [smoothed_run], weights="raw")}
    assert raw == {epoch: row["test_ra"] for epoch, row in history.items()}


def test_curves_fall_back_to_the_validation_set(tiny, plain_run, tmp_path):
    blind = train(tiny(test_every=0, epochs=2), tmp_path / "blind")
    assert {row["part"] for row in rows("curves", [plain_run, blind])} == {"val"}


# logits


def test_targets_made_by_hand_have_their_closed_forms(plain_run):
    table = {(row["source"], row["classes"]): row for row in rows("logits", [plain_run], alpha=0.2, softening=2)}
    assert table["label smoothing (0.2)", "correct"]["mean"] == pytest.approx(0.8 + 0.02)
    assert table["label smoothing (0.2)", "others"]["p95"] == pytest.approx(0.02)
    correct, others = np.exp(0.99 / 2), np.exp(0.01 / 9 / 2)
    assert table["Tf-KD (T = 2)", "correct"]["mean"] == pytest.approx(correct / (correct + 9 * others))
    assert table["at", "others"]["n"] == 9 * table["at", "correct"]["n"]
    assert table["at", "correct"]["mean"] + 9 * table["at", "others"]["mean"] == pytest.approx(1)


def test_the_teachers_of_a_run_are_there(smoothed_run):
    table = {(row["source"], row["classes"]): row for row in rows("logits", [smoothed_run], images="clean")}
    model = load_model(smoothed_run.path / "teachers" / "at" / "checkpoints" / "best.pt")
    warm = {(row["source"], row["classes"]): row for row in
            rows("logits", [smoothed_run], images="clean", temperature=100)}  # fmt: skip
    assert ("standard teacher", "correct") in table
    assert warm["robust teacher", "correct"]["mean"] < table["robust teacher", "correct"]["mean"]
    images, labels = load_data(smoothed_run.path).test
    everything = rows("logits", [smoothed_run], images="clean", n_examples=700)
    with torch.no_grad():
        expected = model(as_float(images)).softmax(1).gather(1, labels[:, None]).mean()
    [row] = [row for row in everything if (row["source"], row["classes"]) == ("robust teacher", "correct")]
    assert row["mean"] == pytest.approx(float(expected), abs=1e-5)


# t-SNE


def test_features_are_what_the_last_linear_layer_gets():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    images = torch.rand(7, 1, 2, 2)
    assert torch.equal(features_of(model, images), model[:3](images))
    assert not model[3]._forward_pre_hooks
    headless = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten()).eval()
    assert torch.equal(features_of(headless, images), headless(images))


def test_each_image_is_there_clean_and_perturbed(plain_run):
    points = study("tsne", [plain_run], classes=[3, 4], n_examples=20).tables["points"]
    kinds = [(row["images"], row["class"]) for row in points]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        [("clean", 3), ("clean", 4), ("perturbed", 3), ("perturbed", 4)], 10
    )


def test_a_class_that_is_not_there_is_refused(plain_run):
    with pytest.raises(InputError, match="no test image of class 12"):
        study("tsne", [plain_run], classes=[0, 12])


# input landscape


def test_the_centre_of_the_landscape_is_the_clean_loss(plain_run):
    table = rows("input-landscape", [plain_run], n_examples=2, points=7)
    model, (images, labels) = load_model(plain_run.path), load_data(plain_run.path).test
    with torch.no_grad():
        losses = F.cross_entropy(model(as_float(images)), labels, reduction="none")
    for row in table:
        if row["x"] == row["y"] == 0:
            of_class = losses[labels == row["class"]]
            assert (of_class - row["loss"]).abs().min() < 1e-5


def test_the_plane_is_spanned_by_the_gradients_sign_and_by_signs():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval().requires_grad_(False)
    image, label, offsets = torch.rand(1, 2, 2), torch.tensor(1), torch.tensor([-0.5, 0.0, 0.5])
    r1, r2 = directions_of(model, image, label)
    away = (model[1].weight[0] - model[1].weight[1]).sign().view(1, 2, 2)
    assert torch.equal(r1, away)
    assert set(r2.unique().tolist()) <= {-1.0, 1.0}
    losses = landscape(model, image, label, r1, r2, offsets)
    assert losses[1, 1] == pytest.approx(float(F.cross_entropy(model(image[None]), label[None])), abs=1e-6)
    moved_image = image + 0.5 * r1 - 0.5 * r2
    assert losses[0, 2] == pytest.approx(float(F.cross_entropy(model(moved_image[None]), label[None])), abs=1e-6)
    assert losses[1, 2] > losses[1, 1] > losses[1, 0]


def test_lengths_are_those_of_the_threats_norm(colour_runs):
    table = rows("input-landscape", [colour_runs[0]], n_examples=1, points=5, reach=0.1)
    [edge] = [row for row in table if (round(row["x"], 3), row["y"]) == (0.0, pytest.approx(0.1))]
    assert edge["length"] == pytest.approx(0.1 * (3 * 6 * 6) ** 0.5, rel=1e-5)


# weight flatness


def test_at_distance_0_is_the_robust_test_loss(plain_run):
    from at_smooth import PGD, Adversary
    from at_smooth.runtime import fenced_randomness

    options = {"n_examples": 700, "steps": 3, "distances": [0, 0.5], "directions": 1}
    at_0, _ = rows("weight-flatness", [plain_run], **options)
    model, (images, labels) = load_model(plain_run.path), load_data(plain_run.path).test
    adversary = Adversary(model, PGD(threat=plain_run.recipe.threat, steps=3, mode="eval"))
    with fenced_randomness(0, "attack"):
        batches = zip(as_float(images).split(250), labels.split(250), strict=True)
        attacked = torch.cat([adversary(*batch) for batch in batches])
    with torch.no_grad():
        assert at_0["loss"] == pytest.approx(float(F.cross_entropy(model(attacked), labels)), rel=1e-5)


def test_a_direction_is_as_long_as_the_distance():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    weights = [weight.detach() for weight in model.parameters()]
    other = moved(model, random_direction(weights, torch.Generator().manual_seed(0), per_filter=False), 2.5)
    changes = [new - old for new, old in zip(other.parameters(), weights, strict=True)]
    assert float(torch.stack([change.norm() for change in changes]).norm().detach()) == pytest.approx(2.5, rel=1e-5)


def test_filter_normalised_directions_have_the_filters_lengths():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).eval()
    weights = list(model.parameters())
    direction = random_direction(weights, torch.Generator().manual_seed(0), per_filter=True)
    assert torch.allclose(direction[0].flatten(1).norm(dim=1), weights[0].flatten(1).norm(dim=1))
    assert all(not change.any() for change in direction[1:])


def test_distances_are_lengths():
    with pytest.raises(OptionError, match="from 0 up"):
        create("analyses", "weight-flatness", {"distances": [-1, 2]})


# local linearity


def test_a_linear_model_is_as_linear_as_can_be():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    images, labels = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 0, 1, 1])
    noise = uniform_noise(images, Threat("Linf", 0.3))

    def difference(logits, labels):
        return logits.gather(1, 1 - labels[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]

    assert local_linearity(model, images, labels, noise, difference).tolist() == pytest.approx([1.0] * 5)


def test_eq_3_on_a_loss_whose_gradient_is_the_image():
    images, noise = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    cosine = local_linearity(nn.Flatten(), images, torch.tensor([0]), noise, lambda x, _: x.pow(2).sum(1) / 2)
    assert float(cosine) == pytest.approx(2**-0.5)


def test_tiny_gradients_have_directions_and_none_has_none():
    def tiny(x, _):
        return 1e-25 * x.sum(1)

    images = torch.rand(1, 1, 1, 2)
    assert float(local_linearity(nn.Flatten(), images, torch.tensor([0]), images, tiny)) == pytest.approx(1)
    flat = local_linearity(nn.Flatten(), images, torch.tensor([0]), images, lambda x, _: 0 * x.sum(1))
    assert flat.isnan().all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_noise_fills_the_ball(norm):
    noise = uniform_noise(torch.zeros(4000, 1, 1, 2), Threat(norm, 0.5)).flatten(1)
    lengths = noise.abs().amax(1) if norm == "Linf" else noise.norm(dim=1)
    assert lengths.max() <= 0.5
    assert float((lengths <= 0.25).float().mean()) == pytest.approx(0.25, abs=0.03)  # half the radius, in a plane


def test_snapshots_make_a_line_over_epochs(plain_run, tmp_path):
    kept = Run(shutil.copytree(plain_run.path, tmp_path / "kept"))
    for epoch in (1, 2):
        content = checkpoint.load(kept.checkpoint("best"))
        content["row"]["epoch"] = epoch
        checkpoint.save(kept.snapshot(epoch), content)
    assert [row["epoch"] for row in rows("local-linearity", [kept])] == [1, 2]
    assert [row["checkpoint"] for row in rows("local-linearity", [plain_run])] == ["best", "final"]
    other = rows("transfer", [kept], unseen=plain_run.path)
    assert [row["checkpoint"] for row in other] == ["epoch 1", "epoch 2"]


@pytest.fixture(scope="module")
def snapshots(tiny, tmp_path_factory):
    """A run that kept a snapshot each epoch, and an average from the third on."""
    recipe = tiny(smoother="swa", smoother_options={"start": 2}, keep_checkpoints=1, validate_every=4, test_every=0)
    return train(recipe, tmp_path_factory.mktemp("snapshots") / "run")


@pytest.mark.parametrize(("name", "options"), [("local-linearity", {}), ("transfer", {"unseen": True})])
def test_over_epochs_each_point_says_which_weights_it_is_of(snapshots, plain_run, name, options):
    options = {**options, "unseen": plain_run.path} if options else {}
    kinds = {weights: [(row["epoch"], row["weights"]) for row in rows(name, [snapshots], weights=weights, **options)]
             for weights in ("reported", "raw", "smoothed")}  # fmt: skip
    assert kinds["raw"] == [(epoch, "raw") for epoch in (1, 2, 3, 4)]
    assert kinds["smoothed"] == [(3, "smoothed"), (4, "smoothed")]
    assert kinds["reported"] == [(1, "raw"), (2, "raw"), *kinds["smoothed"]]
    axes = study(name, [snapshots], **options).figure.axes[0]
    hollow = [line for line in axes.lines if line.get_linestyle() == "None" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in hollow] == [[1, 2]]
    assert "raw weights, before there is an average" in axes.get_legend_handles_labels()[1]
    alone = study(name, [snapshots], weights="raw", **options).figure.axes[0]
    assert all(line.get_linestyle() != "None" for line in alone.lines)


def test_smoothed_curves_are_those_of_the_average(snapshots):
    values = {weights: {row["epoch"]: row["local_linearity"] for row in
                        rows("local-linearity", [snapshots], weights=weights, n_examples=200)}
              for weights in ("reported", "raw", "smoothed")}  # fmt: skip
    assert values["smoothed"] == {epoch: values["reported"][epoch] for epoch in (3, 4)}
    assert values["smoothed"][4] != values["raw"][4]
    assert values["reported"][1] == values["raw"][1]


def test_snapshots_without_the_weights_that_are_wanted_are_refused(tiny, tmp_path):
    run = train(tiny(keep_checkpoints=2, epochs=2), tmp_path / "run")
    with pytest.raises(InputError, match="kept no snapshot of smoothed weights"):
        study("local-linearity", [run], weights="smoothed")


# transfer


def test_one_run_needs_an_unseen_model(plain_run, second_seed):
    with pytest.raises(InputError, match="-O unseen=RUN"):
        study("transfer", [plain_run])
    table = rows("transfer", [plain_run], unseen=second_seed.path)
    assert [row["checkpoint"] for row in table] == ["best", "final"]


def test_the_matrix_is_that_of_the_transfer_command(plain_run, smoothed_run):
    from at_smooth import PGD, Part, Runtime
    from at_smooth.transfer import transfer

    table = {(row["source"], row["target"]): row["accuracy"] for row in
             rows("transfer", [plain_run, smoothed_run], n_examples=700)}  # fmt: skip
    images, labels = load_data(plain_run.path).test
    paths = {"at (epochs=4)": plain_run.path, "at + kd-std-adv + swa (epochs=8)": smoothed_run.path}
    models = {label: load_model(path) for label, path in paths.items()}
    spec = PGD(threat=plain_run.recipe.threat, steps=2, mode="eval")
    found = transfer(models, Part(as_float(images), labels), spec, runtime=Runtime(torch.device("cpu"))).results()
    assert table == {(source, target): row[target]["accuracy"] for source, row in found.items() for target in row}


# confidence


def test_calibration_errors_have_closed_forms():
    confident = torch.tensor([[0.9, 0.1]] * 10)
    half_right = torch.tensor([0, 1] * 5)
    assert expected_calibration_error(reliability(confident, half_right, 10)) == pytest.approx(0.4)
    assert expected_calibration_error(reliability(torch.eye(2), torch.tensor([0, 1]), 10)) == 0
    mixed = torch.cat([confident, torch.tensor([[0.55, 0.45]] * 10)])
    rows = reliability(mixed, torch.cat([half_right, torch.zeros(10, dtype=torch.long)]), 10)
    assert [(row["low"], row["n"]) for row in rows] == [(0.5, 10), (0.8, 10)]
    assert expected_calibration_error(rows) == pytest.approx((0.4 + 0.45) / 2)


def test_a_diagram_over_seeds_pools_them(plain_run, second_seed):
    found = study("confidence", [plain_run, second_seed]).tables
    assert sum(row["n"] for row in found["reliability"] if row["images"] == "clean") == 2 * 60
    assert len(found["ece"]) == 4


# attack gallery


def test_perturbations_keep_to_the_threat(plain_run, colour_runs):
    assert all(row["linf"] <= 0.1 + 1e-6 for row in rows("attack-gallery", [plain_run]))
    assert all(0 < row["l2"] <= 0.5 + 1e-5 for row in rows("attack-gallery", colour_runs))


def test_a_gallery_of_one_setting_shows_what_it_says_of_clean_images(plain_run):
    found = study("attack-gallery", [plain_run])
    [first, *_] = found.tables["attack-gallery"]
    texts = [axes.get_xlabel() for axes in found.figure.axes]
    assert f"{first['clean_prediction']} ({100 * first['clean_probability']:.0f} %)" in texts
