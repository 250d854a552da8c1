"""Views, one file each: one picture -> the square views that encoders see, and their tokens -> one run."""
