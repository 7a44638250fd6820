"""The custom ResNet of the one-cycle assignment: 24 epochs, found LR, peak at epoch 5, no annihilation.

    python recipes/custom_resnet.py

Measured with --epochs 3 on CIFAR-10 (JPEG copy), one seed: 76.17 %, with flip TTA 77.03 %, after 68 minutes on 2
threads of an AMD EPYC in fp32, and 23 for the range test before it. Its 24 epochs are not measured yet.
"""

from fastcore.meta import delegates

from cifar_fastai.cli import command
from cifar_fastai.config import Recipe, parameters

RECIPE = Recipe(
    "custom_resnet",
    dict(
        model="custom_resnet",
        epochs=24,
        bs=512,
        lr="find",
        lr_suggest="valley",
        opt="adam",
        wd=1e-4,
        wd_bn_bias="yes",
        pct_start=5 / 24,
        anneal="linear",
        div=10.0,
        div_final=10.0,
        padding=4,
        cutout=8,
    ),
)


@command(RECIPE.settings)
@delegates(parameters)
def main(**given):
    "Train the custom ResNet on CIFAR-10 with one cycle whose highest learning rate is found by a range test."
    from cifar_fastai.runs.train import train

    return train(RECIPE, given)


if __name__ == "__main__":
    main()
