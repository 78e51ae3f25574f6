"""The ComfyUI nodes. ComfyUI imports them under the path of this folder, so imports in here are relative."""
