"""Adversarial training of one's own ``nn.Module`` on one's own tensors, without a recipe or a run directory.

Run it with ``python train_your_own_model.py``; it takes under a minute on two cores.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import at_smooth
from at_smooth import AttackSpec, Data, Engine, Images, Settings, Threat


class MyClassifier(nn.Module):
    """Any module will do that maps images (N, C, H, W) in [0, 1] to logits (N, K)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32 * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        normalised = (images - 0.3) / 0.37  # inside the model, so that eps stays in pixels
        return self.head(self.features(normalised).flatten(1))


def my_images() -> Images:
    """uint8, or float in [0, 1]; labels are int64 from 0."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, dtype=torch.int64)
    return Images(train=x[:400], train_labels=y[:400], test=x[1000:], test_labels=y[1000:], num_classes=10)


def main() -> None:
    torch.manual_seed(0)  # the initial weights are ours; all later randomness follows from Settings.seed
    engine = Engine(
        MyClassifier(),
        Data.split(my_images(), seed=0, validation=0.1),
        method=at_smooth.create("methods", "at"),
        attack=AttackSpec.parse("pgd", Threat("Linf", 0.2), {"steps": 5}),
        regularizer=at_smooth.create("regularizers", "kd-std-adv", {"temperature": 2.0}),
        smoother=at_smooth.create("smoothers", "swa", {"start": 10}),
        settings=Settings(epochs=30, batch_size=32, lr=0.05, test_every=10),
    )
    engine.fit()  # trains the two self-teachers first, on the same data

    smoothed = engine.smoother.smoothed()
    assert smoothed is not None
    for name, model in (("raw", engine.model), ("smoothed", smoothed)):
        sa, ra = engine.accuracies(model, engine.data.test)
        print(f"{name:>8}: SA {sa:.2f} %, RA {ra:.2f} %")
    torch.save(smoothed.state_dict(), "my_classifier.pt")


if __name__ == "__main__":
    main()
