"""Side-branches: the adapter's vectors as inputs of the graph, and the projections that all layers share."""
