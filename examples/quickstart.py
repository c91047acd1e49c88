"""Train the embedded digits with the paper's method, then use the model.

Run it with ``python quickstart.py [RUN_DIRECTORY]``; it takes one to two minutes on two cores.
"""

import sys

import torch

import at_smooth
from at_smooth import Recipe


def main(out: str) -> None:
    recipe = Recipe(dataset="digits", regularizer="kd-std-adv", smoother="swa")
    run = at_smooth.train(recipe, out=out)

    for weights in ("raw", "smoothed"):
        figures = run.summary[weights]
        for moment in ("best", "final"):
            row = figures[moment]
            print(f"{weights:>8}, {moment:>5} epoch: RA {row['test_ra']:.2f} %, SA {row['test_sa']:.2f} %")

    model = at_smooth.load_model(run.path)  # in eval mode, on the CPU; normalisation is inside
    images, labels = at_smooth.load_data(run.path).test  # uint8, (N, C, H, W)
    with torch.no_grad():
        predicted = model(images.float() / 255).argmax(1)
    print(f"loaded model: {100 * (predicted == labels).float().mean():.2f} % of {len(labels)} test images")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
