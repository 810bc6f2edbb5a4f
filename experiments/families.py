"""Families of convolutional networks in timm, torchvision, segmentation-models-pytorch and MONAI, and their inputs."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import monai.networks.nets
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision.models as torchvision_models
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from octvideo.models.cost import count_parameters

MONAI_NETS: Any = monai.networks.nets  # has more names than it exports
LIBRARIES = ("timm", "torchvision", "smp", "monai")
IMAGES = ((64, 64), (96, 96), (128, 128), (224, 224))
CLIPS = ((8, 64, 64), (16, 112, 112), (16, 224, 224))
VOLUMES = ((32, 32, 32), (64, 64, 64), (96, 96, 96))
UNETS: dict[str, Any] = {"channels": (16, 32, 64, 128), "strides": (2, 2, 2)}
LEVELS: dict[str, Any] = {"channels": (32, 64, 64), "attention_levels": (False, False, True), "num_res_blocks": 1}
SPADE: dict[str, Any] = {"label_nc": 3, **LEVELS}
IN_SHAPE: dict[str, Any] = {"in_shape": (1, 64, 64, 64), **UNETS}
KERNELS: dict[str, Any] = {"kernel_size": (3,) * 4, "strides": (1, 2, 2, 2), "upsample_kernel_size": (2,) * 3}


# Arguments of MONAI's classes, beside those of COMMON that they take; "-2d" and the like name variants of a class.
COMMON: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "n_input_channels": 1, "out_channels": 2}
COMMON |= {"num_classes": 2, "pretrained": False, "progress": False, "patch_size": 16}
COMMON |= dict.fromkeys(("image_size", "img_size", "input_image_size"), VOLUMES[1])
MONAI: Mapping[str, dict[str, Any]] = {
    "AHNet": {"psp_block_num": 2},
    "AHNet-2d": {"spatial_dims": 2},
    "AttentionUnet": UNETS,
    "AutoEncoder": {**UNETS, "strides": (2, 2, 2, 2)},
    "AutoencoderKL": LEVELS,
    "AutoencoderKL-transpose": {**LEVELS, "use_convtranspose": True},
    "BasicUNet-pixelshuffle": {"upsample": "pixelshuffle"},
    "Classifier": {"classes": 2, **IN_SHAPE},
    "ControlNet": {**LEVELS, "num_head_channels": 8, "conditioning_embedding_num_channels": (16, 32)},
    "Critic": IN_SHAPE,
    "DiNTS": {"dints_space": lambda: MONAI_NETS.TopologyInstance(channel_mul=0.5)},
    "DiffusionModelUNet": {**LEVELS, "num_head_channels": 8},
    "Discriminator": IN_SHAPE,
    "DynUNet": KERNELS,
    "DynUNet-deep": {**KERNELS, "deep_supervision": True, "res_block": True},
    "EfficientNetBN": {"model_name": "efficientnet-b0"},
    "EfficientNetBN-2d": {"model_name": "efficientnet-b0", "spatial_dims": 2},
    "EfficientNetBNFeatures": {"model_name": "efficientnet-b0"},
    "FlexibleUNet": {"backbone": "resnet18"},
    "FlexibleUNet-2d": {"backbone": "efficientnet-b0", "spatial_dims": 2},
    "Generator": {"latent_shape": (8,), "start_shape": (32, 8, 8, 8), "channels": (32, 16, 1), "strides": (2, 2, 1)},
    "GlobalNet": {"num_channel_initial": 16, "depth": 3},
    "HoVerNet": {"in_channels": 3},
    "LocalNet": {"num_channel_initial": 16, "extract_levels": (0, 1, 2)},
    "MILModel": {"backbone": "resnet18"},
    "MultiScalePatchDiscriminator": {"spatial_dims": 2, "num_d": 2, "num_layers_d": 2, "channels": 16},
    "PatchDiscriminator": {"channels": 16},
    "RegUNet": {"num_channel_initial": 16, "depth": 3},
    "Regressor": {"out_shape": (2,), **IN_SHAPE},
    "ResNet": {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [64, 128, 256, 512]},
    "ResNetFeatures": {"model_name": "resnet10"},
    "SENet": {"block": "se_bottleneck", "layers": (1, 1, 1, 1), "groups": 1, "reduction": 16},
    "SPADEAutoencoderKL": SPADE,
    "SPADEDiffusionModelUNet": {**SPADE, "num_head_channels": 8},
    "SPADENet": {"label_nc": 3, "input_shape": (64, 64, 64), "channels": [16, 32, 64], "z_dim": 16},
    "SegResNet-deconv": {"upsample_mode": "deconv"},
    "SwinUNETR": {"patch_size": 2},
    "SwinUNETR-2d": {"patch_size": 2, "spatial_dims": 2},
    "TorchVisionFCModel": {"in_channels": None},
    "UNet": {**UNETS, "num_res_units": 2},
    "UNet-2d": {**UNETS, "spatial_dims": 2},
    "VQVAE": {"channels": (32, 64), "num_res_channels": (32, 64), "num_res_layers": 1}
    | {"downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2},
    "VarAutoEncoder": {**IN_SHAPE, "strides": (2, 2, 2, 2), "latent_size": 16},
}
FIXED = {"GlobalNet", "SPADENet", "SegResNetVAE", "UNETR", "ViT", "ViTAutoEnc", "MaskedAutoEncoderViT"}  # take one size
# Blocks, searches, variants of others, networks that need packages beside MONAI, and those without a convolution.
NO_FAMILY = re.compile(
    r"Bert|FullyConnected|^(DecoderOnlyTransformer|MultiModal|Transchex|NetAdapter|NaViT|HighResBlock|RegressionHead)$|"
    r"^(ResNet(Block|Bottleneck|Encoder)|EfficientNet(Encoder)?|Topology\w+|Pooler|PatchMerging\w*|Quicknat)$|"
    r"^(DenseNet\d+|SENet154|SERes[Nn]e[Xx]?t\d+|VoxelMorphUNet|HyenaNDUNETR)$"
)


class Family(NamedTuple):
    """Networks of a library that are variants of each other."""

    library: str
    name: str
    members: tuple[str, ...]


def families() -> Iterator[Family]:
    """All families of the four libraries, in an order that stays."""
    named = [(module, name) for module in timm.list_modules() for name in timm.list_models(module=module)]
    yield from _grouped("timm", [(file, name) for file, name in named if not name.startswith("test_")])
    names = [name for name in torchvision_models.list_models() if not name.startswith("quantized_")]
    yield from _grouped("torchvision", [(_torchvision_file(name), name) for name in names])
    for name in smp.MODEL_ARCHITECTURES_MAPPING:
        yield Family("smp", name, (f"{name}-{'tu-vit_tiny_patch16_224' if name == 'dpt' else 'resnet18'}",))
    encoders = [(value["encoder"].__name__, name) for name, value in smp.encoders.encoders.items()]
    for _, family, members in _grouped("smp", encoders):
        yield Family("smp", f"unet {family}", tuple(f"unet-{name}" for name in members))
    kinds = [kind for kind in vars(MONAI_NETS).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    plain = {kind.__name__ for kind in kinds if not NO_FAMILY.search(kind.__name__)}
    for name in sorted(plain | MONAI.keys(), key=str.lower):
        yield Family("monai", name, (name,))


def _grouped(library: str, names: Iterable[tuple[str, str]]) -> Iterator[Family]:
    """Families of (file, name): those of a file whose names begin with the same letters."""
    groups: dict[str, list[str]] = {}
    for file, name in names:
        prefix = re.match(r"(tf_|timm-(tf_)?)?[a-zA-Z]+", name)
        groups.setdefault(f"{file}: {prefix[0] if prefix else name}", []).append(name)
    for family, members in groups.items():
        yield Family(library, family, tuple(members))


def _torchvision_file(name: str) -> str:
    return str(torchvision_models.get_model_builder(name).__module__).removeprefix("torchvision.models.")


def build(library: str, name: str) -> nn.Module:
    """A network with random weights."""
    network: Any
    options: dict[str, Any]
    if library == "timm":
        network = timm.create_model(name)
    elif library == "torchvision":
        builder = torchvision_models.get_model_builder(name)
        options = {"weights": None, "weights_backbone": None, "aux_loss": "segmentation" in builder.__module__}
        options = {key: value for key, value in options.items() if key in inspect.signature(builder).parameters}
        options |= {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # takes long
        network = builder(**options)
        if is_detector(network) and not network.transform.fixed_size:
            network.transform.min_size, network.transform.max_size = (128,), 320
    elif library == "smp":
        architecture, _, encoder = name.partition("-")
        network = smp.create_model(architecture, encoder, encoder_weights=None)
    elif name == "VISTA3D":
        network = MONAI_NETS.vista3d132(16)
    else:
        kind: Any = getattr(MONAI_NETS, name.partition("-")[0])
        options = {key: value for key, value in COMMON.items() if key in inspect.signature(kind).parameters}
        network = kind(**options | {key: x() if callable(x) else x for key, x in MONAI.get(name, {}).items()})
    return cast(nn.Module, network)


def smallest(family: Family) -> str:
    """The member with the fewest parameters."""
    return family.members[0] if len(family.members) == 1 else min(family.members, key=partial(_size, family.library))


def _size(library: str, name: str) -> float:
    """Parameters of a network; infinite where it cannot be built without data."""
    if library == "torchvision":
        return float(min(weights.meta["num_params"] for weights in torchvision_models.get_model_weights(name)))
    try:
        with torch.device("meta"):
            return count_parameters(build(library, name))
    except RuntimeError:
        return math.inf


def input_of(library: str, name: str, network: Any) -> tuple[int, Sequence[tuple[int, ...]]]:
    """Channels of a network's input, and extents, small ones first, of which the last is its own."""
    if library == "timm":
        channels, *own = network.default_cfg["input_size"]
        return channels, (*(size for size in IMAGES if size < tuple(own)), tuple(own))
    if library == "torchvision":
        sizes = {"video": CLIPS, "detection": ((128, 128), (320, 320)), "optical_flow": ((128, 128), (256, 256))}
        own = (*IMAGES, (299, 299)) if name == "inception_v3" else IMAGES
        return 3, sizes.get(_torchvision_file(name).partition(".")[0], own)
    if library == "smp":
        return 3, IMAGES
    if name in ("MILModel", "Generator"):  # bags of four images; latents
        return (4, ((3, 64, 64),)) if name == "MILModel" else (8, ((1, 1, 1),))
    if name in FIXED or "in_shape" in MONAI.get(name, {}):
        return 1, (VOLUMES[1],)
    if name in ("HoVerNet", "TorchVisionFCModel"):
        return 3, IMAGES[3:] if name == "TorchVisionFCModel" else ((256, 256),)
    return 1, (*IMAGES, (256, 256)) if MONAI.get(name, {}).get("spatial_dims") == 2 else VOLUMES


