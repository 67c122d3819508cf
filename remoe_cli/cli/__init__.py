"""The command line.

Each command has a module that declares its options, calls the library and shows the result.
"""
