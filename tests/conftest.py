"""What several test files share."""

import itertools
import os
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from at_smooth import Data, Images, Observer, Part, Recipe, Threat, train, trust
from at_smooth.progress import Silent

TINY = {
    "dataset": "digits",
    "dataset_options": {"pool": 100},
    "model": "mlp",
    "model_options": {"width": 8, "depth": 1},
    "attack_options": {"steps": 2},
    "epochs": 4,
    "batch_size": 32,
    "eval_steps": 2,
    "test_every": 1,
    "device": "cpu",
}


#: No test, nor any process that it starts, sees or changes what the user trusts.
_STATE = tempfile.TemporaryDirectory(prefix="at-smooth-state-")
os.environ["AT_SMOOTH_STATE"] = _STATE.name


@pytest.fixture(autouse=True)
def state(tmp_path_factory, monkeypatch):
    """What is trusted, of the test's own: the file, and what the process has named."""
    path = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("AT_SMOOTH_STATE", str(path))
    monkeypatch.setattr(trust, "_named", set())
    return path


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny tensors gain nothing from threads, which wait for each other where cores are shared."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The teacher cache, of the test's own."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("AT_SMOOTH_CACHE", str(path))
    return path


@pytest.fixture(scope="session")
def tiny():
    """Makes a recipe that trains in a moment."""
    return lambda **changes: Recipe(**{**TINY, **changes})


@pytest.fixture(scope="session")
def plain_run(tiny, tmp_path_factory):
    """A finished run: AT and nothing else."""
    return train(tiny(), tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="session")
