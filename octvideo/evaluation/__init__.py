"""Results to look at: predictions, reports, drawings and feature maps."""
