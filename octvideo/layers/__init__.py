"""Octave features and the layers that make them; needs nothing but PyTorch."""

import octvideo.layers.normalization  # noqa: F401  (teaches nn.SyncBatchNorm octave features)
