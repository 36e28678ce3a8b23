"""Caches of other trainers: `.pt` files as qflux lays them out, musubi-tuner's safetensors; import and export."""
