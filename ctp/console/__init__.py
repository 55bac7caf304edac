"""What a person sees: plans, progress, status, explanations and summaries, as text.

arguments  types of command-line arguments
preview    --plan
status     --status
explain    --explain
board      the state of a run, made from its events
progress   one line an event
live       the view of a run on a terminal
heartbeat  the record that a running driver keeps in the store
pages      where the pages of MLflow and Ray are
summary    the end of a run
"""
