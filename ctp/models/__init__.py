"""Models and adapters: names, files, loading. Nothing here compresses or trains.

adapters: PEFT adapters made elsewhere
config: the facts about a model that planning needs, from its configuration
files: checks of a folder's JSON and safetensors headers
gguf: GGUF files as Hugging Face folders
hf: small helpers around transformers
load: a model and its tokenizer from a location
plain: whether a loaded model is what its configuration describes
sources: names of models, their revisions and locations
tiny: tiny random models by name (tiny_models.json has their configurations)
"""
