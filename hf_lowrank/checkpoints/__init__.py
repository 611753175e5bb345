"""Reading dense and low-rank checkpoints, telling their families apart, and writing them: all or nothing."""
