"""Runs that outlive whoever started them: a workflow as a process of its own, started, found again and stopped."""
