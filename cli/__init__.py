"""The command line: options become a recipe, the library does the work, and this package prints what came of it.

The modules import each other relatively, because this folder is `cli` in a checkout and `compress.cli` once installed.
Importing it costs click and nothing else; whatever needs torch is imported inside the command that needs it.
"""
