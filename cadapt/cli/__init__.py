"""The command line: one file per command, each parse → one library call → show. Imports no torch by itself."""