def smoothed_run(tiny, tmp_path_factory):
    """A finished run: KD_std&adv and SWA, with a test set that is looked at every other epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AT_SMOOTH_CACHE", str(tmp_path_factory.mktemp("cache")))
        recipe = tiny(regularizer="kd-std-adv", smoother="swa", epochs=8, test_every=2)
        return train(recipe, tmp_path_factory.mktemp("smoothed") / "run")


class HaltError(Exception):
    """What a training is stopped with."""


class Watch(Silent, Observer):
    """Remembers which trainings began; stops one of them after some epochs, or in the middle of the next."""

    def __init__(self, stop=None, after=0, midway=False):
        self.roles = []
        self._stop, self._after, self._midway = stop, after, midway

    @contextmanager
    def phase(self, role, recipe, path):
        self.roles.append(role)
        yield self if role == self._stop else Observer()

    def stepped(self, engine):
        if self._midway and engine.epoch == self._after:
            raise HaltError

    def epoch_ended(self, engine, row, improved):
        if not self._midway and engine.epoch == self._after:
            raise HaltError


@pytest.fixture
def watch():
    """Makes a :class:`Watch`."""
    return Watch


@pytest.fixture
def stopped_run(tiny, tmp_path):
    """Begins a run and stops it; gives its recipe and its path."""

    def begin(stop="student", after=2, midway=False, **changes):
        recipe, path = tiny(**changes), tmp_path / "stopped"
        with pytest.raises(HaltError):
            train(recipe, path, progress=Watch(stop, after, midway))
        return recipe, path

    return begin


@pytest.fixture(scope="session")
def outcome():
    """All that a finished run came to, apart from how long it took."""

    def read(run):
        history = [{**row, "seconds": None} for row in run.history]
        summary = {**run.summary, "seconds": None}
        weights = {
            (path.stem, group, name): tensor
            for path in sorted(run.path.glob("checkpoints/*.pt"))
            for group, tensors in torch.load(path, weights_only=True).items()
            if group in ("raw", "smoothed") and tensors
            for name, tensor in tensors.items()
        }
        return history, summary, weights

    return read


@pytest.fixture(scope="session")
def assert_same_outcome(outcome):
    """Two runs came to the same, bit for bit."""

    def compare(one, other):
        (history, summary, weights), (history2, summary2, weights2) = outcome(one), outcome(other)
        assert history == history2
        assert summary == summary2
        assert weights.keys() == weights2.keys()
        assert not [name for name in weights if not torch.equal(weights[name], weights2[name])]

    return compare


@pytest.fixture(scope="session")
def contents():
    """Every file under a folder, with its bytes."""
    return lambda folder: {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def toy_images():
    """Makes three classes of noisy 4x4 images."""

    def make(n=48, test=12, channels=1, seed=0):
        rng = torch.Generator().manual_seed(seed)
        labels = torch.arange(n + test) % 3
        centres = torch.rand(3, channels, 4, 4, generator=rng)
        images = (centres[labels] + 0.3 * torch.randn(n + test, channels, 4, 4, generator=rng)).clamp(0, 1)
        return Images(images[:n], labels[:n], images[n:], labels[n:], num_classes=3)

    return make


@pytest.fixture(scope="session")
def toy_data(toy_images):
    """The same, split."""
    return lambda **options: Data.split(toy_images(**options), validation=0.25)


@pytest.fixture(scope="session")
def linear_task():
    """Makes a linear model, images, threats, and says which images stand; the answer is known in closed form.

    Every seventh label is wrong. No image is so near a limit that an attack has to be exact.
    """

    def make(classes=2, n=40, seed=0):
        rng = torch.Generator().manual_seed(seed)
        weights = torch.randn(classes, 12, generator=rng)
        images = 0.3 + 0.4 * torch.rand(20 * n, 12, generator=rng)  # clipping to [0, 1] changes nothing
        logits = (images - 0.5) @ weights.T
        labels = logits.argmax(1)
        labels[::7] = (labels[::7] + 1) % classes
        rivals = torch.stack([torch.arange(classes)[torch.arange(classes) != label] for label in labels])
        margins = logits.gather(1, labels[:, None]) - logits.gather(1, rivals)
        differences = weights[labels][:, None] - weights[rivals]
        distances = {norm: (margins / differences.norm(p=dual, dim=2)).amin(1)
                     for norm, dual in (("Linf", 1), ("L2", 2))}  # fmt: skip
        threats = {norm: Threat(norm, round(far[far > 0].median().item(), 4)) for norm, far in distances.items()}
        clear = torch.stack(
            [(far / threats[norm].eps - 1).abs() > 0.05 for norm, far in distances.items()] + [labels >= 0]
        ).all(0)
        chosen = clear.nonzero().flatten()[:n]
        layer = torch.nn.Linear(12, classes)
        layer.weight.data, layer.bias.data = weights, -0.5 * weights.sum(1)
        return SimpleNamespace(
            model=torch.nn.Sequential(torch.nn.Flatten(), layer),
            part=Part(images[chosen].view(-1, 1, 3, 4), labels[chosen]),
            threats=threats,
            right=distances["L2"][chosen] > 0,
            standing={norm: far[chosen] > threats[norm].eps for norm, far in distances.items()},
        )

    return make


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Installs a distribution that is nothing but entry points and modules."""

    def install(name, entry_points, modules=None):
        site = tmp_path / f"site-{name}"
        metadata = site / f"{name.replace('-', '_')}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [
            line
            for kind, points in entry_points.items()
            for line in (f"[at_smooth.{kind}]", *(f"{plugin} = {target}" for plugin, target in points.items()))
        ]
        (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for module, source in (modules or {}).items():
            (site / f"{module}.py").write_text(source)
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(site)

    return install


@pytest.fixture
def npz(tmp_path):
    """Writes an .npz file of 40 training and 10 test images in two classes, with some arrays changed."""
    names = (f"arrays-{number}.npz" for number in itertools.count())

    def write(**changes):
        rng = np.random.default_rng(0)
        arrays = {
            "x_train": rng.integers(0, 256, (40, 6, 6), dtype=np.uint8),
            "y_train": np.arange(40) % 2,
            "x_test": rng.integers(0, 256, (10, 6, 6), dtype=np.uint8),
            "y_test": np.arange(10) % 2,
        }
        arrays.update(changes)
        path = tmp_path / next(names)
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
        return path

    return write


@pytest.fixture(scope="session")
def command():
    """Starts the installed ``at-smooth``."""
    script = Path(sysconfig.get_path("scripts")) / "at-smooth"

    def start(*arguments, cwd=None):
        return subprocess.Popen(
            [str(script), *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "COLUMNS": "120"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def repository():
    """The root of the source tree."""
    return Path(__file__).parents[1]
