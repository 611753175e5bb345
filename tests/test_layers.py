"""The options of layers: their order, costs, losses and validity."""
