"""The bundled model: a small, honestly trained Qwen-Image-Edit-Plus, its drawn edits and the script that trained it."""
