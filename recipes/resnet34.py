"""ResNet34 on CIFAR-10: as resnet18.py, with the deeper network.

    python recipes/resnet34.py

Its settings are ResNet18's. Its accuracy and time are not measured yet; an image costs 2.1 times ResNet18's
multiplications.
"""

from cifar_fastai.commands import start, train

if __name__ == "__main__":
    start(train, "resnet34", __doc__)
