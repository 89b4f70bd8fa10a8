"""Facts about models, in one place: where checkpoints are, how they are read, where the blocks and their matrices are.

`resolve` finds a model's folder, `io` reads and writes safetensors shards one tensor at a time, `loading` builds
transformers models, `structure` lists the linear maps of the blocks, `names` knows which of them belong together.
No other package asks what architecture a model has.
"""
