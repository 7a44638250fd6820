"""ResNet18 on CIFAR-10: 20 epochs of one cycle.

    python recipes/resnet18.py

Its 20 epochs are not measured yet. The optimizer was chosen on 5,000 images cut from train, in 3 epochs of 15,000 others,
one seed each (recipes/results/sweep.csv): 77.2 % with Muon, 64.6 % with SGD at 0.15 and batches of 128.
"""

from fastcore.meta import delegates

from cifar_fastai.cli import command
from cifar_fastai.config import Recipe, parameters

RECIPE = Recipe("resnet18", dict(
    model="resnet18", epochs=20, bs=256, opt="muon", lr=0.04, pct_start=0.25, div=10.0, wd=5e-4, label_smoothing=0.1,
    padding=4, pad_mode="reflect", cutout=8,
))  # fmt: skip


@command(RECIPE.settings)
@delegates(parameters)
def main(**given):
    "Train ResNet18 on CIFAR-10: data, learner, one cycle, evaluation, pictures; all of it lands in one folder."
    from cifar_fastai.train import train

    return train(RECIPE, given)


if __name__ == "__main__":
    main()
