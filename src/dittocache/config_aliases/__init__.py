"""Configs of the embedding cache's specification: their names, references and values, as settings of this package.

`names.py` lists settings that have another name here, `rules.py` and `pictures.py` those that say what happens anyway
or cannot be had, `job_files.py` what only job files of the pre-caching workflow have, `resolving.py` applies them all.
"""
