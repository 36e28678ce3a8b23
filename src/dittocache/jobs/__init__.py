"""A workflow of stages, each a process of its own, and the event stream they write."""
