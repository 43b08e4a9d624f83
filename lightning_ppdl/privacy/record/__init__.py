"""Record-level privacy: per-example gradients, their clipping, Poisson samples, and DP-SGD as a mechanism."""
