"""Small networks of the kinds that people have, each as its authors write it."""

from collections import OrderedDict
from functools import partial

import peft
import torch
import transformers
from monai.networks.nets import UNet
from timm.layers import GroupNormAct, StdConv2d
from timm.models import ConvNeXt, ResNetV2
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torchvision.models import ResNet, googlenet
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.resnet import BasicBlock


def convolution(channels_in, channels, size=3, stride=1):
    layers = (
        nn.Conv2d(channels_in, channels, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )
    return nn.Sequential(*layers)


class Classifier(nn.Sequential):
    def __init__(self, channels, *layers):
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


class ConvLSTM(nn.Module):
    """Frames (B, T, 3, H, W) to a map (B, 1, H, W), with the gates of both layers cut from one convolution each."""

    def __init__(self, channels=8):
        super().__init__()
        self.stem = convolution(3, channels)
        self.cells = nn.ModuleList(nn.Conv2d(2 * channels, 4 * channels, 3, padding=1) for _ in range(2))
        self.head = nn.Conv2d(channels, 1, 1)

    def forward(self, x):
        states = [None, None]
        for frame in x.unbind(1):
            frame = self.stem(frame)
            for layer, cell in enumerate(self.cells):
                hidden, memory = states[layer] or (torch.zeros_like(frame), torch.zeros_like(frame))
                gates = cell(torch.cat((frame, hidden), 1))
                i, f, o, g = gates.chunk(4, 1) if layer else gates.split(frame.size(1), dim=1)
                memory = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
                frame = torch.sigmoid(o) * torch.tanh(memory)
                states[layer] = frame, memory
        return self.head(frame)


class Shift(nn.Module):
    """Moves an eighth of the channels to the next frame and another to the one before, then convolves: TSM."""

    def __init__(self, layer, frames):
        super().__init__()
        self.layer, self.frames = layer, frames

    def forward(self, x):
        count, channels, height, width = x.size()
        x = x.view(count // self.frames, self.frames, channels, height, width)
        fold = channels // 8
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return self.layer(out.view(count, channels, height, width))


class TSM(nn.Module):
    """Clips (B, T, 3, H, W) by two stages of a ResNet of images, their logits averaged over time."""

    def __init__(self, frames=4):
        super().__init__()
        self.network = ResNet(BasicBlock, [1, 1, 1, 1])
        self.network.layer3 = self.network.layer4 = nn.Identity()
        self.network.fc = nn.Linear(128, 5)
        for block in (module for module in self.network.modules() if isinstance(module, BasicBlock)):
            block.conv1 = Shift(block.conv1, frames)

    def forward(self, x):
        return self.network(x.flatten(0, 1)).view(x.shape[0], x.shape[1], -1).mean(1)


class Recurrent(nn.Module):
    """A network for each frame of (B, T, 3, H, W), then an LSTM."""

    def __init__(self):
        super().__init__()
        self.frames = nn.Sequential(convolution(3, 8), convolution(8, 16, stride=2), convolution(16, 16))
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        batch, frames = x.shape[:2]
        features = self.frames(x.reshape(-1, *x.shape[2:])).view(batch, frames, 16, *[n // 2 for n in x.shape[3:]])
        return self.head(self.lstm(features.mean((3, 4)))[0][:, -1])


class CBAM(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, channels, 1))
        self.space = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        pools = nn.functional.adaptive_avg_pool2d(x, 1), nn.functional.adaptive_max_pool2d(x, 1)
        x = x * torch.sigmoid(self.mlp(pools[0]) + self.mlp(pools[1]))
        pooled = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], dim=1)
        return x * torch.sigmoid(self.space(pooled))


class CoordinateAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pools = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.both = convolution(channels, 8, 1)
        self.down, self.across = nn.Conv2d(8, channels, 1), nn.Conv2d(8, channels, 1)

    def forward(self, x):
        height, width = x.shape[2:]
        down, across = (pool(x) for pool in self.pools)
        y = self.both(torch.cat([down, across.permute(0, 1, 3, 2)], dim=2))
        down, across = torch.split(y, [height, width], dim=2)
        return x * self.across(across.permute(0, 1, 3, 2)).sigmoid() * self.down(down).sigmoid()


class ECA(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        y = nn.functional.adaptive_avg_pool2d(x, 1)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * y.sigmoid().expand_as(x)


class Levels(nn.Module):
    """A backbone of two feature maps for torchvision's SSD."""

    out_channels = (16, 32)

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(convolution(3, 8), convolution(8, 16, stride=2), convolution(16, 16, stride=2))
        self.second = convolution(16, 32, stride=2)

    def forward(self, x):
        x = self.first(x)
        return OrderedDict([("0", x), ("1", self.second(x))])


FEW = {"score_thresh": 0, "nms_thresh": 1, "detections_per_img": 5}  # always five boxes
UNCHANGED = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
SQUARE = {"min_size": 64, "max_size": 64, **UNCHANGED}


def ssd():
    anchors = DefaultBoxGenerator([[2], [2]], scales=[0.2, 0.5, 0.8])
    return SSD(Levels(), anchors, (64, 64), 3, **FEW, **UNCHANGED)


def pyramid():
    """A feature pyramid of a ResNet, and its anchors."""
    layers = {f"layer{level + 1}": str(level) for level in range(3)}
    pyramid = BackboneWithFPN(ResNet(BasicBlock, [1, 1, 1, 1]), layers, [64, 128, 256], 16)
    return pyramid, AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0),) * 4)


