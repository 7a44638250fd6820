"""ResNet34 on CIFAR-10: as resnet18.py, with the deeper network.

    python recipes/resnet34.py

Its settings are ResNet18's. Its accuracy and time are not measured yet; an image costs 2.1 times ResNet18's
multiplications.
"""

from fastcore.meta import delegates

from cifar_fastai.cli import command
from cifar_fastai.config import Recipe, parameters

RECIPE = Recipe("resnet34", dict(
    model="resnet34", epochs=20, bs=256, opt="muon", lr=0.04, pct_start=0.25, div=10.0, wd=5e-4, label_smoothing=0.1,
    padding=4, pad_mode="reflect", cutout=8,
))  # fmt: skip


@command(RECIPE.settings)
@delegates(parameters)
def main(**given):
    "Train ResNet34 on CIFAR-10; the run's folder holds its numbers, weights, pictures and page."
    from cifar_fastai.train import train

    return train(RECIPE, given)


if __name__ == "__main__":
    main()
