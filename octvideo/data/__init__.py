"""From video files to clips: list files, decoding, sampling, data sets, the Lightning data module."""