def is_detector(network: nn.Module) -> bool:
    """Whether it is one of torchvision's detection."""
    return hasattr(network, "transform") and hasattr(network, "backbone")


def arguments(name: str, network: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """What a network is called with, made of images, clips or volumes."""
    if is_detector(network):
        if not network.training:
            return ([*x],)
        target = {"boxes": torch.tensor([[8.0, 8.0, 72.0, 72.0]]), "labels": torch.ones(1, dtype=torch.long)}
        target["masks"] = torch.ones(1, *x.shape[2:], dtype=torch.uint8)
        target["keypoints"] = torch.tensor([24.0, 24.0, 1.0]).repeat(1, 17, 1)
        return [*x], [target] * len(x)
    times = torch.arange(len(x), device=x.device)
    labels = torch.cat([x, -x, x * 2], 1).softmax(1)
    match re.sub("[-_].*", "", name):
        case "raft":
            return x, x.flip(0), 2
        case "VoxelMorph":
            return x, x.flip(0)
        case "DiffusionModelUNet":
            return x, times
        case "ControlNet":
            return x, times, x.repeat(1, 1, *[2] * (x.dim() - 2))  # it is halved once
        case "SPADEDiffusionModelUNet":
            return x, times, labels
        case "SPADEAutoencoderKL":
            return x, labels
        case "SPADENet":
            return labels, x
        case "VISTA3D":
            return x[:1], None, None, None, torch.tensor([[1], [2]])
    return (x,)


def share_of_convolutions(library: str, name: str, network: nn.Module) -> float:
    """The share of a network's multiply-adds that are its convolutions'; the network is on the meta device."""
    channels, sizes = input_of(library, name, network)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network.eval()(*arguments(name, network, torch.rand(1, channels, *sizes[-1])))
    return float(counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0) / counter.get_total_flops())
