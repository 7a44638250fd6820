"""The factories of the library; importing this gives fastai's Learner and DataLoaders their plot methods."""

from cifar_fastai.data.augment import AlternatingFlip, CutOut, RandomCrop, RandomFlip, RandomRotate
from cifar_fastai.data.images import ImageSet, load_images
from cifar_fastai.data.loaders import cifar_block, cifar_dls, test_dl
from cifar_fastai.evaluation import learner_methods  # noqa: F401  (installs the methods)
from cifar_fastai.evaluation.gradcam import Heatmaps, cam_layers, gradcam
from cifar_fastai.evaluation.image_files import predict_files
from cifar_fastai.evaluation.predictions import Predictions, predict
from cifar_fastai.models import create_model, custom_resnet, resnet18, resnet34
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.range_test import range_test
