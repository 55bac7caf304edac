"""MLflow, written from the store: one experiment per grid, one run per cell.

tracker     one run of a grid, as its driver writes it
writer      repeats what fails, and notes what MLflow refuses
sync        brings an experiment up to date with the store
background  a thread that writes events
cell_runs   what is written into a cell's run
experiment  the experiment of a grid, one run per cell
database    MLflow's SQLite file
entries     tags, params and metrics of runs, without MLflow
"""
