"""Doing one cell: a job is made, the cell's method does it, and the result is published in the store.

execute    execute(cell): the job, the method, the checks, the manifest
jobs       CompressJob, LearnJob, EvaluateJob: what a method works with
compress   what each compression does
learn      what each recovery does
measure    what each measure does
loading    models, prompts and token windows, kept for the next cell that needs the same
payload    checks of what a method wrote
unchanged  checks that what a cell reads stays what its key names
open       models and exports by the key of a stored artifact
worker     one cell in a worker process
"""
