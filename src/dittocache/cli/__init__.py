"""The command line: `dittocache COMMAND`. It reads words, starts jobs, prints; no logic."""
