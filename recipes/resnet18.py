"""ResNet18 on CIFAR-10: 20 epochs of one cycle.

    python recipes/resnet18.py

On CIFAR-10 (JPEG copy) it reaches 91.24%, with flip TTA 91.73% (one seed, recipes/results), at 5 minutes an epoch on
two threads of an AMD EPYC in bf16; with flips by chance it was 91.12%, in fp32 on one without bf16, at 17 to 20
minutes. The optimizer was chosen in 3 epochs of 15,000 images, on 5,000 others of train, one seed each
(recipes/results/sweep.csv): SGD had 64.6 %, Muon 75.1, 77.2 and 74.8 % at lr 0.025, 0.05 and 0.1. The default is a
little below the best of these, for a longer run; it was not itself among them.
"""

from fastcore.meta import delegates

from cifar_fastai.cli import command
from cifar_fastai.config import Recipe, parameters

RECIPE = Recipe(
    "resnet18",
    dict(
        model="resnet18",
        epochs=20,
        bs=256,
        opt="muon",
        lr=0.04,
        pct_start=0.25,
        div=10.0,
        wd=5e-4,
        label_smoothing=0.1,
        padding=4,
        pad_mode="reflect",
        flip_by="epoch",
        cutout=8,
    ),
)


@command(RECIPE.settings)
@delegates(parameters)
def main(**given):
    "Train ResNet18 on CIFAR-10: data, learner, one cycle, evaluation, pictures; all of it lands in one folder."
    from cifar_fastai.runs.train import train

    return train(RECIPE, given)


if __name__ == "__main__":
    main()
