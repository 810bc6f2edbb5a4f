"""Networks: octavize any of them, build those of the zoo, load, fuse and measure them."""
