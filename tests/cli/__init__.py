"""The command line, run in this process with real descriptors, and by itself where a process is the point."""
