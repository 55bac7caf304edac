"""What there is to do: from a grid file to a graph of cells with keys, states in the store, costs and resources.

gridtext   the text of a grid file, with what it extends, overrides and definitions
gridfile   the file validated: studies and their axes
plugins    methods of users
pins       models, texts and adapters pinned to exact revisions
plan       from a grid to its graph of cells
graph      the graph, and the heaviest paths through it
fits       whether a cell's settings fit its model
select     the part of a plan that --where selects
states     whether each cell is done, and why not
cost       operations and bytes of a cell, by a stated model
history    estimates from similar cells in the store
resources  what a trial takes of a machine, and what machines there are
"""
