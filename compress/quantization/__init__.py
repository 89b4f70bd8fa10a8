"""How a model becomes a quantized one: bits per matrix, the loop over the blocks, the modules that hold the result.

`target` says what of a model is quantized, `allocation` spends the bit budget, `matrix` rounds and measures one matrix,
`run` does it block by block for a folder that need not fit into memory, `api` for a model that is in memory, and
`modules` holds packed weights and computes with them.
"""
