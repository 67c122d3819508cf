"""The command line: each module parses one subcommand's options, calls one function, and shows the result."""