def retinanet():
    backbone, anchors = pyramid()
    return RetinaNet(backbone, 3, anchor_generator=anchors, **FEW, **SQUARE)


def faster_rcnn():
    backbone, anchors = pyramid()
    heads = {"box_head": TwoMLPHead(16 * 7 * 7, 32), "box_predictor": FastRCNNPredictor(32, 3)}
    few = {f"box_{name}": value for name, value in FEW.items()}
    return FasterRCNN(backbone, rpn_anchor_generator=anchors, rpn_nms_thresh=1, **heads, **few, **SQUARE)


def short_googlenet():
    """Without the blocks of branches that keep the number of channels, which add nothing but time."""
    network = googlenet(weights=None, num_classes=5, aux_logits=True, init_weights=False)
    network.inception4b = network.inception4c = network.inception5a = nn.Identity()
    return network


def hugging_face(name, **options):
    """An image classifier whose output is a dataclass with all feature maps."""
    config = getattr(transformers, f"{name}Config")(num_labels=5, output_hidden_states=True, **options)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def lora():
    network = Classifier(16, convolution(3, 16), convolution(16, 16), convolution(16, 16))
    return peft.get_peft_model(network, peft.LoraConfig(r=4, target_modules=["1.0", "2.0"], modules_to_save=["5"]))


def parametrized():
    layers = [convolution(3, 16), weight_norm(nn.Conv2d(16, 16, 3, padding=1)), nn.ReLU()]
    return Classifier(16, *layers, spectral_norm(nn.Conv2d(16, 16, 3, padding=1)), nn.ReLU())


def attentive():
    pairs = [(convolution(16, 16), attention) for attention in (CBAM(16), CoordinateAttention(16), ECA())]
    return Classifier(16, convolution(3, 16), *[layer for pair in pairs for layer in pair], convolution(16, 16))


STANDARDISED = {"conv_layer": StdConv2d, "norm_layer": partial(GroupNormAct, num_groups=4), "stem_chs": 16}
BASIC = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
CLIPS, IMAGES, LARGER = (2, 4, 3, 32, 32), (2, 3, 32, 32), (2, 3, 64, 64)
DETECTORS = {"ssd": ssd, "retinanet": retinanet, "faster_rcnn": faster_rcnn}
KINDS = {  # what builds a network, and the shape of its input
    "unet": (lambda: UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=1), (2, 1, 16, 16, 16)),
    "conv_lstm": (ConvLSTM, (2, 2, 3, 16, 16)),
    "tsm": (TSM, CLIPS),
    "lstm": (Recurrent, CLIPS),
    **{name: (build, LARGER) for name, build in DETECTORS.items()},
    "googlenet": (short_googlenet, LARGER),
    "hf_resnet": (lambda: hugging_face("ResNet", **BASIC), LARGER),
    "hf_convnext": (lambda: hugging_face("ConvNext", num_stages=2, hidden_sizes=[16, 32], depths=[1, 1]), LARGER),
    "attention": (attentive, IMAGES),
    "standardised": (lambda: ResNetV2([1, 1], (32, 64), num_classes=5, **STANDARDISED), LARGER),
    "parametrized": (parametrized, IMAGES),
    "lora": (lora, IMAGES),
    "convnext": (lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(16, 32, 32, 32), num_classes=5), LARGER),
}
