"""The three most probable classes of image files, from the network of a finished run, as a table.

python recipes/predict.py holiday.jpg cat.png --run runs/resnet18-20260101-120000 --csv classes.csv
"""

from cifar_fastai.commands import predict, start

if __name__ == "__main__":
    start(predict)
