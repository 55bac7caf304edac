"""What there is to do: from a grid file to a graph of cells with keys, states in the store, costs and resources."""
