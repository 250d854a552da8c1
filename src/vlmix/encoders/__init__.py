"""Vision encoders, one file each: pixels in 0..1 -> feature map."""
