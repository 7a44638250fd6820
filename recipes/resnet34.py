"""ResNet34 on CIFAR-10: as resnet18.py, with the deeper network.

    python recipes/resnet34.py

Its settings are ResNet18's. Its accuracy and time are not measured yet; an image costs 2.1 times ResNet18's
multiplications.
"""

from fastcore.meta import delegates

from cifar_fastai.cli import command
from cifar_fastai.config import Recipe, parameters
from cifar_fastai.recipe_pages import recipe_page

RECIPE = Recipe("resnet34", recipe_page("resnet18")["RECIPE"].defaults | dict(model="resnet34"))


@command(RECIPE.settings)
@delegates(parameters)
def main(**given):
    "Train ResNet34 on CIFAR-10; the run's folder holds its numbers, weights, pictures and page."
    from cifar_fastai.runs.train import train

    return train(RECIPE, given)


if __name__ == "__main__":
    main()
