"""Running a plan on Ray Tune: the walk over its graph, the cluster, repair of damaged artifacts."""
