"""Containers of quantized models on disk. `native` is the package's own; byte by byte it is described in
`docs/formats.md`."""
