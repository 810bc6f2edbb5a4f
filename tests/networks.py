"""Networks that nobody here wrote, unmodified, in sizes that tests can afford."""

import timm
import torchvision.models as images
import torchvision.models.video as videos
from pytorchvideo.models.csn import create_csn
from pytorchvideo.models.r2plus1d import create_r2plus1d
from pytorchvideo.models.resnet import create_resnet
from pytorchvideo.models.slowfast import create_slowfast
from pytorchvideo.models.x3d import create_x3d
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

I3D_KERNELS = ((3, 1, 1), [(3, 1, 1), (1, 1, 1)], [(3, 1, 1), (1, 1, 1)], [(1, 1, 1), (3, 1, 1)])


class Pathways(nn.Module):
    """A SlowFast network of pytorchvideo's, fed with one clip."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, clip):
        return self.network([clip[:, :, ::4].clone(), clip.clone()])


def pytorchvideo_resnet(size, frames, **arguments):
    pool = (frames // 2 if arguments.get("stage1_pool") else frames, *(-(-n // 32) for n in size))
    return create_resnet(head_pool_kernel_size=pool, **arguments)


def x3d(depth, frames):
    """X3D; its head takes square clips."""
    return lambda size: create_x3d(depth_factor=depth, input_clip_length=frames, input_crop_size=size[0])


def slowfast(depth):
    def build(size):
        pools = tuple((frames, *(-(-n // 32) for n in size)) for frames in (2, 8))
        return Pathways(
            create_slowfast(model_depth=depth, slowfast_fusion_conv_kernel_size=(7, 1, 1), head_pool_kernel_sizes=pools)
        )

    return build


def head(size, frames):
    return (frames, *(-(-n // 32) for n in size))


# name: (builder for a (height, width), frames or None for images)
IMAGE_NETWORKS = {
    "resnet18": images.resnet18,
    "resnet50": images.resnet50,
    "resnet101": images.resnet101,
    "resnet152": images.resnet152,
    "resnext50_32x4d": images.resnext50_32x4d,
    "resnext101_32x4d": lambda: images.ResNet(images.resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4),
    "densenet121": images.densenet121,
    "mobilenet_v2": images.mobilenet_v2,
    "timm_resnet26": lambda: timm.create_model("resnet26"),
    "timm_resnet200": lambda: ResNet(Bottleneck, (3, 24, 36, 3)),
    "timm_seresnet50": lambda: timm.create_model("seresnet50"),
    "timm_mobilenetv1_100": lambda: timm.create_model("mobilenetv1_100"),
}
VIDEO_NETWORKS = {
    "r3d_18": (lambda size: videos.r3d_18(), 8),
    "mc3_18": (lambda size: videos.mc3_18(), 8),
    "r2plus1d_18": (lambda size: videos.r2plus1d_18(), 8),
    "s3d": (lambda size: videos.s3d(), 16),
    "c2d": (lambda size: pytorchvideo_resnet(size, 8, stage1_pool=nn.MaxPool3d), 8),
    "i3d": (
        lambda size: pytorchvideo_resnet(
            size, 8, stage1_pool=nn.MaxPool3d, stem_conv_kernel_size=(5, 7, 7), stage_conv_a_kernel_size=I3D_KERNELS
        ),
        8,
    ),
    "slow": (
        lambda size: pytorchvideo_resnet(
            size, 8, stage_conv_a_kernel_size=((1, 1, 1), (1, 1, 1), (3, 1, 1), (3, 1, 1))
        ),
        8,
    ),
    "slowfast_r50": (slowfast(50), 8),
    "slowfast_r101": (slowfast(101), 8),
    "x3d_xs": (x3d(2.2, 4), 4),
    "x3d_s": (x3d(2.2, 13), 13),
    "x3d_m": (x3d(2.2, 16), 16),
    "x3d_l": (x3d(5.0, 16), 16),
    "csn_r101": (
        lambda size: create_csn(model_depth=101, stem_pool=nn.MaxPool3d, head_pool_kernel_size=head(size, 1)),
        8,
    ),
    "r2plus1d_r50": (lambda size: create_r2plus1d(head_pool_kernel_size=head(size, 2)), 8),
}

# Networks of other libraries for experiments/networks.py, and the functions between their convolutions; True where
# features stay constant in space with circular padding, so that octaves must give the vanilla network's outputs.
OTHERS = {
    "timm/cs3darknet_focus_s": True,  # slices in space, chunks of channels
    "timm/dla46_c": True,  # sums of trees
    "timm/dpn48b": True,  # slices of channels
    "timm/edgenext_xx_small": False,  # splits, cross-covariance attention
    "timm/ese_vovnet19b_slim_dw": True,  # gates
    "timm/ghostnet_050": True,  # slices of channels
    "timm/hrnet_w18_small": True,  # sums over four resolutions
    "timm/inception_next_atto": True,  # splits before kernels of one row and one column
    "timm/lambda_resnet26t": False,  # softmax, matrix products, Conv3d over what is no clip
    "timm/mixnet_s": True,  # splits, kernels of 3 to 11
    "timm/mobilevit_xxs": True,  # patches by reshape and transpose
    "timm/regnetz_005": True,  # squeeze and excitation
    "timm/repvgg_a0": True,  # branches that can be joined
    "timm/res2net50_14w_8s": False,  # splits and sums of the pieces
    "timm/resnest14d": False,  # split attention over groups
    "timm/resnetblur18": True,  # reflecting pads and a fixed filter
    "timm/resnetv2_50x1_bit": False,  # weight standardisation, group norm
    "timm/selecsls42": True,  # lists of features
    "timm/skresnet18": True,  # stack, sums over a new dimension
    "timm/test_byobnet": True,  # squeeze and excitation
    "timm/test_convnext": True,  # layer norm over channels, permute
    "timm/test_efficientnet_evos": True,  # variances of instances
    "timm/test_efficientnet_gn": True,  # group norm
    "timm/test_mambaout": True,  # channels last, splits
    "timm/test_nfnet": False,  # scaled weight standardisation
    "timm/tf_efficientnetv2_b0": False,  # pads of odd amounts
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn": True,  # a pyramid, region proposals, roi_align
    "torchvision/googlenet": True,  # auxiliary heads in training
    "torchvision/lraspp_mobilenet_v3_large": True,  # a segmentation network's dict
    "torchvision/raft_small": False,  # correlation of two images, grid_sample, a recurrent update
    "torchvision/shufflenet_v2_x0_5": True,  # chunk, channel shuffle
    "smp/deeplabv3plus-resnet18": False,  # dilations that are changed after construction
    "smp/fpn-resnet18": True,  # interpolation to a size, group norm
    "smp/unet-resnet18": True,  # skip connections
    "monai/AttentionUnet": False,  # gated skip connections
    "monai/BasicUNet": False,  # transposed convolutions, torch.jit.isinstance
    "monai/DynUNet": False,  # instance norm, transposed convolutions
    "monai/SegResNet": True,  # group norm, trilinear interpolation
    "monai/UNet": False,  # residual units, transposed convolutions
}
