"""The learning-rate range test alone, of resnet18.py: the curve with its suggestions marked, and the numbers.

python recipes/find_lr.py --out lr_find.png
"""

from fastcore.meta import delegates

from cifar_fastai.cli import command
from cifar_fastai.config import Recipe, parameters
from cifar_fastai.recipe_pages import recipe_page

RECIPE = Recipe("find_lr", recipe_page("resnet18")["RECIPE"].defaults | dict(lr="find"))


@command(RECIPE.settings)
@delegates(parameters)
def main(
    start_lr: float = 1e-5,  # The range's lowest learning rate
    end_lr: float = 10.0,  # The range's highest
    num_it: int = 100,  # Steps
    **given,
):
    "Draw the loss while the learning rate grows, on train images alone, into --out (default: lr_find.png)."
    from cifar_fastai.runs.train import find_lr

    return find_lr(RECIPE, given, start_lr, end_lr, num_it)


if __name__ == "__main__":
    main()
