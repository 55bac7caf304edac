"""Running a plan on Ray Tune: the walk over its graph, the cluster, repair of damaged artifacts.

run      runs what is missing of a plan: MLflow, the display and Ray Tune around one walk
tune     the plan as one Ray Tune run
walk     which cells run together and when, independent of Ray
cluster  the Ray cluster that a grid runs on
repair   damaged artifacts during a run
options  how a run uses its machines
"""
